"""Operands of low-precision training and their products, one native call each. Letters: R rows in G groups."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer, refuses

FORMATS = {"nvfp4": 0, "mxfp8": 1}
AXES = {"rows": 0, "columns": 1, "tiles": 2}
# Which product: x W^T; dy W; dy^T x.
KINDS = {"forward": 0, "inputs": 1, "weights": 2}


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A trip of a matrix's numbers through a format."""

    format: str
    axis: str  # what lies in a block: neighbours in `rows`, in `columns`, or NVFP4's `tiles` of 16 x 16
    turn: bool = False  # the Hadamard rotation along the columns first, rounded to bf16
    zipped: bool = False  # for a product over rows
    address: tuple[int, int, int, int] | None = None  # stochastic rounding: seed, step, stream, first row
    bits: Tensor | None = None  # stochastic rounding with these, uint8 as x
    group: int = 0  # number of the first group, for its random bits
    blocks: Tensor | None = None  # likewise which blocks of 16 columns these are, int64; none: as they lie
    over: Callable[[Tensor], Tensor] | None = None  # the largest magnitudes of what this is a piece of, given its own


class LowBit(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("groups", "columns", "bf16", "format", "axis", "turn", "stochastic", "zipped")),
        *((n, ctypes.c_int64) for n in ("known", "seed", "step", "stream", "first_row", "first_group")),
        *((n, ctypes.c_void_p) for n in ("blocks", "first", "x", "bits", "y", "top")),
        ("flushed", ctypes.c_int64),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("groups", "outputs", "inputs", "kind", "wide")),
        *((n, ctypes.c_void_p) for n in ("first", "a", "b", "a_top", "b_top", "y")),
    ]


def quantise_native(x_RC: Tensor, first: Tensor, how: Trip) -> tuple[Tensor, Tensor, int]:
    """Values in bf16 (zipped: rows in twos), the largest magnitude of each group, how many numbers became zero."""
    x_RC, groups = x_RC.detach().contiguous(), len(first) - 1
    y_RC, top_G = torch.empty_like(x_RC, dtype=torch.bfloat16), torch.empty(groups)
    stochastic = how.address is not None or how.bits is not None
    seed, step, stream, row = how.address or (0, 0, 0, 0)
    flags = x_RC.dtype == torch.bfloat16, FORMATS[how.format], AXES[how.axis], how.turn, stochastic, how.zipped
    where = (seed + 2**63) % 2**64 - 2**63, step, stream, row, how.group

    def run(top_G: Tensor, to: Tensor | None, known: bool) -> int:
        places = map(pointer, (how.blocks, first, x_RC, how.bits, to, top_G))
        record = LowBit(groups, x_RC.shape[-1], *flags, known, *where, *places)
        call("nautilus_lowbit", record)
        return record.flushed

    if how.over is None:
        return y_RC, top_G, run(top_G, y_RC, False)
    run(top_G, None, False)
    top_G = how.over(top_G)
    return y_RC, top_G, run(top_G, y_RC, True)


def product_native(
    kind: str, a: Tensor, b: Tensor, tops: tuple[Tensor | None, Tensor | None], first: Tensor, dtype: torch.dtype
) -> Tensor:
    """See LowBitProduct in kernels.h; b of forward and inputs has shape (groups, outputs, inputs)."""
    groups = len(first) - 1
    if kind == "weights":
        outputs, inputs = a.shape[-1], b.shape[-1]
        y = torch.empty(groups, outputs, inputs)
    else:
        outputs, inputs = b.shape[-2:]
        y = a.new_empty(len(a), outputs if kind == "forward" else inputs, dtype=dtype)
    sizes = groups, outputs, inputs, KINDS[kind], y.dtype == torch.float32
    call("nautilus_lowbit_product", Product(*sizes, *map(pointer, (first, a, b, *tops, y))))
    return y


def lowbit_refuses(x_RI: Tensor, weight_GOI: Tensor) -> str | None:
    if x_RI.shape[-1] % 2 or weight_GOI.shape[-2] % 2:
        return f"a matrix of shape {tuple(weight_GOI.shape[-2:])} has an odd side"
    if x_RI.dtype != torch.bfloat16:
        return f"activations are {x_RI.dtype}"
    return refuses(x_RI, weight_GOI)
