"""Keys and values in pages of 16 tokens: written, and attended to. Letters: N new tokens of all rows, G groups,
H heads, P head width; `ops/cpu/attention.py` says what a Pool and Rows are, `attention.cpp` how a page is laid out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.attention import attention
from nautilus.ops.cpu.attention import PAGE, Pool, Rows, kv_write, new_pool, positions_native
from nautilus.ops.cpu.attention import attention_paged as paged_native
from nautilus.ops.cpu.library import native, refuses
from nautilus.ops.dispatch import Impl, choose

__all__ = ["PAGE", "Pool", "Rows", "attention_paged", "new_pool", "positions", "write_pages"]


def write_pages(pool: Pool, rows: Rows, k_NGP: Tensor, v_NGP: Tensor) -> None:
    """The new tokens' keys and values into their places, rounded to the pool's format."""
    choose("write_pages", WRITE_IMPLS, pool, rows, k_NGP, v_NGP)(pool, rows, k_NGP, v_NGP)


def attention_paged(q_NHP: Tensor, pool: Pool, rows: Rows, *, window: int = 0) -> Tensor:
    """out_NHP: `attention` for the new tokens of each row, whose keys and values are written already."""
    return choose("attention_paged", PAGED_IMPLS, q_NHP, pool, rows, window=window)(q_NHP, pool, rows, window=window)


def positions(rows: Rows, tokens: int) -> Tensor:
    """position_N (int64) of each of so many new tokens."""
    return choose("positions", POSITION_IMPLS, rows, tokens)(rows, tokens)


def positions_refuse(rows: Rows, tokens: int) -> str | None:
    return native().reason if native().functions is None else None


def positions_torch(rows: Rows, tokens: int) -> Tensor:
    ahead_B = (rows.length - rows.begin[1:]).long()
    return ahead_B.repeat_interleave(rows.begin.diff()) + torch.arange(tokens, device=rows.begin.device)


def write_refuses(pool: Pool, rows: Rows, k_NGP: Tensor, v_NGP: Tensor) -> str | None:
    return refuses(k_NGP, v_NGP)


def paged_refuses(q_NHP: Tensor, pool: Pool, rows: Rows, *, window: int = 0) -> str | None:
    return refuses(q_NHP)


def contents(pool: Pool) -> tuple[Tensor, Tensor]:
    """Keys and values as views (pages, 16, G, P), P rounded up to a multiple of 16."""
    kinds = {"bf16": (torch.bfloat16, 2), "f32": (torch.float32, 1), "f64": (torch.float64, 1)}
    if pool.format not in kinds:
        raise ValueError(f"a cache in {pool.format} was asked for; only native kernels read it: take bf16 or f32")
    dtype, twos = kinds[pool.format]
    keys, values = (t.view(dtype) for t in (pool.keys, pool.values))
    wide = keys.shape[-1] // PAGE
    keys = keys.unflatten(-1, (wide // twos, PAGE, twos)).permute(0, 3, 1, 2, 4)
    values = values.unflatten(-1, (PAGE // twos, wide, twos)).permute(0, 2, 4, 1, 3)
    return keys, values  # (pages, 16, G, wide / twos, twos) and (pages, 16 / twos, twos, G, wide)


def write_torch(pool: Pool, rows: Rows, k_NGP: Tensor, v_NGP: Tensor) -> None:
    keys, values = contents(pool)
    twos = keys.shape[-1]
    pad = keys.shape[-2] * twos - pool.width
    for page, place, token in places(rows):
        k, v = (torch.nn.functional.pad(t[token], (0, pad)).to(keys.dtype) for t in (k_NGP, v_NGP))
        if place == 0:
            keys[page], values[page] = 0, 0
        keys[page, place] = k.unflatten(-1, (-1, twos))
        values[page, place // twos, place % twos] = v


def places(rows: Rows):
    """(page, place in it, number of the token) for every new token."""
    begin, length, table = rows.begin.tolist(), rows.length.tolist(), rows.table_BL.tolist()
    for row, positions in enumerate(length):
        new = begin[row + 1] - begin[row]
        for token in range(new):
            at = positions - new + token
            yield table[row][at // PAGE], at % PAGE, begin[row] + token


def paged_torch(q_NHP: Tensor, pool: Pool, rows: Rows, *, window: int = 0) -> Tensor:
    keys, values = contents(pool)
    out = torch.empty_like(q_NHP)
    begin, length = rows.begin.tolist(), rows.length.tolist()
    for row, positions in enumerate(length):
        mine = rows.table_BL[row, : -(-positions // PAGE)].long()
        k = keys[mine].flatten(0, 1).flatten(-2)[:positions, :, : pool.width]
        v = values[mine].flatten(0, 2)[:positions, :, : pool.width]
        new = slice(begin[row], begin[row + 1])
        out[new] = attention(q_NHP[None, new], *(t[None].to(q_NHP.dtype) for t in (k, v)), window=window)[0]
    return out


POSITION_IMPLS = (
    Impl("native", positions_native, positions_refuse),
    Impl("torch", positions_torch),
    Impl("reference", positions_torch),
)
WRITE_IMPLS = (
    Impl("native", kv_write, write_refuses),
    Impl("torch", write_torch),
    Impl("reference", write_torch),
)
PAGED_IMPLS = (
    Impl("native", paged_native, paged_refuses),
    Impl("torch", paged_torch),
    Impl("reference", paged_torch),
)
