"""The norm before each mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.ops.norm import rms_norm


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)
