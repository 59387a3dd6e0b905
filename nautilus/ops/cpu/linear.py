"""y = x W^T as one native call on a packed matrix."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, native, pointer, refuses
from nautilus.ops.cpu.memory import let_go, roomy
from nautilus.ops.cpu.packs import packed_form


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "bf16", "weight_bf16")),
        *((name, ctypes.c_void_p) for name in ("weight", "packed")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "bf16", "packed_bf16")),
        *((name, ctypes.c_int64) for name in ("x_bf16", "y_bf16", "squared_relu")),
        *((name, ctypes.c_void_p) for name in ("x", "packed", "y")),
    ]


def linear_native(
    x: Tensor, weight_OI: Tensor, *, exact: bool = False, wide: bool = False, squared_relu: bool = False
) -> Tensor:
    """See `ops/linear.py`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        y = Native.apply(x.to(torch.float32) if exact else x, weight_OI, wide)
        return y.relu().square() if squared_relu else y  # type: ignore[union-attr]
    dtype = packed_as(torch.float32 if exact else x.dtype, weight_OI)
    key = weight_OI.data_ptr(), weight_OI.shape, weight_OI.stride(), dtype
    packed = packed_form(key, weight_OI, lambda kept: pack(weight_OI, dtype, kept=kept))
    return forward(x, packed, dtype, len(weight_OI), exact, wide, squared_relu)


def packed_as(computed: torch.dtype, weight_OI: Tensor) -> torch.dtype:
    """Of a matrix: where float32 is computed with, numbers of bf16 stay what they are, half as many bytes to read."""
    return torch.bfloat16 if weight_OI.dtype == torch.bfloat16 and weight_OI.shape[1] % 2 == 0 else computed


def linear_refuses(x: Tensor, weight_OI: Tensor, *, exact=False, wide=False, squared_relu=False) -> str | None:
    if x.shape[-1:] != weight_OI.shape[1:]:
        return f"a matrix of shape {tuple(weight_OI.shape)} cannot take {x.shape[-1]} inputs"
    if x.dtype == torch.bfloat16 and x.shape[-1] % 2:
        return f"{x.shape[-1]} inputs are an odd number"
    return refuses(x, weight_OI)


def pack(weight_OI: Tensor, dtype: torch.dtype, *, kept: bool = False) -> Tensor:
    """The matrix laid out for activations of this dtype, as bytes, which are `kept` for many uses or not."""
    return pack_all(weight_OI[None], dtype, kept=kept)[0]


def pack_all(weight_EOI: Tensor, dtype: torch.dtype, *, kept: bool = True) -> Tensor:
    """Several matrices of one shape, each laid out as `pack` does; a row of bytes for each."""
    functions = native().functions
    assert functions is not None
    _, outputs, inputs = weight_EOI.shape
    weight_EOI = weight_EOI.detach().contiguous()
    sizes = inputs, outputs, dtype == torch.bfloat16, weight_EOI.dtype == torch.bfloat16
    size = functions.nautilus_linear_packed_size(ctypes.byref(Pack(*sizes)))
    packed_EB = (roomy if kept else torch.empty)(len(weight_EOI), size, dtype=torch.uint8)
    for weight_OI, packed_B in zip(weight_EOI, packed_EB, strict=True):
        call("nautilus_linear_pack", Pack(*sizes, pointer(weight_OI), pointer(packed_B)))
    if kept:
        let_go([weight_EOI])
    return packed_EB


def forward(
    x: Tensor,
    packed: Tensor,
    packed_dtype: torch.dtype,
    outputs: int,
    exact: bool = False,
    wide: bool = False,
    squared_relu: bool = False,
) -> Tensor:
    rows = x.detach().contiguous()
    narrow, inputs = x.dtype == torch.bfloat16, x.shape[-1]
    y = rows.new_empty(*x.shape[:-1], outputs, dtype=torch.float32 if exact or wide else x.dtype)
    types = narrow and not exact, packed_dtype == torch.bfloat16, narrow, y.dtype == torch.bfloat16, squared_relu
    call(
        "nautilus_linear_forward",
        Forward(rows.numel() // inputs, inputs, outputs, *types, *map(pointer, (rows, packed, y))),
    )
    return y


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, wide):
        ctx.save_for_backward(x, weight_OI)
        dtype = packed_as(x.dtype, weight_OI)
        return forward(x, pack(weight_OI, dtype), dtype, len(weight_OI), wide=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight_OI = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight_OI.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(weight_OI.dtype)
        return dx, dweight, None
