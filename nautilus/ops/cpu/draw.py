"""Tokens for all rows of logits as one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer, refuses

COLDEST, HOTTEST = 1e-6, 1e6  # temperatures that, and the quotients of logits by them, are floats of some precision


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocab")),
        *((name, ctypes.c_void_p) for name in ("logits", "at", "best", "temperature", "seed", "position", "token")),
    ]


def draw_native(
    rows: Sequence[Tensor],
    best: Sequence[int],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """See `ops/draw.py`."""
    first, token = rows[0], torch.empty(len(rows), dtype=torch.int64)
    numbers = (
        torch.tensor([(row.data_ptr() - first.data_ptr()) // first.itemsize for row in rows]),
        torch.tensor(best),
        torch.tensor(temperatures, dtype=torch.float64),
        *(torch.from_numpy(np.array(some, np.uint64)) for some in (seeds, positions)),
        token,
    )
    call("nautilus_draw", Arguments(len(rows), len(first), pointer(first), *map(pointer, numbers)))
    return token.tolist()


def draw_refuses(rows: Sequence[Tensor], best: object, temperatures: Sequence[float], *others: object) -> str | None:
    """Of rows of one length, each in one piece."""
    for row in rows:
        if row.dtype != torch.float32 or row.stride(0) != 1:
            return f"logits are {row.dtype}, {row.stride(0)} apart"
    if strange := [heat for heat in temperatures if not COLDEST <= heat <= HOTTEST]:
        return f"a temperature is {strange[0]}"
    return refuses(rows[0])
