"""Rotary positions as one native call; turned the other way round, the same call is the backward."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "width", "bf16")),
        *((name, ctypes.c_void_p) for name in ("position", "frequency", "x", "y")),
    ]


def rotate_native(x_BTHP: Tensor, position_BT: Tensor, frequency: Tensor) -> Tensor:
    """See `ops/attention.py`."""
    position_N = position_BT.expand(x_BTHP.shape[:2]).contiguous()
    if torch.is_grad_enabled() and x_BTHP.requires_grad:
        return Native.apply(x_BTHP, position_N, frequency)  # type: ignore[return-value]
    return run(x_BTHP.detach(), position_N, frequency)


def rotate_refuses(x_BTHP: Tensor, position_BT: Tensor, frequency: Tensor) -> str | None:
    batch, time, _, width = x_BTHP.shape
    if position_BT.shape not in ((batch, time), (1, time)) or position_BT.dtype != torch.int64:
        return f"positions are {position_BT.dtype} of shape {tuple(position_BT.shape)} for {batch} x {time} tokens"
    if frequency.shape != (width // 2,) or width % 2 or frequency.dtype != torch.float64:
        return f"frequencies are {frequency.dtype} of shape {tuple(frequency.shape)} for heads of width {width}"
    if position_BT.device.type != "cpu" or frequency.device.type != "cpu" or not frequency.is_contiguous():
        return "positions or frequencies lie elsewhere, or are not contiguous"
    return refuses(x_BTHP)


def run(x_BTHP: Tensor, position_N: Tensor, frequency: Tensor) -> Tensor:
    x, (heads, width) = x_BTHP.contiguous(), x_BTHP.shape[2:]
    y = torch.empty_like(x)
    sizes = position_N.numel(), heads, width, x.dtype == torch.bfloat16
    call("nautilus_rotary", Arguments(*sizes, *map(pointer, (position_N, frequency, x, y))))
    return y


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHP, position_N, frequency):
        ctx.place = position_N, frequency
        return run(x_BTHP, position_N, frequency)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHP):  # type: ignore[override]
        position_N, frequency = ctx.place
        return run(dy_BTHP, position_N, -frequency), None, None
