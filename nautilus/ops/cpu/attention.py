"""Keys and values in pages of 16 tokens, written and attended to by one native call each.

The new tokens of all rows of a call follow each other in one tensor, however many each row has: one to decode, some to
verify, thousands of a prompt. Letters: N such tokens, B rows, L pages of a row, H heads, G groups, P head width.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer, refuses
from nautilus.ops.cpu.memory import roomy

PAGE = 16  # KV_PAGE of kernels.h
FORMATS = ("f32", "bf16", "fp8", "int8")  # in the order of KV_F32 ... of kernels.h
BYTES = {"f32": 4, "bf16": 2, "fp8": 1, "int8": 1, "f64": 8}  # of a number; f64 is for PyTorch alone


class KvPages(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "groups", "width", "format", "tokens", "pages", "most")),
        *((name, ctypes.c_void_p) for name in ("begin", "length", "table", "keys", "values")),
    ]


class Positions(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "tokens")),
        *((name, ctypes.c_void_p) for name in ("begin", "length", "position")),
    ]


class Write(ctypes.Structure):
    _fields_ = [
        *(("at", KvPages), ("bf16", ctypes.c_int64), ("k", ctypes.c_void_p), ("v", ctypes.c_void_p)),
        *((name, ctypes.c_float) for name in ("k_scale", "v_scale")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("at", KvPages),
        *((name, ctypes.c_int64) for name in ("heads", "window", "parts")),
        *((name, ctypes.c_void_p) for name in ("q", "first", "out", "lse")),
        *((name, ctypes.c_float) for name in ("scale", "v_scale")),
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """The pages of one attention layer, (pages, groups, bytes of a page each).

    They need no initial contents: the first token of a page clears it. In fp8 a number is its code times k_scale or
    v_scale; the other formats have no such factor.
    """

    format: str
    width: int
    keys: Tensor
    values: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self):
        shape = (*self.keys.shape[:2], page_bytes(self.format, self.width))
        for tensor in (self.keys, self.values):
            if tensor.shape != shape or tensor.dtype != torch.uint8 or not usable(tensor):
                raise ValueError(
                    f"a pool of {self.format} and width {self.width} was given {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}; make it contiguous uint8 of shape {shape}"
                )
        scales = self.k_scale, self.v_scale
        if min(scales) <= 0 or (self.format != "fp8" and scales != (1.0, 1.0)):
            raise ValueError(
                f"scales {scales} do not suit {self.format}; give positive ones with fp8, none with others"
            )

    @property
    def groups(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Where the new tokens of a call belong, int32.

    Those of row b are begin[b] .. begin[b + 1] - 1 and stand at the last of its length[b] positions. Page
    table_BL[b, i] holds its positions 16 i .. 16 i + 15; entries of which no token needs anything may be whatever.
    """

    begin: Tensor
    length: Tensor
    table_BL: Tensor

    def __post_init__(self):
        rows = len(self.length)
        shapes = {"begin": (rows + 1,), "length": (rows,), "table_BL": (rows, self.table_BL.shape[-1])}
        for name, tensor in (("begin", self.begin), ("length", self.length), ("table_BL", self.table_BL)):
            if tensor.shape != shapes[name] or tensor.dtype != torch.int32 or not usable(tensor):
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} for {rows} rows; make it contiguous "
                    f"int32 of shape {shapes[name]}"
                )


def usable(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def page_bytes(format: str, width: int) -> int:
    """Of one page of one group; keys and values take as much each."""
    if format not in BYTES or width < 1 or (format not in ("f32", "f64") and width % 2):
        raise ValueError(
            f"pages of {format!r} for heads of width {width} do not exist; take one of {', '.join(BYTES)} and, except "
            "for f32, an even width"
        )
    numbers = PAGE * math.ceil(width / 16) * 16
    return numbers * BYTES[format] + (4 * PAGE if format == "int8" else 0)


def new_pool(
    pages: int, groups: int, width: int, format: str, *, k_scale: float = 1.0, v_scale: float = 1.0, device=None
) -> Pool:
    size = pages, groups, page_bytes(format, width)
    here = device is None or torch.device(device).type == "cpu"
    room = roomy if here else functools.partial(torch.empty, device=device)
    keys, values = (room(*size, dtype=torch.uint8) for _ in range(2))
    return Pool(format=format, width=width, keys=keys, values=values, k_scale=k_scale, v_scale=v_scale)


def positions_native(rows: Rows, tokens: int) -> Tensor:
    """See `ops/pages.py`. ValueError where the rows have more or fewer tokens."""
    position_N = torch.empty(tokens, dtype=torch.int64)
    record = Positions(len(rows.length), tokens, *map(pointer, (rows.begin, rows.length, position_N)))
    run("nautilus_positions", record, lambda: uncounted(rows.begin.tolist(), tokens))
    return position_N


def kv_write(pool: Pool, rows: Rows, k_NGP: Tensor, v_NGP: Tensor) -> None:
    """New keys and values, bf16 or float32, into their places. ValueError where they have none."""
    shape = (k_NGP.shape[0], pool.groups, pool.width)
    if k_NGP.shape != shape or v_NGP.shape != shape or k_NGP.dtype != v_NGP.dtype:
        raise ValueError(
            f"keys are {k_NGP.dtype} of shape {tuple(k_NGP.shape)}, values {v_NGP.dtype} of {tuple(v_NGP.shape)}; "
            f"pages of {pool.groups} groups of width {pool.width} take both alike"
        )
    if (reason := refuses(k_NGP, v_NGP)) is not None:
        raise ValueError(f"keys and values cannot be written: {reason}")
    k, v = k_NGP.detach().contiguous(), v_NGP.detach().contiguous()
    scales = pool.k_scale, pool.v_scale
    record = Write(pages(pool, rows, len(k)), k.dtype == torch.bfloat16, *map(pointer, (k, v)), *scales)
    # A window of one: of the positions, only those of the new tokens are touched.
    run("nautilus_kv_write", record, lambda: misplaced(pool, rows, len(k), None, 1))


def attention_paged(
    q_NHP: Tensor, pool: Pool, rows: Rows, *,
    first_N: Tensor | None = None, window: int = 0, scale: float | None = None, lse_NH: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out_NHP of new tokens whose keys and values are written, without gradient. ValueError for what does not fit.

    first_N (int32) is the position at which each one's document begins; the scale of scores is 1 / sqrt(P) by default.
    lse_NH, contiguous float32, is written: log(sum_s exp(score_s)) over the positions that each token sees.
    """
    tokens, heads, width = q_NHP.shape
    wanted = torch.float32 if pool.format == "f32" else torch.bfloat16
    if width != pool.width or heads < 1 or heads % pool.groups or q_NHP.dtype != wanted:
        raise ValueError(
            f"{heads} heads of width {width} in {q_NHP.dtype} cannot attend to {pool.groups} groups of width "
            f"{pool.width} in {pool.format}; they must be {wanted}, as wide, and a multiple of the groups"
        )
    if window < 0 or not (first_N is None or (first_N.shape == (tokens,) and first_N.dtype == torch.int32)):
        raise ValueError(f"window {window} and first_N {first_N} for {tokens} tokens; give int32 of shape ({tokens},)")
    if (reason := refuses(q_NHP)) is not None:
        raise ValueError(f"attention on pages is native only: {reason}")
    q, first = q_NHP.detach().contiguous(), None if first_N is None else first_N.cpu().contiguous()
    out, factor = torch.empty_like(q), (width**-0.5 if scale is None else scale) * pool.k_scale
    sizes = heads, window, parts(heads // pool.groups, len(rows.length) * pool.groups)
    record = Forward(pages(pool, rows, tokens), *sizes, *map(pointer, (q, first, out, lse_NH)), factor, pool.v_scale)
    run("nautilus_attention_forward", record, lambda: misplaced(pool, rows, tokens, first, window))
    return out


def attention_native(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0, lse_BTH=None) -> Tensor:
    """See `ops/attention.py`; without gradient. Keys and values go into pages of their own first."""
    (batch, time, _, width), (positions, groups) = q_BTHP.shape, k_BSGP.shape[1:3]
    most = math.ceil(positions / PAGE)
    pool = new_pool(batch * most, groups, width, "f32" if q_BTHP.dtype == torch.float32 else "bf16")
    table_BL = torch.arange(batch * most, dtype=torch.int32).view(batch, most)
    length = torch.full((batch,), positions, dtype=torch.int32)
    old, new = (
        Rows(begin=torch.arange(batch + 1, dtype=torch.int32) * each, length=length, table_BL=table_BL)
        for each in (positions, time)
    )
    kv_write(pool, old, k_BSGP.flatten(0, 1), v_BSGP.flatten(0, 1))
    first_N = None if first_BT is None else first_BT.expand(batch, time).flatten().to(torch.int32)
    lse_NH = None if lse_BTH is None else lse_BTH.flatten(0, 1)
    named = {"first_N": first_N, "window": window, "lse_NH": lse_NH}
    return attention_paged(q_BTHP.flatten(0, 1), pool, new, **named).view(q_BTHP.shape)


def attention_refuses(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> str | None:
    if not q_BTHP.dtype == k_BSGP.dtype == v_BSGP.dtype:
        return f"queries are {q_BTHP.dtype}, keys {k_BSGP.dtype} and values {v_BSGP.dtype}"
    if q_BTHP.dtype == torch.bfloat16 and q_BTHP.shape[-1] % 2:
        return f"the head width {q_BTHP.shape[-1]} is an odd number"
    (batch, time, heads, width), (_, positions, groups, _) = q_BTHP.shape, k_BSGP.shape
    if time > positions or heads % groups or not k_BSGP.shape == v_BSGP.shape == (batch, positions, groups, width):
        return "the shapes of its tensors do not fit together"
    return refuses(q_BTHP, k_BSGP, v_BSGP)


def pages(pool: Pool, rows: Rows, tokens: int) -> KvPages:
    count, (batch, most) = len(pool.keys), rows.table_BL.shape
    sizes = batch, pool.groups, pool.width, FORMATS.index(pool.format), tokens, count, most
    return KvPages(*sizes, *map(pointer, (rows.begin, rows.length, rows.table_BL, pool.keys, pool.values)))


def parts(share: int, pieces: int) -> int:
    """Into how many the heads of a group are cut, so that every thread finds a piece of work."""
    divisors = [part for part in range(1, share + 1) if share % part == 0]
    return next((part for part in divisors if part * pieces >= torch.get_num_threads()), share)


def run(name: str, record: ctypes.Structure, why) -> None:
    """The library says only that something lies outside; what it was is looked for here."""
    try:
        call(name, record)
    except IndexError:
        raise ValueError(f"{name}: {why()}") from None


def uncounted(begin: list[int], tokens: int) -> str:
    return f"begin goes {begin[0]} .. {begin[-1]} over {tokens} new tokens; let it rise from 0 to their number"


def misplaced(pool: Pool, rows: Rows, tokens: int, first: Tensor | None, window: int) -> str:
    """Which of the places of a call does not exist."""
    begin, length, table = (t.tolist() for t in (rows.begin, rows.length, rows.table_BL))
    if begin[0] != 0 or begin[-1] != tokens or begin != sorted(begin):
        return uncounted(begin, tokens)
    for b, positions in enumerate(length):
        new, room = begin[b + 1] - begin[b], PAGE * len(table[b])
        if not new <= positions <= room:
            return (
                f"row {b} has {new} new tokens, {positions} positions and pages for {room}; none may be above the next"
            )
        low = positions
        for t, at in enumerate(range(positions - new, positions), begin[b]):
            document = 0 if first is None else int(first[t])
            if not 0 <= document <= at:
                return f"token {t} stands at position {at}, its document begins at {document}; let it begin before"
            low = min(low, max(document, at - window + 1 if window else 0))
        for i in range(low // PAGE, math.ceil(positions / PAGE)):
            if not 0 <= table[b][i] < len(pool.keys):
                return f"page {i} of row {b} is number {table[b][i]}; the pool has 0 .. {len(pool.keys) - 1}"
    raise AssertionError("everything is in its place")
