"""Whose slot and whose pages: the memory of running requests, and calls on several of them.

A request takes a slot and as many pages as it can ever need before it begins, so none runs out half-way; what is not
free is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nautilus.model.lanes import Lanes, MambaSlots, bytes_per_token, new_memory
from nautilus.model.language import Language
from nautilus.ops.pages import PAGE, Rows

SHARE = 0.25  # of the machine's memory that keys and values may take


@dataclass(kw_only=True, eq=False)
class Berth:
    """Where a running request's memory lies; `length` tokens are in it."""

    slot: int
    pages: list[int]
    length: int = 0


class Berths:
    """All berths of a model: at most `rows` requests, at most `max_tokens` tokens each."""

    def __init__(self, model: Language, *, rows: int, max_tokens: int, cache: str = ""):
        config, device = model.config, model.head_weight.device
        pages = pages_for(max_tokens)
        per_token = bytes_per_token(config, 1 if cache in ("fp8", "int8") else model.compute.itemsize)
        affordable = int(SHARE * memory_bytes() / per_token) // PAGE if per_token else 0
        self.most = pages
        count = max(pages, min(rows * pages, affordable))
        self.layers = new_memory(
            config, slots=rows, pages=count, dtype=model.compute, cache=cache, device=device, scales=model.cache_scales
        )
        self.device, self.slots, self.pages = device, list(range(rows)), list(range(count))

    def take(self, tokens: int) -> Berth | None:
        """Room for so many tokens, or None until others have left."""
        need = pages_for(tokens)
        if not self.slots or need > len(self.pages):
            return None
        berth = Berth(slot=self.slots.pop(), pages=[self.pages.pop() for _ in range(need)])
        for layer in self.layers:
            if isinstance(layer, MambaSlots):
                layer.clear(berth.slot)
        return berth

    def give_back(self, berth: Berth) -> None:
        self.slots.append(berth.slot)
        self.pages += berth.pages

    def lanes(self, rows: int) -> Lanes:
        """For calls of so many rows, to be filled by `point`."""
        ints = lambda *shape: torch.zeros(*shape, dtype=torch.int32, device=self.device)  # noqa: E731
        return Lanes(
            layers=self.layers,
            slot_B=ints(rows),
            rows=Rows(begin=ints(rows + 1), length=ints(rows), table_BL=ints(rows, self.most)),
        )


def point(lanes: Lanes, berths: Sequence[Berth], time: int) -> None:
    """Let a call of `time` new tokens for each row work on these berths."""
    ints = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    lanes.slot_B.copy_(ints([berth.slot for berth in berths]))
    lanes.rows.begin.copy_(ints(range(0, time * len(berths) + 1, time)))
    lanes.rows.length.copy_(ints([berth.length + time for berth in berths]))
    for row, berth in enumerate(berths):
        lanes.rows.table_BL[row, : len(berth.pages)] = ints(berth.pages)


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
