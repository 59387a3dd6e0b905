"""silu(gate) up as one native call, and its backward as another."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "bf16", "y_bf16")),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "y")),
    ]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((name, ctypes.c_void_p) for name in ("dy", "dgate", "dup"))]


def swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    """See `ops/activation.py`."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return Native.apply(gate, up)  # type: ignore[return-value]
    return run(gate.detach().contiguous(), up.detach().contiguous())


def swiglu_refuses(gate: Tensor, up: Tensor) -> str | None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return f"the gate is {gate.dtype} of shape {tuple(gate.shape)}, what it opens {up.dtype} of {tuple(up.shape)}"
    return refuses(gate, up)


def record(gate: Tensor, up: Tensor, y: Tensor | None) -> Forward:
    narrow = gate.dtype == torch.bfloat16
    return Forward(gate.numel(), narrow, narrow, *map(pointer, (gate, up, y)))


def run(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    call("nautilus_swiglu", record(gate, up, y))
    return y


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return run(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dy, dgate, dup = dy.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        call("nautilus_swiglu_backward", Backward(record(gate, up, None), *map(pointer, (dy, dgate, dup))))
        return dgate, dup
