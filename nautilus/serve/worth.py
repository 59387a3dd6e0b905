"""What was saved after a prefix, and what it is worth: which entry goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nautilus.serve.prefix import Node

MIB = 1 << 20
ALPHA = 1.5


@dataclass(kw_only=True, eq=False)
class Entry:
    """What was saved after the tokens of its place in the tree: in memory (`here`), in a file, or both."""

    seconds: float  # of prefill that it saves
    bytes: int  # of memory that its states and tokens take while it is here
    count: int  # of its pages, also while it is not here
    here: bool = False
    pages: list[int] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)
    file: str | None = None
    used: int = 0  # when, counted in uses
    locks: int = 0
    place: Node[Entry] = field(init=False)

    @property
    def length(self) -> int:
        return self.place.depth

    @property
    def shorter(self) -> Entry | None:
        """The longest one whose tokens these continue."""
        place = self.place.shorter()
        return place.entry if place else None


def worth(entries: Sequence[Entry], *, alpha: float, page_bytes: int) -> list[float]:
    """What each is worth, compared with the others; the least goes first.

        worth = age + alpha * value
        age = rank by last use, from 0 for the one unused the longest to 1 for the newest
        value = rank by seconds of prefill saved per MiB, from 0 to 1

    Seconds and MiB are what an entry adds to the next shorter one that its tokens continue: the prefill in between, its
    states, the pages in between. So a state half-way is worth more once its neighbours have gone. Ranks have no unit:
    they mean the same for any model on any machine, and one outlier does not hide the rest. Marconi (arXiv 2411.19379)
    adds recency and FLOPs saved per byte in this way.
    """
    age = ranks([entry.used for entry in entries])
    value = ranks([seconds_per_mib(entry, page_bytes) for entry in entries])
    return [a + alpha * v for a, v in zip(age, value, strict=True)]


def seconds_per_mib(entry: Entry, page_bytes: int) -> float:
    seconds, pages, shorter = entry.seconds, entry.count, entry.shorter
    if shorter is not None:
        seconds, pages = seconds - shorter.seconds, pages - shorter.count
    return max(0.0, seconds) / (max(1, entry.bytes + pages * page_bytes) / MIB)


def ranks(values: Sequence[float]) -> list[float]:
    """0 for the least, 1 for the largest, equal ones alike."""
    place = {value: number for number, value in enumerate(sorted(set(values)))}
    return [place[value] / max(1, len(place) - 1) for value in values]
