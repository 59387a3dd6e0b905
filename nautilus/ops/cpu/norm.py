"""The residual stream, one native call each: embedding, sums, RMSNorm and its backward."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, recording, refuses
from nautilus.ops.cpu.memory import ask_for
from nautilus.ops.formats import Packed

BLOCK = 128  # NORM_BLOCK of kernels.h


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "pitch", "bf16")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "scale")),
        ("eps", ctypes.c_float),
    ]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((name, ctypes.c_void_p) for name in ("dy", "dx", "dweight"))]


class Sum(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "bf16")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
    ]


class Embed(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "vocab", "table_bf16", "bf16")),
        *((name, ctypes.c_void_p) for name in ("index", "table", "y")),
    ]


def add_native(a: Tensor, b: Tensor) -> Tensor:
    y = torch.empty_like(a)
    call("nautilus_add", Sum(a.numel(), a.dtype == torch.bfloat16, *map(pointer, (a, b, y))))
    return y


def add_refuses(a: Tensor, b: Tensor) -> str | None:
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return "a gradient is asked for"
    if a.shape != b.shape or a.dtype != b.dtype or not (a.is_contiguous() and b.is_contiguous()):
        return "the two differ in shape or type, or are not contiguous"
    return refuses(a, b)


def embed_native(index: Tensor, table_VD: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(*index.shape, table_VD.shape[1], dtype=dtype)
    narrow = (t == torch.bfloat16 for t in (table_VD.dtype, dtype))
    sizes = index.numel(), table_VD.shape[1], len(table_VD), *narrow
    call("nautilus_embed", Embed(*sizes, *map(pointer, (index, table_VD, y))))
    if recording.get() is not None:  # after the packing of all other weights, which may have pushed it out of memory
        ask_for(table_VD)
    return y


def embed_refuses(index: Tensor, table_VD: Tensor | Packed, dtype: torch.dtype) -> str | None:
    if isinstance(table_VD, Packed):
        return f"the table is in {table_VD.format}"
    if torch.is_grad_enabled() and table_VD.requires_grad:
        return "a gradient is asked for"
    if index.dtype != torch.int64 or dtype not in (torch.float32, torch.bfloat16):
        return f"the index is {index.dtype}, the result {dtype}"
    if not (index.is_contiguous() and table_VD.is_contiguous()):
        return "the index or the table is not contiguous"
    return refuses(table_VD) if index.device.type == "cpu" else f"the index is on {index.device}"


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
    sizes = x.numel() // width, width, width if y is None else y.stride(-2) if y.dim() > 1 else width
    return Forward(*sizes, x.dtype == torch.bfloat16, *map(pointer, (x, weight_D, y, scale)), eps)


def run(
    x: Tensor, weight_D: Tensor, eps: float, *, keep: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x) if out is None else out
    scale = weight_D.new_empty(x.numel() // len(weight_D)) if keep else None
    call("nautilus_norm_forward", record(x, weight_D, y, scale, eps))
    return y, scale


def joined_norms_native(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, eps: float) -> Tensor:
    width = a.shape[-1]
    y = a.new_empty(*a.shape[:-1], 2 * width)
    run(*prepared(a, weight_a), eps, keep=False, out=y[..., :width])
    run(*prepared(b, weight_b), eps, keep=False, out=y[..., width:])
    return y


def joined_norms_refuse(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, eps: float) -> str | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (a, weight_a, b, weight_b)):
        return "a gradient is asked for"
    if a.shape != b.shape or a.dtype != b.dtype or a.dim() < 2:
        return "the two differ in shape or type, or are single rows"
    return rms_norm_refuses(a, weight_a, eps) or rms_norm_refuses(b, weight_b, eps)


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
