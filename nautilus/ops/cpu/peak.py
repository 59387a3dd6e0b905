"""The most probable token of each row, and the sum of all, as one native call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer, refuses


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocab")),
        *((name, ctypes.c_void_p) for name in ("logits", "best", "total")),
    ]


def peak_native(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops/peak.py`."""
    logits_BV = logits_BV.contiguous()
    rows = len(logits_BV)
    best_B, total_B = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
    call("nautilus_peak", Arguments(*logits_BV.shape, *map(pointer, (logits_BV, best_B, total_B))))
    return best_B, total_B


def peak_refuses(logits_BV: Tensor) -> str | None:
    if logits_BV.dtype != torch.float32:
        return f"logits are {logits_BV.dtype}"
    if not logits_BV.shape[1]:
        return "there are no logits"
    return refuses(logits_BV)
