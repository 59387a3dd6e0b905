"""The sigmoid, with the same bits for the same number at any place of a tensor."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses


class Arguments(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p)]


def sigmoid_native(x: Tensor) -> Tensor:
    return Native.apply(x)


def sigmoid_refuses(x: Tensor) -> str | None:
    return refuses(x) if x.dtype == torch.float32 else f"a tensor is {x.dtype}"


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        given = x.contiguous()
        y = torch.empty_like(given)
        call("nautilus_sigmoid", Arguments(given.numel(), pointer(given), pointer(y)))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return dy * y * (1 - y)
