"""Mixture of experts, gated or with squared ReLU, as one native call, and its backward as another."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses
from nautilus.ops.cpu.linear import pack_all
from nautilus.ops.cpu.packs import packed_form

MOST_ACTIVE = 64  # EXPERTS_ACTIVE of kernels.h
COUNTS = ("tokens", "width", "hidden", "experts", "active", "bf16", "weights_bf16", "gated", "packed")
FORWARD = (
    *("x", "index", "weight", "up", "down", "gate", "output"),
    *("first", "pair", "place", "hidden", "gate_hidden", "y"),
)
GRADIENTS = ("doutput", "dx", "dweight", "dup", "ddown", "dgate")


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in COUNTS]


class Forward(ctypes.Structure):
    _fields_ = [("sizes", Sizes), *((name, ctypes.c_void_p) for name in FORWARD)]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((name, ctypes.c_void_p) for name in GRADIENTS)]


def experts_native(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """See `ops/experts.py`."""
    tensors = x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Native.apply(*tensors)
    sizes, inputs = prepared(*tensors)
    for place, matrix in ((3, up_EFX), (4, down_EXF), (5, gate_EFX)):
        panels = None if matrix is None else packed_panels(matrix, x_RX.dtype)
        if panels is not None:
            inputs[place], sizes.packed = panels, True
    return run(sizes, inputs)[0]


def packed_panels(matrix_EXX: Tensor, dtype: torch.dtype) -> Tensor | None:
    """All experts' matrices laid out for activations of this dtype, where they are packed once (`packs.py`)."""
    key = "experts", matrix_EXX.data_ptr(), matrix_EXX.shape, matrix_EXX.stride(), dtype
    return packed_form(key, matrix_EXX, lambda kept: pack_all(matrix_EXX, dtype) if kept else None)


def experts_refuse(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> str | None:
    (rows, width), (experts, hidden, _) = x_RX.shape, up_EFX.shape
    gate = up_EFX.shape if gate_EFX is None else gate_EFX.shape
    if (up_EFX.shape, gate, down_EXF.shape) != (*[(experts, hidden, width)] * 2, (experts, width, hidden)):
        return "the shapes of its matrices do not fit together"
    if x_RX.dtype == torch.bfloat16 and (x_RX.shape[1] % 2 or up_EFX.shape[1] % 2):
        return f"the widths {x_RX.shape[1]} and {up_EFX.shape[1]} must both be even"
    return index_refuses(rows, index_RK, weight_RK) or refuses(x_RX, weight_RK, up_EFX, down_EXF, gate_EFX)


def index_refuses(rows: int, index_RK: Tensor, weight_RK: Tensor) -> str | None:
    if (index_RK.shape, index_RK.shape[:1], index_RK.dtype) != (weight_RK.shape, (rows,), torch.int64):
        return "the shapes of indices and weights do not fit together, or the indices are not int64"
    active = index_RK.shape[1]
    return f"{active} experts are active for a token, more than {MOST_ACTIVE}" if active > MOST_ACTIVE else None


def prepared(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX) -> tuple[Sizes, list[Tensor | None]]:
    experts, hidden, width = up_EFX.shape
    narrow = (t.dtype == torch.bfloat16 for t in (x_RX, up_EFX))
    sizes = Sizes(len(x_RX), width, hidden, experts, index_RK.shape[1], *narrow, gate_EFX is not None)
    matrices = (None if t is None else t.to(up_EFX.dtype) for t in (up_EFX, down_EXF, gate_EFX))
    inputs = (x_RX, index_RK, weight_RK.to(torch.float32), *matrices)
    return sizes, [None if t is None else t.detach().contiguous() for t in inputs]


def run(sizes: Sizes, inputs: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and what the backward reads beside the inputs: how pairs are sorted, and their hidden numbers."""
    x_RX, pairs = inputs[0], sizes.tokens * sizes.active
    assert x_RX is not None
    output = torch.empty_like(x_RX)
    sorting = [torch.empty(count, dtype=torch.int32) for count in (sizes.experts + 1, pairs, pairs)]
    hidden_ZF, y_ZX = (x_RX.new_empty(pairs, width) for width in (sizes.hidden, sizes.width))
    remembered = [*sorting, hidden_ZF, torch.empty_like(hidden_ZF) if sizes.gated else None]
    call("nautilus_experts_forward", Forward(sizes, *map(pointer, (*inputs, output, *remembered, y_ZX))))
    return output, remembered


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.sizes, inputs = prepared(*tensors)
        output, remembered = run(ctx.sizes, inputs)
        ctx.save_for_backward(*inputs, *remembered)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput):  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: a checkpoint computes them again for the first reader only
        inputs, remembered = saved[:6], saved[6:]
        x_RX, _, weight_RK, *matrices = inputs
        doutput, dx_ZX = doutput.contiguous(), x_RX.new_empty(ctx.sizes.tokens * ctx.sizes.active, x_RX.shape[1])
        record = Forward(ctx.sizes, *map(pointer, (*inputs, None, *remembered, dx_ZX)))
        dx, dweight = torch.empty_like(x_RX), torch.empty_like(weight_RK)
        of_matrices = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in matrices]
        call("nautilus_experts_backward", Backward(record, *map(pointer, (doutput, dx, dweight, *of_matrices))))
        found = (dx, None, dweight, *of_matrices)
        return tuple(None if d is None else d.to(dtype) for d, dtype in zip(found, ctx.dtypes, strict=True))
