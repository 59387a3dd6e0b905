"""Paired differences and their t-intervals. A pair is two runs of one seed: same text in the same order, same initial
weights where shapes allow, so that what the seed does to both is not taken for a difference between them.

    difference = mean of d_s,    d_s = variant_s - control_s,    half width = t_(n-1) sd(d) / sqrt(n)

One pair has a difference but no interval. With two the 95 % interval is 12.7 standard errors wide to either side, with
three 4.30, with five 2.78.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Over the seeds that both have. `half` is nan for fewer than two of them, `mean` where there is none."""

    by_seed: Mapping[int, float]
    mean: float
    half: float
    control: float  # mean of the control over the same seeds

    @property
    def percent(self) -> float:
        return 100 * self.mean / self.control if self.control else math.nan

    @property
    def verdict(self) -> str:
        """What may be said: lower, higher, or that noise would do as much."""
        if math.isnan(self.half):
            return "no interval" if self.by_seed else "no pair"
        if abs(self.mean) <= self.half:
            return "inside noise"
        return "lower" if self.mean < 0 else "higher"


def paired(variant: Mapping[int, float], control: Mapping[int, float], level: float = LEVEL) -> Difference:
    """variant - control over the seeds of both, with the half width of its two-sided t-interval."""
    seeds = sorted(variant.keys() & control.keys())
    found = {seed: variant[seed] - control[seed] for seed in seeds}
    values, half = [*found.values()], math.nan
    if len(values) > 1:
        half = t_quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values) if values else math.nan
    return Difference(
        by_seed=found,
        mean=mean,
        half=half,
        control=statistics.fmean(control[seed] for seed in seeds) if seeds else math.nan,
    )


def t_quantile(level: float, freedom: int) -> float:
    """t with P(|T| <= t) = level under Student's distribution; by bisection, to about 1e-12."""
    if not 0 < level < 1 or freedom < 1:
        raise ValueError(
            f"a t-interval of level={level} with freedom={freedom}: the level lies in (0, 1), freedom >= 1"
        )
    low, high = 0.0, 1.0
    while t_within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return high


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t), in closed form (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
