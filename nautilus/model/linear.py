"""A matrix that computes in the dtype of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.ops.linear import linear


class Linear(nn.Module):
    """y = x W^T, no bias. W may be stored wider than x (float32 masters, bf16 compute): it is cast at use."""

    def __init__(self, inputs: int, outputs: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))

    def forward(self, x: Tensor, *, squared_relu: bool = False) -> Tensor:
        return linear(x, self.weight, squared_relu=squared_relu)
