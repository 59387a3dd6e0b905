"""Rows of several lengths in one training: whole updates of one length by turns, or all lengths in every update.

Both keep the tokens of an update constant. By turns is how Super and Ultra went on with rows of a million tokens, all
in every update how Nano did (arXiv 2512.20848, 2604.12374, 2606.15007).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nautilus.data.batch import Batch
from nautilus.data.blend import Blend
from nautilus.data.mix import Mix, Phase, Stream
from nautilus.runtime import UserError

MIXINGS = ("turns", "together")
ENDLESS = 1 << 40  # steps, of which only the source is drawn


class Turns:
    """Steps from several streams, each with a share of them.

    turns: step n is a step of one stream, by a low-discrepancy draw that depends on (n, seed) alone.
    together: every step has the micro-batches of a step of each.
    """

    def __init__(self, streams: Sequence[Stream], mix: Mix, *, mixing: str):
        self.streams, self.mix, self.mixing, self.given = list(streams), mix, mixing, 0

    def __iter__(self) -> Turns:
        return self

    def __next__(self) -> list[Batch]:
        turn = int(self.mix.places(self.given, self.given + 1)[0].source)
        self.given += 1
        if self.mixing == "turns":
            return next(self.streams[turn])
        return [batch for stream in self.streams for batch in next(stream)]

    def state(self) -> dict:
        return {"given": self.given, "mixing": self.mixing, "streams": [stream.state() for stream in self.streams]}

    def restore(self, state: Mapping) -> None:
        streams = state.get("streams")
        if not isinstance(streams, list) or len(streams) != len(self.streams) or state.get("mixing") != self.mixing:
            raise UserError(
                f"the run was saved with other lengths than {len(self.streams)} by mixing={self.mixing}; resume with "
                f"the same lengths and mixing, or start a new run"
            )
        for stream, own in zip(self.streams, streams, strict=True):
            stream.restore(own)
        self.given = state["given"]


def parse_lengths(lengths: Sequence[str]) -> list[tuple[float, int]]:
    """`0.92*65536` → (0.92, 65536); a length alone has share 1."""
    found = []
    for text in lengths:
        share, star, length = text.rpartition("*")
        try:
            pair = float(share) if star else 1.0, int(length)
        except ValueError:
            pair = 0.0, 0
        if not (0 < pair[0] < float("inf") and pair[1] >= 2):
            raise ValueError(f"lengths={text!r} is not of the form share*tokens, such as 0.9*65536")
        found.append(pair)
    return found


def check_lengths(lengths: Sequence[str], mixing: str) -> None:
    """A ValueError for what `rows_of_lengths` cannot do with any rows."""
    parse_lengths(lengths)
    if mixing not in MIXINGS:
        raise ValueError(f"mixing={mixing!r} is unknown; have {', '.join(MIXINGS)}")


def rows_of_lengths(
    stream: Callable[..., Stream],
    lengths: Sequence[str],
    *,
    mixing: str,
    length: int,
    rows: int,
    micro: int,
    seed: int,
    blend: Blend | None = None,
    steps: int = 0,
) -> Stream | Turns:
    """The stream of rows of `length`, or of `lengths` at as many tokens an update and a micro-batch.

    stream: makes one from `length`, `rows` (of an update), `micro` (rows of a micro-batch) and `phases` in its rows.
    blend: shares of sources; its borders lie where the run of `steps` updates has seen their tokens, in every length.
    """
    check_lengths(lengths, mixing)
    if not lengths:
        phases = () if blend is None else blend.rows(length=length, total=steps * rows)
        return stream(length=length, rows=rows, micro=micro, phases=phases)
    parts = parse_lengths(lengths)
    sizes = sizes_of(parts, mixing, rows * length)
    mix = Mix({str(i): (share, ENDLESS) for i, (share, _) in enumerate(parts)}, seed)
    phases = [()] * len(sizes) if blend is None else Course(mix, sizes, mixing).phases(blend, steps)
    streams = [
        stream(length=own, rows=count, micro=max(1, micro * length // own), phases=mine)
        for (own, count), mine in zip(sizes, phases, strict=True)
    ]
    return Turns(streams, mix, mixing=mixing)


def sizes_of(parts: Sequence[tuple[float, int]], mixing: str, tokens: int) -> list[tuple[int, int]]:
    """(length, rows of a step) of each part of steps of so many tokens."""
    whole, found = sum(share for share, _ in parts), []
    for share, own in parts:
        mine = tokens if mixing == "turns" else tokens * share / whole
        if mine < own:
            raise UserError(
                f"lengths={share:g}*{own} does not fit: an update has rows*length={tokens:,} tokens"
                f"{'' if mixing == 'turns' else f', {mine:,.0f} of them of this length'}; raise rows or lower it"
            )
        found.append((own, round(mine / own)))
    return found


@dataclass(frozen=True)
class Course:
    """How far each of several streams is after a number of steps. sizes: (row length, rows of a step) of each."""

    mix: Mix
    sizes: Sequence[tuple[int, int]]
    mixing: str

    def given(self, steps: int) -> list[int]:
        """How many of the first `steps` steps each stream had a part in."""
        if self.mixing == "together":
            return [steps] * len(self.sizes)
        counts = self.mix.counts(steps)
        return [counts[str(i)] for i in range(len(self.sizes))]

    def tokens(self, steps: int) -> int:
        return sum(n * length * rows for n, (length, rows) in zip(self.given(steps), self.sizes, strict=True))

    def row(self, stream: int, tokens: float) -> int:
        """How many rows a stream has given when so many tokens of all were seen; inside a step rows go evenly."""
        step = bisect.bisect_right(range(ENDLESS), tokens, key=self.tokens) - 1
        begin, end = self.tokens(step), self.tokens(step + 1)
        before, after = self.given(step)[stream], self.given(step + 1)[stream]
        return round((before + (after - before) * (tokens - begin) / (end - begin)) * self.sizes[stream][1])

    def phases(self, blend: Blend, steps: int) -> list[tuple[Phase, ...]]:
        """The blend's phases in the rows of each stream, in a run of so many steps."""
        return blend.rows_of_several(
            [partial(self.row, stream) for stream in range(len(self.sizes))], tokens=self.tokens(steps)
        )
