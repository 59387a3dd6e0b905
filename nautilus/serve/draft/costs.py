"""What a pass over some tokens costs, measured on the model that is served."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

PACE, OWN = 0.05, 0.02  # weight of a new timing for all sizes, and for its own
TURNS, LEAST_TURNS, ENOUGH = 9, 3, 1.0  # timings of each size: most of them, fewest, and the seconds that make them few


class Costs:
    """Seconds of a pass by its tokens, as last measured: never less for more tokens, between two sizes that are known
    on the line between them, and beyond the largest on the line through the last two.

    pace: how much longer than measured passes take lately, of whatever size: a machine that others use is slow at all
    of them, and those that were not tried for a while must not look cheap for it.

    What is measured is at the beginning of a text. Of `context` tokens before, in the mean of `rows` requests, a pass
    reads keys and values, which takes it

        context * (each * rows + apiece * tokens)

    seconds more: to read them once for each request, and to compare each of its tokens with them."""

    def __init__(self):
        self.seconds: dict[int, float] = {}
        self.pace = 1.0
        self.rows, self.context, self.each, self.apiece = 1, 0.0, 0.0, 0.0
        self.line: tuple[list[int], list[float]] | None = None  # sizes and seconds in order, until a timing is added

    def measure(self, sizes: Sequence[int], run: Callable[[int], object]) -> None:
        self.seconds |= timed(run, sorted(sizes))
        self.line = None

    def measure_context(self, context: int, size: int, run: Callable[[int], object]) -> None:
        """The same behind so many tokens, of a pass over one token and one over `size`, which were measured before."""
        found = timed(run, (1, size))
        one, many = (max(0.0, seconds - self.seconds[tokens]) / context for tokens, seconds in found.items())
        self.apiece = max(0.0, min(one, (many - one) / (size - 1)))
        self.each = one - self.apiece

    def longer(self, size: int) -> float:
        return self.context * (self.each * self.rows + self.apiece * size)

    def add(self, size: int, seconds: float) -> None:
        before = self.seconds.get(size)
        if before is None:
            self.seconds[size] = max(seconds / self.pace - self.longer(size), 0.1 * seconds / self.pace)
        else:
            # One timing in a while is of a machine that did something else.
            more = min(seconds / (self.pace * (before + self.longer(size))), 2.0) - 1
            self.pace *= 1 + PACE * more
            self.seconds[size] *= 1 + OWN * more
        self.line = None

    def of(self, size: int) -> float | None:
        """None below the smallest that is known, and where that is not two."""
        found = self.measured(size)
        return None if found is None else self.pace * (found + self.longer(size))

    def measured(self, size: int) -> float | None:
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


def timed(run: Callable[[int], object], sizes: Sequence[int]) -> dict[int, float]:
    """Median seconds of run(size), which is called twice before: the first call computes, the second is recorded. Sizes
    take turns, so that what else the machine does meets all alike, and nothing but weights is in the caches."""
    for size in sizes:
        run(size)
        run(size)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    start = time.perf_counter()
    for done in range(TURNS):
        if done >= LEAST_TURNS and time.perf_counter() - start > ENOUGH:
            break
        for size in sizes:
            begin = time.perf_counter()
            run(size)
            found[size].append(time.perf_counter() - begin)
    return {size: statistics.median(timings) for size, timings in found.items()}


def rising(seconds: dict[int, float]) -> tuple[list[int], list[float]]:
    sizes, line, most = sorted(seconds), [], 0.0
    for size in sizes:
        most = max(most, seconds[size])
        line.append(most)
    return sizes, line
