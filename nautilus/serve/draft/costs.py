"""What a pass over some tokens costs, measured on the model that is served."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

LATELY = 0.05  # weight of a new timing in the average of those before


class Costs:
    """Seconds of a pass by its tokens, as last measured: never less for more tokens, between two sizes that are known
    on the line between them, and beyond the largest on the line through the last two."""

    def __init__(self):
        self.seconds: dict[int, float] = {}
        self.line: tuple[list[int], list[float]] | None = None  # sizes and seconds in order, until a timing is added

    def measure(self, sizes: Sequence[int], run: Callable[[int], object], repeats: int = 3) -> None:
        """run(size) is called until it no longer prepares itself: the first call computes, the second is recorded."""
        for size in sorted(sizes):
            timings = []
            for _ in range(2 + repeats):
                begin = time.perf_counter()
                run(size)
                timings.append(time.perf_counter() - begin)
            self.seconds[size] = statistics.median(timings[2:])
        self.line = None

    def add(self, size: int, seconds: float) -> None:
        before = self.seconds.get(size)
        # One timing in a while is of a machine that did something else.
        self.seconds[size] = seconds if before is None else before + LATELY * (min(seconds, 2 * before) - before)
        self.line = None

    def of(self, size: int) -> float | None:
        """None below the smallest that is known, and where that is not two."""
        if self.line is None:
            self.line = rising(self.seconds)
        sizes, seconds = self.line
        at = bisect_left(sizes, size)
        if at < len(sizes) and sizes[at] == size:
            return seconds[at]
        if len(sizes) < 2 or at == 0:
            return None
        less, more = (at - 1, at) if at < len(sizes) else (-2, -1)
        slope = (seconds[more] - seconds[less]) / (sizes[more] - sizes[less])
        return seconds[less] + slope * (size - sizes[less])


def rising(seconds: dict[int, float]) -> tuple[list[int], list[float]]:
    sizes, line, most = sorted(seconds), [], 0.0
    for size in sizes:
        most = max(most, seconds[size])
        line.append(most)
    return sizes, line
