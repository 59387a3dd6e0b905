"""What a task saw, dropped and changed: numbers that add up, and a few examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

EXAMPLES = 3  # of each reason, the first ones in the order of the tasks
SHOWN = 240  # characters of an example


@dataclass(kw_only=True)
class Tally:
    """`dropped[stage][reason]` is [documents, bytes]; `examples` has (name, beginning) of some of them."""

    documents: int = 0
    bytes: int = 0
    edited: int = 0
    edited_bytes: int = 0
    dropped: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)

    def see(self, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode())

    def edit(self, fewer: int) -> None:
        """A document stays, `fewer` bytes shorter."""
        self.edited += fewer > 0
        self.edited_bytes += fewer

    def drop(self, stage: str, reason: str, name: str, text: str, *, shown: str = "") -> None:
        """A document goes; `shown` is what an example shows in place of its beginning."""
        count = self.dropped.setdefault(stage, {}).setdefault(reason, [0, 0])
        count[0] += 1
        count[1] += len(text.encode())
        examples = self.examples.setdefault(stage, {}).setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append([name, (shown or text)[:SHOWN]])

    def total(self, stage: str) -> tuple[int, int]:
        """(documents, bytes) that a stage dropped."""
        counts = self.dropped.get(stage, {}).values()
        return sum(count for count, _ in counts), sum(size for _, size in counts)


def together(tallies: Iterable[Tally]) -> Tally:
    """The sum, with the first examples."""
    whole = Tally()
    for tally in tallies:
        for name in ("documents", "bytes", "edited", "edited_bytes"):
            setattr(whole, name, getattr(whole, name) + getattr(tally, name))
        for stage, reasons in tally.dropped.items():
            for reason, (count, size) in reasons.items():
                sums = whole.dropped.setdefault(stage, {}).setdefault(reason, [0, 0])
                sums[0], sums[1] = sums[0] + count, sums[1] + size
                shown = whole.examples.setdefault(stage, {}).setdefault(reason, [])
                shown += tally.examples[stage][reason][: EXAMPLES - len(shown)]
    return whole
