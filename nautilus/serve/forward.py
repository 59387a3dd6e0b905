"""The model at work for an engine: prompts are read in chunks, and every step adds one token to each running request.

What a step of so many requests does is recorded the first time and replayed from then on, where all of it is native.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nautilus.model.lanes import Lanes
from nautilus.model.language import Language, Tap
from nautilus.ops.linear import Packs, packed_once
from nautilus.ops.loss import ELEMENTS, rows_for
from nautilus.serve.memory import Berth, Berths, accept, plain, point, write
from nautilus.serve.recorded import Recorded


class Watcher(Protocol):
    """Wants to see what the model makes of every token that stays: what left the layers `taps`, or, where it names
    none, the final hidden states."""

    taps: tuple[int, ...]

    def see(self, berth: Berth, seen_ND: Tensor) -> None: ...

    def read(self, berth: Berth, tokens_1N: Tensor, seen_ND: Tensor) -> None:
        """The same of a part of a prompt, at once after the call, within `computing`."""


class Forward:
    """A model and the memory that its calls work on. V: vocabulary."""

    def __init__(self, model: Language, berths: Berths):
        self.model, self.berths = model, berths
        self.watcher: Watcher | None = None
        self.packs: Packs = {}
        self.steps: dict[tuple[int, int], Step] = {}
        self.seen: list[Tensor] = []  # by the watcher, of the latest step

    def forget(self) -> None:
        """What was packed and recorded of the weights."""
        self.packs.clear()
        self.steps.clear()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A model in training is in evaluation mode inside; matrices are packed once."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with packed_once(self.packs):
                yield
        finally:
            if training:
                self.model.train()

    @torch.inference_mode()
    def read(
        self, tokens: Sequence[int], berth: Berth, *, last: bool, watch: Callable[[int, Tensor], None] | None = None
    ) -> Tensor | None:
        """The berth holds these tokens too. With `last`, where its prompt ends: the logits (1, V) of the next one.

        watch(at, logits_RV): told those after every token, from the one at place `at` of the prompt on."""
        if berth.awake is None:
            berth.awake = self.berths.waking(berth)
        part_BT = torch.tensor([tokens], device=self.berths.device)
        with self.computing():
            point(berth.awake, [berth], len(tokens))
            hidden_BTD, seen = self.hidden(part_BT, berth.awake)
            if self.watcher is not None:
                self.watcher.read(berth, part_BT, side_by_side(seen))
            at, berth.length = berth.length, berth.length + len(tokens)
            if watch is not None:
                for part_BTD in hidden_BTD.split(rows_for(ELEMENTS, self.model.config.vocab), dim=1):
                    watch(at, self.model.head(part_BTD)[0])
                    at += part_BTD.shape[1]
            if not last:
                return None
            self.berths.rest(berth, berth.awake)
            berth.awake = None
            return self.model.head(hidden_BTD[:, -1:])[:, 0]

    def hidden(self, tokens_BT: Tensor, lanes: Lanes) -> tuple[Tensor, list[Tensor]]:
        """The final hidden states, and what the watcher wants to see, of all tokens in a row: (N, D) for each tap."""
        seen: list[Tensor] = []
        layers = self.watcher.taps if self.watcher is not None else ()
        tap: Tap = lambda layer, x_BTD: seen.append(x_BTD) if layer in layers else None  # noqa: E731
        hidden_BTD, _ = self.model.hidden(tokens_BT, state=lanes, taps=[tap] if layers else ())
        return hidden_BTD, [x_BTD.flatten(0, 1) for x_BTD in seen or [hidden_BTD]]

    def step(self, berths: list[Berth], tokens: Sequence[int]) -> Tensor:
        """The logits (B, V) after one more token in each berth."""
        logits_BV = self.run(berths, tokens, 1)
        self.told(berths, [1] * len(berths), [1] * len(berths))
        for berth in berths:
            berth.length += 1
        return logits_BV

    def told(self, berths: Sequence[Berth], tried: Sequence[int], counts: Sequence[int]) -> None:
        """The watcher sees what came of the first so many of the tokens that were tried in each berth."""
        if self.watcher is None:
            return
        at, seen_ND = 0, side_by_side(self.seen)
        for berth, size, count in zip(berths, tried, counts, strict=True):
            if count:
                self.watcher.see(berth, seen_ND[at : at + count])
            at += size

    def attempt(self, berth: Berth, tokens: Sequence[int]) -> Tensor:
        """The logits (T, V) after each of these tokens; `accept` then says how many of them stay."""
        return self.run([berth], [tokens], len(tokens))

    def accept(self, berth: Berth, tried: int, count: int) -> None:
        accept(self.steps[1, tried].lanes, [berth], [count])
        self.told([berth], [tried], [count])

    def run(self, berths: list[Berth], tokens: Sequence, time: int) -> Tensor:
        sizes = len(berths), time
        if sizes not in self.steps:
            self.steps[sizes] = Step(self, *sizes)
        step = self.steps[sizes]
        step.point(berths, tokens)
        logits_BV, self.seen = step.recorded.run()
        return logits_BV


class Step:
    """So many more tokens for so many rows; where there are several, not all need stay."""

    def __init__(self, forward: Forward, rows: int, time: int):
        self.forward, self.time = forward, time
        self.lanes = forward.berths.lanes(rows, tentative=time > 1)
        self.berths: list[Berth] = []  # that it was told of last, and of how many pages each
        self.pages: list[int] = []
        self.tokens_BT = torch.zeros(rows, time, dtype=torch.int64, device=forward.berths.device)
        tokens_BT = self.tokens_BT if time > 1 else self.tokens_BT[:, 0]
        self.tokens, self.lengths = plain(tokens_BT), plain(self.lanes.rows.length)
        rows_in = self.lanes.rows
        inputs = [self.tokens_BT, self.lanes.slot_B, rows_in.begin, rows_in.length, rows_in.table_BL]
        self.recorded = Recorded(self.compute, inputs)

    def point(self, berths: list[Berth], tokens: Sequence) -> None:
        """Only what changed is written."""
        if berths != self.berths:
            write(self.lanes.slot_B, [berth.slot for berth in berths])
            point(self.lanes, berths, self.time)
            self.berths, self.pages = list(berths), [len(berth.pages) for berth in berths]
        write(self.tokens, tokens)
        write(self.lengths, [berth.length + self.time for berth in berths])
        for row, berth in enumerate(berths):
            if len(berth.pages) != self.pages[row]:
                write(self.lanes.rows.table_BL[row, : len(berth.pages)], berth.pages)
                self.pages[row] = len(berth.pages)

    @torch.inference_mode()
    def compute(self) -> tuple[Tensor, list[Tensor]]:
        with self.forward.computing():
            hidden_BTD, seen = self.forward.hidden(self.tokens_BT, self.lanes)
            return self.forward.model.head(hidden_BTD).flatten(0, 1), seen


def side_by_side(seen: list[Tensor]) -> Tensor:
    return seen[0] if len(seen) == 1 else torch.cat(seen, -1)
