"""The model at work for an engine: prompts are read in chunks, and every step adds one token to each running request.

What a step of so many requests does is recorded the first time and replayed from then on, where all of it is native.
Numbers of requests that seldom come take the record of some more: the others of its tokens go where nobody reads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nautilus.model.lanes import Lanes, plain
from nautilus.model.language import Language
from nautilus.ops.linear import Packs, packed_once
from nautilus.ops.loss import ELEMENTS, rows_for
from nautilus.ops.peak import peak
from nautilus.serve.memory import Berth, Berths, accept, point, share_out, write
from nautilus.serve.recorded import Recorded
from nautilus.serve.sample import Logits
from nautilus.serve.seen import Raw, raw

OFTEN = 16  # steps of a number of requests after which it has a record of its own
TRIED = 512  # most tokens of all recorded attempts together: each keeps the memory of its activations and logits


class Watcher(Protocol):
    """Wants to see what the model makes of every token that stays: what left the layers `taps`, or, where it names
    none, the final hidden states."""

    taps: tuple[int, ...]

    def see(self, berth: Berth, step: Step, begin: int, count: int) -> None:
        """So many tokens of a step, from this one on, stay in the berth."""

    def read(self, berth: Berth, tokens_1N: Tensor, seen_ND: Tensor) -> None:
        """The same of a part of a prompt, at once after the call, within `computing`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Tokens of a prompt, to be read into its berth. last: it ends with them, and is answered; watch(at, logits_RV):
    told the logits after every token, from the one at place `at` of the prompt on."""

    tokens: Sequence[int]
    berth: Berth
    last: bool
    watch: Callable[[int, Tensor], None] | None = None


class Forward:
    """A model and the memory that its calls work on. B rows, N tokens of all of them, V vocabulary.

    steps: plain ones by their number of rows. attempts: by rows and tokens, those of late; however the tokens are dealt
    out to the rows, it is the same one. latest: of both; tried: that of which nobody has said yet what stays."""

    def __init__(self, model: Language, berths: Berths):
        self.model, self.berths = model, berths
        self.watcher: Watcher | None = None
        self.packs: Packs = {}
        self.steps: dict[int, Step] = {}
        self.asked = Counter[int]()  # steps, by the number of requests
        self.attempts: OrderedDict[tuple[int, int], Step] = OrderedDict()
        self.latest: Step | None = None
        self.tried: Step | None = None
        self.version = 0  # how often the weights have changed

    def forget(self) -> None:
        """What was packed and recorded of the weights."""
        self.version += 1
        self.packs.clear()
        self.steps.clear()
        self.asked.clear()
        self.attempts.clear()

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
    def read(self, parts: Sequence[Part]) -> Tensor | None:
        """The berths hold these tokens too. The logits (B, V) of the next one of each of them whose prompt ends."""
        berths, counts = [part.berth for part in parts], [len(part.tokens) for part in parts]
        lanes = self.berths.reading(berths)
        tokens_1N = torch.tensor([[*itertools.chain.from_iterable(part.tokens for part in parts)]])
        tokens_1N = tokens_1N.to(self.berths.device)
        with self.computing():
            point(lanes, berths, counts)
            hidden_1ND, seen = self.hidden(tokens_1N, lanes)
            whole_ND, end, ends = side_by_side(seen), 0, list[int]()
            for part, count in zip(parts, counts, strict=True):
                begin, end = end, end + count
                if self.watcher is not None:
                    self.watcher.read(part.berth, tokens_1N[:, begin:end], whole_ND[begin:end])
                at, part.berth.length = part.berth.length, part.berth.length + count
                if part.watch is not None:
                    self.show(hidden_1ND[:, begin:end], at, part.watch)
                if part.last:
                    self.berths.rest(part.berth)
                    ends.append(end - 1)
                elif part.berth.awake is None:
                    part.berth.awake = self.berths.waking(part.berth)
            return self.model.head(hidden_1ND[:, ends])[0] if ends else None

    def show(self, hidden_1ND: Tensor, at: int, watch: Callable[[int, Tensor], None]) -> None:
        for part_1ND in hidden_1ND.split(rows_for(ELEMENTS, self.model.config.vocab), dim=1):
            watch(at, self.model.head(part_1ND)[0])
            at += part_1ND.shape[1]

    def hidden(self, tokens_BT: Tensor, lanes: Lanes) -> tuple[Tensor, list[Tensor]]:
        """The final hidden states, and what the watcher wants to see, of all tokens in a row: (N, D) for each tap."""
        if self.watcher is None or not self.watcher.taps:
            hidden_BTD, _ = self.model.hidden(tokens_BT, state=lanes)
            return hidden_BTD, [hidden_BTD.flatten(0, 1)]
        left: dict[int, Tensor] = {}
        hidden_BTD, _ = self.model.hidden(tokens_BT, state=lanes, taps=[left.__setitem__])
        return hidden_BTD, [left[layer].flatten(0, 1) for layer in self.watcher.taps]

    def step(self, berths: list[Berth], tokens: Sequence[int]) -> Tensor:
        """The logits (B, V) after one more token in each berth."""
        rows, step = len(berths), self.fitting(len(berths))
        over, step.own = len(step.tokens) - rows, rows
        counts = [*[1] * rows, over, *[0] * over][: len(step.tokens)]
        self.run(step, [*berths, *[self.berths.spare] * over], [*tokens, *[0] * over], counts)
        self.tell(step, [1] * rows)
        for berth in berths:
            berth.length += 1
        return step.logits_NV[:rows]

    def fitting(self, rows: int) -> Step:
        """Of so many requests, or of some more."""
        self.asked[rows] += 1
        some = rows in self.steps or self.asked[rows] > OFTEN or not self.berths.roomy
        size = rows if some else rounded(rows)
        if size not in self.steps:
            self.steps[size] = Step(self, size, size)
        return self.steps[size]

    def attempt(self, berths: list[Berth], tokens: Sequence[Sequence[int]]) -> Tensor:
        """The logits (N, V) after each of these tokens, of one or more for each berth, one berth's after the other's.
        `accept` then says how many of them stay. ValueError for more of a berth than there is a window for."""
        counts, self.tried = [len(some) for some in tokens], None
        sizes = len(berths), sum(counts)
        if sizes not in self.attempts:
            while self.attempts and sum(known for _, known in self.attempts) + sizes[1] > TRIED:
                self.attempts.popitem(last=False)
            self.attempts[sizes] = Step(self, *sizes, tentative=True)
        self.attempts.move_to_end(sizes)
        step = self.attempts[sizes]
        logits_NV = self.run(step, berths, [*itertools.chain.from_iterable(tokens)], counts)
        self.tried = step
        return logits_NV

    def accept(self, berths: list[Berth], counts: Sequence[int]) -> None:
        """Of what was tried in these berths so many tokens stay in each, from none to all. ValueError for more than
        that, and where the last attempt was another one."""
        if self.tried is None or self.tried.berths != berths:
            raise ValueError(
                f"tokens of {len(berths)} berths were accepted, which were not tried last; after each attempt accept"
                " once, in the same berths"
            )
        accept(self.tried.lanes, berths, counts)
        self.tell(self.tried, counts)
        self.tried = None

    def run(self, step: Step, berths: list[Berth], tokens: Sequence[int], counts: list[int]) -> Tensor:
        step.point(berths, tokens, counts)
        step.run()
        self.latest = step
        return step.logits_NV

    def looked_at(self) -> list[Logits]:
        """What a draw needs of each row of logits that the latest step or attempt gave, until the next one."""
        assert self.latest is not None
        return self.latest.looked_at()[: self.latest.own]

    def tell(self, step: Step, counts: Sequence[int]) -> None:
        """The watcher sees what came of the first so many of each berth's tokens."""
        if self.watcher is None:
            return
        at = 0
        for berth, size, count in zip(step.berths, step.counts, counts, strict=False):  # of spare berths nothing
            if count:
                self.watcher.see(berth, step, at, count)
            at += size


class Step:
    """So many more tokens for so many rows, which may be `tentative`. seen: by the watcher, of the latest run; raw: the
    same memory, see `seen.py`."""

    def __init__(self, forward: Forward, rows: int, tokens: int, *, tentative: bool = False):
        self.forward = forward
        self.lanes = forward.berths.lanes(rows, tentative=tentative)
        self.berths: list[Berth] = []  # that it was told of last, of how many pages and new tokens each
        self.pages: list[int] = []
        self.counts: list[int] = []
        self.own = tokens  # of them are not spare
        self.tokens_1N = torch.zeros(1, tokens, dtype=torch.int64, device=forward.berths.device)
        self.tokens, self.lengths = plain(self.tokens_1N[0]), plain(self.lanes.rows.length)
        rows_in = self.lanes.rows
        inputs = [self.tokens_1N, self.lanes.slot_B, rows_in.begin, rows_in.length, rows_in.table_BL]
        self.recorded, self.seen, self.raw = Recorded(self.compute, inputs), list[Tensor](), list[Raw]()
        self.logits_NV, self.rows, self.peaks = torch.empty(0), list[Tensor](), list[Tensor | np.ndarray]()

    def point(self, berths: list[Berth], tokens: Sequence[int], counts: list[int]) -> None:
        """Only what changed is written."""
        if berths != self.berths:
            write(self.lanes.slot_B, [berth.slot for berth in berths])
            point(self.lanes, berths, counts)
            self.berths, self.pages = list(berths), [len(berth.pages) for berth in berths]
        elif counts != self.counts:
            share_out(self.lanes, counts)
        self.counts = counts
        write(self.tokens, tokens)
        write(self.lengths, [berth.length + count for berth, count in zip(berths, counts, strict=True)])
        for row, berth in enumerate(berths):
            if len(berth.pages) != self.pages[row]:
                write(self.lanes.rows.table_BL[row, : len(berth.pages)], berth.pages)
                self.pages[row] = len(berth.pages)

    def run(self) -> None:
        logits_NV, seen, peaks = self.recorded.run()
        if logits_NV is self.logits_NV:  # of a replay all are the same, with new contents
            return
        self.logits_NV, self.rows = logits_NV, [*logits_NV.cpu().unbind()]
        self.seen, self.raw = seen, [raw(part_ND) for part_ND in seen]
        self.peaks = [*map(plain, peaks)]

    def looked_at(self) -> list[Logits]:
        best, total = (part.tolist() for part in self.peaks)
        return [*map(Logits, self.rows, best, total)]

    @torch.inference_mode()
    def compute(self) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]:
        with self.forward.computing():
            hidden_1ND, seen = self.forward.hidden(self.tokens_1N, self.lanes)
            logits_NV = self.forward.model.head(hidden_1ND)[0]
            return logits_NV, seen, peak(logits_NV)


def rounded(rows: int) -> int:
    """The next number for which a step is recorded."""
    by = 1 if rows <= 4 else 4 if rows <= 16 else 8 if rows <= 64 else 16
    return -(-rows // by) * by


def side_by_side(seen: list[Tensor]) -> Tensor:
    return seen[0] if len(seen) == 1 else torch.cat(seen, -1)
