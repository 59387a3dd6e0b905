"""What a pass over some tokens costs, measured on the model that is served."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

LATELY = 0.05  # weight of a new timing in the average of those before


class Costs:
    """Seconds of a pass by tokens or rows, as last measured; between two that are known, on the line between them."""

    def __init__(self):
        self.seconds: dict[int, float] = {}

    def measure(self, sizes: Sequence[int], run: Callable[[int], object], repeats: int = 3) -> None:
        """run(size) is called until it no longer prepares itself: the first call computes, the second is recorded."""
        known = 0.0
        for size in sorted(sizes):
            timings = []
            for _ in range(2 + repeats):
                begin = time.perf_counter()
                run(size)
                timings.append(time.perf_counter() - begin)
            known = self.seconds[size] = max(known, statistics.median(timings[2:]))  # more tokens are not less work

    def add(self, size: int, seconds: float) -> None:
        before = self.seconds.get(size)
        # One timing in a while is of a machine that did something else.
        self.seconds[size] = seconds if before is None else before + LATELY * (min(seconds, 2 * before) - before)

    def of(self, size: int) -> float | None:
        """None where it lies outside of what is known."""
        if size in self.seconds:
            return self.seconds[size]
        less = max((known for known in self.seconds if known < size), default=None)
        more = min((known for known in self.seconds if known > size), default=None)
        if less is None or more is None:
            return None
        share = (size - less) / (more - less)
        return (1 - share) * self.seconds[less] + share * self.seconds[more]
