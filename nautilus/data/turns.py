"""Rows of several lengths in one training: whole updates of one length by turns, or all lengths in every update.

Both keep the tokens of an update constant. By turns is how Super and Ultra went on with rows of a million tokens, all
in every update how Nano did (arXiv 2512.20848, 2604.12374, 2606.15007).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nautilus.data.batch import Batch
from nautilus.data.mix import Mix, Stream
from nautilus.runtime import UserError

MIXINGS = ("turns", "together")
ENDLESS = 1 << 40  # steps, of which only the source is drawn


class Turns:
    """Steps from several streams, each with a share of them.

    turns: step n is a step of one stream, by a low-discrepancy draw that depends on (n, seed) alone.
    together: every step has the micro-batches of a step of each.
    """

    def __init__(self, streams: Sequence[Stream], shares: Sequence[float], *, mixing: str, seed: int):
        self.streams, self.mixing, self.given = list(streams), mixing, 0
        self.mix = Mix({str(i): (share, ENDLESS) for i, share in enumerate(shares)}, seed)

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
) -> Stream | Turns:
    """The stream of rows of `length`, or of `lengths` at as many tokens an update and a micro-batch.

    stream: makes one from `length`, `rows` (of an update) and `micro` (rows of a micro-batch).
    """
    check_lengths(lengths, mixing)
    if not lengths:
        return stream(length=length, rows=rows, micro=micro)
    parts, tokens = parse_lengths(lengths), rows * length
    whole = sum(share for share, _ in parts)
    streams = []
    for share, own in parts:
        mine = tokens if mixing == "turns" else tokens * share / whole
        if mine < own:
            raise UserError(
                f"lengths={share:g}*{own} does not fit: an update has rows*length={tokens:,} tokens"
                f"{'' if mixing == 'turns' else f', {mine:,.0f} of them of this length'}; raise rows or lower it"
            )
        streams.append(stream(length=own, rows=round(mine / own), micro=max(1, micro * length // own)))
    return Turns(streams, [share for share, _ in parts], mixing=mixing, seed=seed)
