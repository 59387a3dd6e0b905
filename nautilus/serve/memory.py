"""Whose slot and whose pages: the memory of running requests, and calls on several of them.

A request takes a slot and as many pages as it can ever need before it begins, so none runs out half-way; what is not
free is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nautilus.config.keys import short
from nautilus.model.lanes import Lanes, MambaSlots, RestingSlots, bytes_per_token, new_memory
from nautilus.model.language import Language
from nautilus.ops.pages import PAGE, Rows
from nautilus.ops.state_format import EXACT, StateFormat
from nautilus.runtime import UserError

SHARE = 0.25  # of the machine's memory that keys and values may take


@dataclass(kw_only=True, eq=False)
class Berth:
    """Where a running request's memory lies; `length` tokens are in it."""

    slot: int
    pages: list[int]
    length: int = 0


class Berths:
    """All berths of a model: at most `rows` requests, at most `max_tokens` tokens each, at most `window` of a call that
    may be taken back."""

    def __init__(
        self, model: Language, *, rows: int, max_tokens: int, cache: str = "", state: StateFormat = EXACT,
        window: int = 0,
    ):  # fmt: skip
        config, device = model.config, model.head_weight.device
        pages = pages_for(max_tokens)
        per_token = bytes_per_token(config, 1 if cache in ("fp8", "int8") else model.compute.itemsize)
        affordable = int(SHARE * memory_bytes() / per_token) // PAGE if per_token else rows * pages
        self.most = pages
        count = max(pages, min(rows * pages, affordable))
        try:
            self.layers = new_memory(
                config,
                slots=rows,
                pages=count,
                dtype=model.compute,
                cache=cache,
                device=device,
                scales=model.cache_scales,
                state=state,
                window=window,
            )
        except (MemoryError, OSError, OverflowError, RuntimeError) as bad:  # the system's words for it, and torch's
            raise UserError(
                f"room for {rows} requests of {max_tokens} tokens was asked for, but there is no memory for their"
                f" states, keys and values ({short(bad)}); give fewer rows or max_tokens"
            ) from bad
        self.device, self.slots, self.pages = device, list(range(rows)), list(range(count))

    def take(self, tokens: int) -> Berth | None:
        """Room for so many tokens, or None until others have left."""
        need = pages_for(tokens)
        if not self.slots or need > len(self.pages):
            return None
        berth = Berth(slot=self.slots.pop(), pages=[self.pages.pop() for _ in range(need)])
        for layer in self.layers:
            if isinstance(layer, MambaSlots | RestingSlots):
                layer.clear(berth.slot)
        return berth

    def give_back(self, berth: Berth) -> None:
        self.slots.append(berth.slot)
        self.pages += berth.pages

    def waking(self, berth: Berth) -> Lanes:
        """For the calls that read one prompt: between them its states are not rounded, however they rest later."""
        slot_B = torch.tensor([berth.slot], device=self.device)
        layers = tuple(part.wake(slot_B) if isinstance(part, RestingSlots) else part for part in self.layers)
        awake = any(isinstance(part, RestingSlots) for part in self.layers)
        return replace(self.lanes(1), layers=layers, slot_B=torch.zeros_like(slot_B.int()) if awake else slot_B.int())

    def rest(self, berth: Berth, lanes: Lanes) -> None:
        """After the last of them."""
        slot_B, last_B = (torch.tensor([number], device=self.device) for number in (berth.slot, berth.length - 1))
        for part, awake in zip(self.layers, lanes.layers, strict=True):
            if isinstance(part, RestingSlots) and isinstance(awake, MambaSlots):
                part.rest(slot_B, awake, last_B)

    def lanes(self, rows: int, *, tentative: bool = False) -> Lanes:
        """For calls of so many rows, to be told their slots, and the rest by `point`."""
        ints = lambda *shape: torch.zeros(*shape, dtype=torch.int32, device=self.device)  # noqa: E731
        return Lanes(
            layers=self.layers,
            slot_B=ints(rows),
            rows=Rows(begin=ints(rows + 1), length=ints(rows), table_BL=ints(rows, self.most)),
            tentative=tentative,
        )


def point(lanes: Lanes, berths: Sequence[Berth], time: int) -> None:
    """Let a call of `time` new tokens for each row work on these berths; which slots it uses has been said."""
    write(lanes.rows.begin, range(0, time * len(berths) + 1, time))
    write(lanes.rows.length, [berth.length + time for berth in berths])
    for row, berth in enumerate(berths):
        write(lanes.rows.table_BL[row, : len(berth.pages)], berth.pages)


def write(tensor: Tensor, values: Sequence) -> None:
    """A few numbers; on the CPU numpy takes half as long over them, which every step feels."""
    if tensor.device.type == "cpu":
        tensor.numpy()[...] = values
    else:
        tensor.copy_(torch.tensor(values, dtype=tensor.dtype))


def accept(lanes: Lanes, berths: Sequence[Berth], counts: Sequence[int]) -> None:
    """After a tentative call on these berths: so many of its tokens stay in each."""
    lanes.accept(torch.tensor(counts))
    for berth, count in zip(berths, counts, strict=True):
        berth.length += count


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
