"""The model at work for an engine: prompts are read in chunks, and every step adds one token to each running request.

What a step of so many requests does is recorded the first time and replayed from then on, where all of it is native.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nautilus.model.language import Language
from nautilus.ops.cpu.tape import CannotRecord, Tape, record
from nautilus.ops.linear import Packs, packed_once
from nautilus.ops.loss import ELEMENTS, rows_for
from nautilus.serve.memory import Berth, Berths, accept, plain, point, write

log = logging.getLogger("nautilus.serve")


class Forward:
    """A model and the memory that its calls work on. V: vocabulary."""

    def __init__(self, model: Language, berths: Berths):
        self.model, self.berths = model, berths
        self.packs: Packs = {}
        self.steps: dict[tuple[int, int], Step] = {}

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
            hidden_BTD, _ = self.model.hidden(part_BT, state=berth.awake)
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

    def step(self, berths: list[Berth], tokens: Sequence[int]) -> Tensor:
        """The logits (B, V) after one more token in each berth."""
        logits_BV = self.run(berths, tokens, 1)
        for berth in berths:
            berth.length += 1
        return logits_BV

    def attempt(self, berth: Berth, tokens: Sequence[int]) -> Tensor:
        """The logits (T, V) after each of these tokens; `accept` then says how many of them stay."""
        return self.run([berth], [tokens], len(tokens))

    def accept(self, berth: Berth, tried: int, count: int) -> None:
        accept(self.steps[1, tried].lanes, [berth], [count])

    def run(self, berths: list[Berth], tokens: Sequence, time: int) -> Tensor:
        sizes = len(berths), time
        if sizes not in self.steps:
            self.steps[sizes] = Step(self, *sizes)
        step = self.steps[sizes]
        step.point(berths, tokens)
        return step.run()


class Step:
    """So many more tokens for so many rows; where there are several, not all need stay. The first run computes, the
    second is recorded, later ones are replays.

    A replay has just read all weights, so nothing of Python is in the cache any more and every object it touches waits
    for memory: what runs at every step is as little as can be."""

    def __init__(self, forward: Forward, rows: int, time: int):
        self.forward, self.time = forward, time
        self.lanes = forward.berths.lanes(rows, tentative=time > 1)
        self.berths: list[Berth] = []  # that it was told of last, and of how many pages each
        self.pages: list[int] = []
        self.tokens_BT = torch.zeros(rows, time, dtype=torch.int64, device=forward.berths.device)
        tokens_BT = self.tokens_BT if time > 1 else self.tokens_BT[:, 0]
        self.tokens, self.lengths = plain(tokens_BT), plain(self.lanes.rows.length)
        self.tape: Tape | None = None
        self.may_record = self.tokens_BT.device.type == "cpu"
        self.warm = False

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

    def run(self) -> Tensor:
        if self.tape is not None:
            return self.tape.replay()
        if not (self.warm and self.may_record):
            self.warm = True
            return self.compute()
        rows = self.lanes.rows
        try:
            inputs = [self.tokens_BT, self.lanes.slot_B, rows.begin, rows.length, rows.table_BL]
            self.tape = record(self.compute, inputs)
            return self.tape.result
        except CannotRecord as reason:
            log.info("steps are not replayed, because %s", reason)
            self.may_record = False
            return self.compute()

    @torch.inference_mode()
    def compute(self) -> Tensor:
        with self.forward.computing():
            hidden_BTD, _ = self.forward.model.hidden(self.tokens_BT, state=self.lanes)
            return self.forward.model.head(hidden_BTD).flatten(0, 1)
