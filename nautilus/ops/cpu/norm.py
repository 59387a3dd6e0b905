"""RMSNorm as one native call, and its backward as another."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses

BLOCK = 128  # NORM_BLOCK of kernels.h


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "bf16")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "scale")),
        ("eps", ctypes.c_float),
    ]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((name, ctypes.c_void_p) for name in ("dy", "dx", "dweight"))]


def rms_norm_native(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `ops/norm.py`."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight_D.requires_grad):
        return Native.apply(hidden, weight_D, eps)
    return run(*prepared(hidden, weight_D), eps, keep=False)[0]


def rms_norm_refuses(hidden: Tensor, weight_D: Tensor, eps: float) -> str | None:
    if weight_D.shape != hidden.shape[-1:]:
        return f"the weight has shape {tuple(weight_D.shape)} and the rows {hidden.shape[-1]} numbers"
    return refuses(hidden, weight_D)


def prepared(hidden: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.detach().contiguous(), weight_D.detach().to(torch.float32).contiguous()


def record(x: Tensor, weight_D: Tensor, y: Tensor | None, scale: Tensor | None, eps: float) -> Forward:
    width = len(weight_D)
    return Forward(x.numel() // width, width, x.dtype == torch.bfloat16, *map(pointer, (x, weight_D, y, scale)), eps)


def run(x: Tensor, weight_D: Tensor, eps: float, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    scale = weight_D.new_empty(x.numel() // len(weight_D)) if keep else None
    call("nautilus_norm_forward", record(x, weight_D, y, scale, eps))
    return y, scale


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight_D, eps):
        x, weight = prepared(hidden, weight_D)
        y, scale = run(x, weight, eps, keep=True)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps, ctx.weight_dtype = eps, weight_D.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        apart = weight.new_empty(-(-len(scale) // BLOCK), len(weight))
        forward = record(x, weight, None, scale, ctx.eps)
        call("nautilus_norm_backward", Backward(forward, *map(pointer, (dy, dx, apart))))
        return dx, apart.sum(0).to(ctx.weight_dtype), None
