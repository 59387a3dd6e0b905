"""Weighted mixing that can stop and go on anywhere, because which row comes next is a pure function.

    row(index, seed) = (source, its pass over that source, row within the source)

The source is a low-discrepancy draw: the points frac(offset + index * golden ratio) fill [0, 1) evenly, each source
owns an interval as long as its weight, and after any number of draws every source has had its share up to a few rows.
How many draws a source had before `index` is a sum that Euclid's algorithm gives at once, so nothing is replayed.
Within a source each pass is a seeded permutation of its rows. So the state of a stream is how many rows it has given,
and nothing of it depends on the number of ranks.

Weights may change at given rows: each phase draws from the same points by edges of its own, and a source goes on in its
pass where the phase before left it. A border is a row number, so it too holds wherever and however wide one starts.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nautilus.data.batch import Batch, join
from nautilus.runtime import UserError

CIRCLE = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15  # CIRCLE / golden ratio, odd


class Rows(Protocol):
    """Numbered rows of one length: shards, or a packed Batch."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Batch: ...


class Place(NamedTuple):
    source: str
    epoch: int
    row: int


class Phase(NamedTuple):
    """From row `start` on, sources are drawn by these weights; one that is not named is not drawn."""

    start: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Mix:
    """The pure function: sources by name with (weight, rows), and a seed. `later` are the phases after the first."""

    sources: Mapping[str, tuple[float, int]]
    seed: int
    later: tuple[Phase, ...] = ()

    def __post_init__(self):
        if not self.sources:
            raise UserError("a mixture of no sources; name at least one")
        for name, (weight, rows) in self.sources.items():
            weights = [weight, *(phase.weights.get(name, 0) for phase in self.later)]
            if not all(0 <= each < float("inf") for each in weights) or not any(weights) or rows < 1:
                raise UserError(
                    f"source {name!r} has weight {', then '.join(map(str, weights))} and {rows} rows; weights must be"
                    " finite, one of them and the rows positive"
                )
        for before, phase in itertools.pairwise(self.phases):
            if phase.start <= before.start or not set(phase.weights) <= set(self.sources):
                raise UserError(
                    f"the phase from row {phase.start} on draws from {sorted(phase.weights)}; it must begin after row"
                    f" {before.start} and name only {self.names}"
                )
        if not all(any(phase.weights.values()) for phase in self.phases):
            raise UserError("a phase gives weight to no source; give it to at least one")

    @property
    def names(self) -> list[str]:
        return sorted(self.sources)

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        return Phase(0, {name: weight for name, (weight, _) in self.sources.items()}), *self.later

    @functools.cached_property
    def edges(self) -> list[list[int]]:
        """By phase, where each source's interval ends on the circle, as whole numbers; the last is the whole circle."""
        found = []
        for phase in self.phases:
            ends = [*itertools.accumulate(phase.weights.get(name, 0.0) for name in self.names)]
            found.append([*(round(end / ends[-1] * CIRCLE) for end in ends[:-1]), CIRCLE])
        return found

    @property
    def offset(self) -> int:
        return number_of("mix", self.seed)

    def counts(self, index: int) -> dict[str, int]:
        """How many of the first `index` rows come from each source."""
        counts = dict.fromkeys(self.names, 0)
        stops = [*(phase.start for phase in self.phases[1:]), index]
        for phase, stop, edges in zip(self.phases, stops, self.edges, strict=True):
            first, last = min(phase.start, index), min(stop, index)
            below = [0, *(points_below(e, last, self.offset) - points_below(e, first, self.offset) for e in edges)]
            for name, (low, high) in zip(self.names, itertools.pairwise(below), strict=True):
                counts[name] += high - low
        return counts

    def places(self, start: int, stop: int) -> list[Place]:
        """What the rows start .. stop-1 are."""
        counts, names, offset = self.counts(start), self.names, self.offset
        begins = [phase.start for phase in self.phases]
        found = []
        for index in range(start, stop):
            edges = self.edges[bisect.bisect_right(begins, index) - 1]
            name = names[bisect.bisect_right(edges, (offset + index * GOLDEN) % CIRCLE)]
            rows = self.sources[name][1]
            epoch, position = divmod(counts[name], rows)
            counts[name] += 1
            found.append(Place(name, epoch, shuffled(position, rows, number_of(name, self.seed, epoch))))
        return found


def number_of(*words) -> int:
    """A 64-bit number that depends on these words alone."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest())


def points_below(edge: int, count: int, offset: int) -> int:
    """How many of (offset + j * GOLDEN) mod CIRCLE, j < count, are below edge.

    A point y is below the edge when floor(y / C) exceeds floor((y - edge) / C) by one; both sums are `floor_sum`.
    """
    return count + floor_sum(count, CIRCLE, GOLDEN, offset) - floor_sum(count, CIRCLE, GOLDEN, offset + CIRCLE - edge)


def floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """sum over j < count of floor((start + j * step) / modulus), by Euclid's algorithm on (modulus, step)."""
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (start // modulus)
        step, start = step % modulus, start % modulus
        # What is left counts lattice points under a line of slope below one; turned, its slope is above one.
        count, start = divmod(count * step + start, modulus)
        modulus, step = step, modulus
    return total


def shuffled(position: int, size: int, key: int) -> int:
    """Where a seeded permutation of range(size) sends `position`, without building it.

    A Feistel network permutes the next power of four; walking along its cycle until the value is below `size` makes it
    a permutation of range(size).
    """
    if size == 1:
        return 0
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(6):
            left, right = right, left ^ (scramble(right + (key ^ turn * GOLDEN)) & mask)
        position = left << half | right
        if position < size:
            return position


def scramble(value: int) -> int:
    """Mix all bits of a 64-bit number (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value + GOLDEN) % CIRCLE
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % CIRCLE
    value = (value ^ value >> 27) * 0x94D049BB133111EB % CIRCLE
    return value ^ value >> 31


class Stream:
    """Steps of training data: each `next` is this rank's list of micro-batches.

    `rows` is the number of rows of one step over all ranks, `micro` that of one micro-batch. Ranks take equal slices of
    the same rows, so the rows of step n are the same on any number of ranks. `later` are phases after the first, in
    rows of the stream.
    """

    def __init__(
        self,
        sources: Mapping[str, Rows],
        *,
        rows: int,
        micro: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        later: Sequence[Phase] = (),
        rank: int = 0,
        ranks: int = 1,
    ):
        if rows < 1 or micro < 1 or rows % ranks or not 0 <= rank < ranks:
            raise UserError(
                f"rows={rows} a step in micro-batches of micro={micro} cannot be dealt to rank {rank} of ranks={ranks};"
                " make rows a multiple of ranks"
            )
        weights = weights if weights is not None else {name: len(source) for name, source in sources.items()}
        if set(weights) != set(sources):
            raise UserError(f"weights are for {sorted(weights)} but sources are {sorted(sources)}; name the same ones")
        self.sources = dict(sources)
        self.mix = Mix({name: (weights[name], len(source)) for name, source in self.sources.items()}, seed, (*later,))
        self.rows, self.micro, self.rank, self.ranks = rows, micro, rank, ranks
        self.consumed = 0
        parts = [(name, float(weights[name]), sources[name].fingerprint) for name in sorted(sources)]
        phases = [(phase.start, sorted(phase.weights.items())) for phase in self.mix.later]
        self.fingerprint = hashlib.sha256(repr(parts + phases).encode()).hexdigest()[:16]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> list[Batch]:
        share = self.rows // self.ranks
        start = self.consumed + self.rank * share
        places = self.mix.places(start, start + share)
        self.consumed += self.rows
        taken = [self.sources[place.source].take([place.row]) for place in places]
        return [join(taken[i : i + self.micro]) for i in range(0, share, self.micro)]

    def epochs(self) -> dict[str, float]:
        """How often each source has been passed over so far."""
        return {name: count / self.mix.sources[name][1] for name, count in self.mix.counts(self.consumed).items()}

    def state(self) -> dict:
        return {"consumed": self.consumed, "seed": self.mix.seed, "fingerprint": self.fingerprint}

    def restore(self, state: Mapping) -> None:
        """Go on where `state` was taken, on any number of ranks."""
        own = self.state()
        for name in ("fingerprint", "seed"):
            if state.get(name) != own[name]:
                raise UserError(
                    f"the run was saved with data {name} {state.get(name)} but this stream has {own[name]}; resume "
                    "with the same sources, weights, row length, tokenizer and seed, or start a new run"
                )
        consumed = state.get("consumed")
        if type(consumed) is not int or consumed < 0:
            raise UserError(f"the run was saved after consumed={consumed!r} rows, which is no count; start a new run")
        self.consumed = consumed
