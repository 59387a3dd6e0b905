"""Causal grouped attention for training: the forward on pages, and its backward as one native call.

Letters: those of `ops/attention.py`.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.attention import attention_native
from nautilus.ops.cpu.library import call, pointer

TILE, BLOCK, PAD = 48, 48, 16  # ATTENTION_TILE, ATTENTION_BLOCK and ATTENTION_PAD of kernels.h
STRIP = 1 << 15  # numbers in a strip of keys: what is made of it stays in the second cache
PARTS = 1 << 22  # numbers of dq held at a time before they are added up: 16 MiB
SIZES = ("rows", "time", "positions", "heads", "groups", "width", "window", "bf16", "strip", "slab")
TENSORS = ("q", "k", "v", "out", "dout", "lse", "first", "dq", "dk", "dv", "sums", "parts")


class Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("scale", ctypes.c_float),
    ]


class Native(torch.autograd.Function):
    """The forward keeps, of every query and head, the log of the sum that its softmax divides by.

    The bits of the gradients depend neither on threads nor on other rows of the batch, those of dq on no other query.
    """

    @staticmethod
    def forward(ctx, q_BTHP, k_BSGP, v_BSGP, first_BT, window):
        lse_BTH = q_BTHP.new_empty(q_BTHP.shape[:3], dtype=torch.float32)
        out_BTHP = attention_native(q_BTHP, k_BSGP, v_BSGP, first_BT=first_BT, window=window, lse_BTH=lse_BTH)
        ctx.save_for_backward(q_BTHP, k_BSGP, v_BSGP, out_BTHP, lse_BTH, first_BT)
        ctx.window = window
        return out_BTHP

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BTHP):  # type: ignore[override]
        q, k, v, out, lse, first = ctx.saved_tensors
        q, k, v, dout = (t.contiguous() for t in (q, k, v, dout_BTHP))
        first = None if first is None else first.expand(q.shape[:2]).to(torch.int32).contiguous()
        (batch, time, heads, width), (_, positions, groups, _) = q.shape, k.shape
        pairs, wide, strip, slab = pieces(batch * groups, time * heads // groups, positions, width)
        sums, parts = torch.zeros(pairs, 2, strip, wide), torch.empty(pairs, slab, wide)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        sizes = batch, time, positions, heads, groups, width, ctx.window, q.dtype == torch.bfloat16, strip, slab
        tensors = q, k, v, out, dout, lse, first, dq, dk, dv, sums, parts
        call("nautilus_attention_backward", Backward(*sizes, *map(pointer, tensors), width**-0.5))
        return dq, dk, dv, None, None


def pieces(pairs: int, rows: int, positions: int, width: int) -> tuple[int, int, int, int]:
    """Strips of all pairs of batch row and group, the width of their sums, keys of a strip and rows of a slab.

    Only the width decides on the strips, for the sake of the same bits; slabs are as large as PARTS allows.
    """
    wide = math.ceil(width / PAD) * PAD
    strip = max(1, min(20, STRIP // wide // TILE)) * TILE
    pairs *= math.ceil(positions / strip)
    slab = max(1, min(rows, PARTS // max(1, pairs * wide)))
    return pairs, wide, strip, math.ceil(slab / BLOCK) * BLOCK
