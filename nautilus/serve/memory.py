"""Whose slot and whose pages: the memory of running requests, and calls on several of them.

A request takes a slot, and pages as it grows. A page may be held by several: a prefix that is known already is read by
all who begin with it. Nobody writes into what another one reads: requests only ever add tokens, and who goes on from
the middle of a page gets a copy of that page.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nautilus.config import Layer
from nautilus.config.keys import short
from nautilus.model.lanes import Lanes, MambaSlots, Memory, RestingSlots, bytes_per_token, new_memory, plain
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.ops.pages import PAGE, Pool, Rows
from nautilus.ops.state_format import EXACT, StateFormat
from nautilus.runtime import UserError
from nautilus.serve.seen import Seen

SHARE = 0.25  # of the machine's memory that keys and values may take


@dataclass(kw_only=True, eq=False)
class Berth:
    """Where a running request's memory lies; `length` tokens are in it. awake: for the calls that read its prompt.
    mixed: the weights have changed since it was taken. behind: what was seen of its latest tokens that a
    drafter has not read yet; None: none follows it any more."""

    slot: int
    pages: list[int]
    length: int = 0
    awake: Lanes | None = None
    mixed: bool = False
    behind: Seen | None = field(default_factory=Seen)


class Berths:
    """All berths of a model: at most `rows` requests, at most `max_tokens` tokens each, at most `window` of them in a
    call that may be taken back. beside: layers of a drafter, whose keys and values stand behind those of the model."""

    def __init__(
        self, model: Language, *, rows: int, max_tokens: int, cache: str = "", cache_bytes: float | None = None,
        state: StateFormat = EXACT, window: int = 0, beside: Sequence[Layer] = (),
    ):  # fmt: skip
        config, device = replace(model.config, layers=(*model.config.layers, *beside)), model.head_weight.device
        pages, self.max_tokens = pages_for(max_tokens), max_tokens
        per_token = bytes_per_token(config, 1 if cache in ("fp8", "int8") else model.compute.itemsize)
        most = SHARE * memory_bytes() if cache_bytes is None else cache_bytes
        affordable = int(most / per_token) // PAGE if per_token else rows * pages
        self.most = pages
        count = max(pages, min(rows * pages, affordable))
        try:
            self.layers = new_memory(
                config, slots=rows + 1, pages=count + 1, dtype=model.compute, cache=cache, device=device,
                scales=model.cache_scales, state=state, window=window,
            )  # fmt: skip
        except (MemoryError, OSError, OverflowError, RuntimeError) as bad:  # the system's words for it, and torch's
            raise UserError(
                f"room for {rows} requests of {max_tokens} tokens was asked for, but there is no memory for their"
                f" states, keys and values ({short(bad)}); give fewer rows or max_tokens"
            ) from bad
        self.device, self.slots = device, list(range(rows))
        self.pool = Pages(self.pools(), count)
        self.spare = Berth(slot=rows, pages=[count])  # for tokens of nobody
        self.roomy = device.type == "cpu" and state.lossless and native().functions is not None  # calls may have them
        # A state that is put back is gone on from by the next call for all, without one that reads for it alone; but a
        # drafter sees a prompt where it is read.
        self.straight = state.lossless and not window

    def take(self, tokens: int, shared: Sequence[int] = ()) -> Berth | None:
        """Room for so many tokens, the first of them in `shared` pages, or None until others have left. The states are
        zero."""
        need = pages_for(tokens) - len(shared)
        if not self.slots or need > self.pool.free():
            return None
        for layer in self.layers:
            if isinstance(layer, MambaSlots | RestingSlots):
                layer.clear(self.slots[-1])
        self.pool.hold(shared)
        return Berth(slot=self.slots.pop(), pages=[*shared, *self.pool.take(need)])

    def grow(self, berth: Berth, tokens: int) -> bool:
        """Room for so many tokens in all; False where there is none."""
        need = pages_for(tokens) - len(berth.pages)
        if need > self.pool.free():
            return False
        berth.pages += self.pool.take(need)
        return True

    def give_back(self, berth: Berth) -> None:
        self.slots.append(berth.slot)
        self.pool.release(berth.pages)

    def reading(self, berths: Sequence[Berth]) -> Lanes:
        """For a call that reads prompts into these: into several only where states rest as they are."""
        if len(berths) == 1:
            berths[0].awake = berths[0].awake or self.waking(berths[0])
            return berths[0].awake
        lanes = self.lanes(len(berths))
        write(lanes.slot_B, [berth.slot for berth in berths])
        return lanes

    def waking(self, berth: Berth) -> Lanes:
        """For the calls that read one prompt: between them its states are not rounded, however they rest later."""
        slot_B = torch.tensor([berth.slot], device=self.device)
        layers = tuple(part.wake(slot_B) if isinstance(part, RestingSlots) else part for part in self.layers)
        awake = any(isinstance(part, RestingSlots) for part in self.layers)
        return replace(self.lanes(1), layers=layers, slot_B=torch.zeros_like(slot_B.int()) if awake else slot_B.int())

    def rest(self, berth: Berth) -> None:
        """After the last of them."""
        if berth.awake is None:
            return
        slot_B, last_B = (torch.tensor([number], device=self.device) for number in (berth.slot, berth.length - 1))
        for part, awake in zip(self.layers, berth.awake.layers, strict=True):
            if isinstance(part, RestingSlots) and isinstance(awake, MambaSlots):
                part.rest(slot_B, awake, last_B)
        berth.awake = None

    def lanes(self, rows: int, *, tentative: bool = False) -> Lanes:
        """For calls of so many rows, to be told their slots, and the rest by `point`."""
        ints = lambda *shape: torch.zeros(*shape, dtype=torch.int32, device=self.device)  # noqa: E731
        return Lanes(
            layers=self.layers,
            slot_B=ints(rows),
            rows=Rows(begin=ints(rows + 1), length=ints(rows), table_BL=ints(rows, self.most)),
            tentative=tentative,
        )

    def pools(self) -> list[Pool]:
        return [layer for layer in self.layers if isinstance(layer, Pool)]

    # ----- what is kept of a prefix -----------------------------------------------------------------------------------

    def state(self, berth: Berth) -> list[Tensor]:
        """Copies of its recurrent states, as they are after its last token."""
        (berth.awake or replace(self.lanes(1), slot_B=torch.tensor([berth.slot], dtype=torch.int32))).fold()
        return [part.clone() for part in states(*self.place(berth))]

    def put_state(self, berth: Berth, tensors: Sequence[Tensor]) -> None:
        """The berth goes on from there."""
        if not self.straight:
            berth.awake = berth.awake or self.waking(berth)
        for mine, part in zip(states(*self.place(berth)), tensors, strict=True):
            mine.copy_(part)

    def place(self, berth: Berth) -> tuple[Memory, int]:
        """The layers, and the slot of them, where its states lie."""
        return (berth.awake.layers, int(berth.awake.slot_B[0])) if berth.awake else (self.layers, berth.slot)


class Pages:
    """The pages of all layers together: page i of each layer belongs to the same 16 tokens. Each is free, or has as
    many references as requests and saved prefixes hold it."""

    def __init__(self, pools: Sequence[Pool], count: int):
        self.parts = [part for pool in pools for part in (pool.keys, pool.values)]
        self.page_bytes = sum(part[0].nbytes for part in self.parts)
        self.references = [0] * count
        self.unused = list(range(count))

    def free(self) -> int:
        return len(self.unused)

    def take(self, count: int) -> list[int]:
        """Free pages, with a reference each; the caller has seen that there are so many."""
        pages = [self.unused.pop() for _ in range(count)]
        self.hold(pages)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.unused.append(page)

    def read(self, pages: Sequence[int]) -> list[Tensor]:
        """Copies of their contents, the first axis of each is these pages."""
        at = torch.tensor(pages, dtype=torch.int64)
        return [part[at] for part in self.parts]

    def write(self, pages: Sequence[int], tensors: Sequence[Tensor]) -> None:
        at = torch.tensor(pages, dtype=torch.int64)
        for part, tensor in zip(self.parts, tensors, strict=True):
            part[at] = tensor.to(part.device)

    def copy(self, source: int, target: int) -> None:
        for part in self.parts:
            part[target] = part[source]


def states(layers: Memory, slot: int) -> list[Tensor]:
    """Views of recurrent states, where they lie."""
    mambas = [layer for layer in layers if isinstance(layer, MambaSlots)]
    return [part[slot] for layer in mambas for part in (layer.tail_SRC[:, : layer.taps - 1], layer.ssm_SHNP)]


def point(lanes: Lanes, berths: Sequence[Berth], counts: Sequence[int]) -> None:
    """Let a call of so many new tokens of each row work on these berths; which slots it uses has been said."""
    share_out(lanes, counts)
    write(lanes.rows.length, [berth.length + count for berth, count in zip(berths, counts, strict=True)])
    for row, berth in enumerate(berths):
        write(lanes.rows.table_BL[row, : len(berth.pages)], berth.pages)


def share_out(lanes: Lanes, counts: Sequence[int]) -> None:
    """The first so many new tokens of a call are the first row's, and so on."""
    write(lanes.rows.begin, [*itertools.accumulate(counts, initial=0)])


def write(to: Tensor | np.ndarray, values: Sequence) -> None:
    to = plain(to) if isinstance(to, Tensor) else to
    if isinstance(to, Tensor):
        to.copy_(torch.tensor(values, dtype=to.dtype))
    else:
        to[...] = values


def accept(lanes: Lanes, berths: Sequence[Berth], counts: Sequence[int]) -> None:
    """After a tentative call on these berths: so many of its tokens stay in each."""
    lanes.accept(counts)
    for berth, count in zip(berths, counts, strict=True):
        berth.length += count


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
