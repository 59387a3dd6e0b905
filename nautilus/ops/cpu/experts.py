"""Mixture of experts with squared ReLU as one native call, and its backward as another."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses

MOST_ACTIVE = 64  # EXPERTS_ACTIVE of kernels.h
COUNTS = ("tokens", "width", "hidden", "experts", "active", "bf16", "weights_bf16")
FORWARD = ("x", "index", "weight", "up", "down", "output", "first", "pair", "place", "hidden", "y")


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in COUNTS]


class Forward(ctypes.Structure):
    _fields_ = [("sizes", Sizes), *((name, ctypes.c_void_p) for name in FORWARD)]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((n, ctypes.c_void_p) for n in ("doutput", "dx", "dweight", "dup", "ddown"))]


def experts_native(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """See `ops/experts.py`."""
    tensors = x_RX, index_RK, weight_RK, up_EFX, down_EXF
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Native.apply(*tensors)
    return run(*prepared(*tensors))[0]


def experts_refuse(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> str | None:
    if gate_EFX is not None:
        return "the experts are gated"
    (rows, width), (experts, hidden, _) = x_RX.shape, up_EFX.shape
    if (up_EFX.shape, down_EXF.shape) != ((experts, hidden, width), (experts, width, hidden)):
        return "the shapes of its matrices do not fit together"
    if x_RX.dtype == torch.bfloat16 and (x_RX.shape[1] % 2 or up_EFX.shape[1] % 2):
        return f"the widths {x_RX.shape[1]} and {up_EFX.shape[1]} must both be even"
    return index_refuses(rows, index_RK, weight_RK) or refuses(x_RX, weight_RK, up_EFX, down_EXF)


def index_refuses(rows: int, index_RK: Tensor, weight_RK: Tensor) -> str | None:
    if (index_RK.shape, index_RK.shape[:1], index_RK.dtype) != (weight_RK.shape, (rows,), torch.int64):
        return "the shapes of indices and weights do not fit together, or the indices are not int64"
    active = index_RK.shape[1]
    return f"{active} experts are active for a token, more than {MOST_ACTIVE}" if active > MOST_ACTIVE else None


def prepared(x_RX, index_RK, weight_RK, up_EFX, down_EXF) -> tuple[Sizes, list[Tensor]]:
    experts, hidden, width = up_EFX.shape
    narrow = (t.dtype == torch.bfloat16 for t in (x_RX, up_EFX))
    sizes = Sizes(len(x_RX), width, hidden, experts, index_RK.shape[1], *narrow)
    inputs = [x_RX, index_RK, weight_RK.to(torch.float32), up_EFX, down_EXF.to(up_EFX.dtype)]
    return sizes, [t.detach().contiguous() for t in inputs]


def run(sizes: Sizes, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and what the backward reads beside the inputs: how pairs are sorted, and their hidden numbers."""
    x_RX, pairs = inputs[0], sizes.tokens * sizes.active
    output = torch.empty_like(x_RX)
    sorting = [torch.empty(count, dtype=torch.int32) for count in (sizes.experts + 1, pairs, pairs)]
    hidden_ZF, y_ZX = (x_RX.new_empty(pairs, width) for width in (sizes.hidden, sizes.width))
    record = Forward(sizes, *map(pointer, (*inputs, output, *sorting, hidden_ZF, y_ZX)))
    call("nautilus_experts_forward", record)
    return output, [*sorting, hidden_ZF]


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.sizes, inputs = prepared(*tensors)
        output, remembered = run(ctx.sizes, inputs)
        ctx.save_for_backward(*inputs, *remembered)
        ctx.dtypes = [t.dtype for t in tensors]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput):  # type: ignore[override]
        x_RX, index_RK, weight_RK, up_EFX, down_EXF, *sorting, hidden_ZF = ctx.saved_tensors
        doutput, dx_ZX = doutput.contiguous(), x_RX.new_empty(len(hidden_ZF), x_RX.shape[1])
        inputs = (x_RX, index_RK, weight_RK, up_EFX, down_EXF)
        record = Forward(ctx.sizes, *map(pointer, (*inputs, None, *sorting, hidden_ZF, dx_ZX)))
        dx, dweight = torch.empty_like(x_RX), torch.empty_like(weight_RK)
        dup, ddown = (torch.empty_like(t, dtype=torch.float32) for t in (up_EFX, down_EXF))
        call("nautilus_experts_backward", Backward(record, *map(pointer, (doutput, dx, dweight, dup, ddown))))
        found = (dx, None, dweight, dup, ddown)
        return tuple(None if d is None else d.to(dtype) for d, dtype in zip(found, ctx.dtypes, strict=True))
