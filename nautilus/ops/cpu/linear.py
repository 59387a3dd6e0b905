"""y = x W^T as one native call on a packed matrix.

A matrix is packed at every use, which costs little beside many rows. Who uses the same matrices again and again without
changing them, as generation does, says so: inside `packed_once()` each is packed once.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, native, pointer, refuses

# (address, shape and strides of a matrix, dtype of the activations) → the matrix, so that its address stays its own,
# and its packed form
Packs = dict[tuple, tuple[Tensor, Tensor]]
_packs: contextvars.ContextVar[Packs | None] = contextvars.ContextVar("packs", default=None)


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "bf16", "weight_bf16")),
        *((name, ctypes.c_void_p) for name in ("weight", "packed")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "bf16", "x_bf16", "y_bf16", "squared_relu")),
        *((name, ctypes.c_void_p) for name in ("x", "packed", "y")),
    ]


def linear_native(
    x: Tensor, weight_OI: Tensor, *, exact: bool = False, wide: bool = False, squared_relu: bool = False
) -> Tensor:
    """See `ops/linear.py`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        y = Native.apply(x.to(torch.float32) if exact else x, weight_OI, wide)
        return y.relu().square() if squared_relu else y  # type: ignore[union-attr]
    packed = packed_form(weight_OI, torch.float32 if exact else x.dtype)
    return forward(x, packed, len(weight_OI), exact, wide, squared_relu)


def linear_refuses(x: Tensor, weight_OI: Tensor, *, exact=False, wide=False, squared_relu=False) -> str | None:
    if x.shape[-1:] != weight_OI.shape[1:]:
        return f"a matrix of shape {tuple(weight_OI.shape)} cannot take {x.shape[-1]} inputs"
    if x.dtype == torch.bfloat16 and x.shape[-1] % 2:
        return f"{x.shape[-1]} inputs are an odd number"
    return refuses(x, weight_OI)


@contextlib.contextmanager
def packed_once(packs: Packs) -> Iterator[None]:
    """Matrices that are used inside are packed once and kept in `packs`; they must not change as long as it is used."""
    before = _packs.set(packs)
    try:
        yield
    finally:
        _packs.reset(before)


def packed_form(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    packs = _packs.get()
    if packs is None:
        return pack(weight_OI, dtype)
    key = weight_OI.data_ptr(), weight_OI.shape, weight_OI.stride(), dtype
    if key not in packs:
        packs[key] = weight_OI, pack(weight_OI, dtype)
    return packs[key][1]


def pack(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix laid out for activations of this dtype, as bytes."""
    functions = native().functions
    assert functions is not None
    outputs, inputs = weight_OI.shape
    weight = weight_OI.detach().contiguous()
    sizes = inputs, outputs, dtype == torch.bfloat16, weight.dtype == torch.bfloat16
    packed = torch.empty(functions.nautilus_linear_packed_size(ctypes.byref(Pack(*sizes))), dtype=torch.uint8)
    call("nautilus_linear_pack", Pack(*sizes, pointer(weight), pointer(packed)))
    return packed


def forward(
    x: Tensor, packed: Tensor, outputs: int, exact: bool = False, wide: bool = False, squared_relu: bool = False
) -> Tensor:
    rows = x.detach().contiguous()
    narrow, inputs = x.dtype == torch.bfloat16, x.shape[-1]
    y = rows.new_empty(*x.shape[:-1], outputs, dtype=torch.float32 if exact or wide else x.dtype)
    types = narrow and not exact, narrow, y.dtype == torch.bfloat16, squared_relu
    call(
        "nautilus_linear_forward",
        Forward(rows.numel() // inputs, inputs, outputs, *types, *map(pointer, (rows, packed, y))),
    )
    return y


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI, wide):
        ctx.save_for_backward(x, weight_OI)
        return forward(x, pack(weight_OI, x.dtype), len(weight_OI), wide=wide)

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
