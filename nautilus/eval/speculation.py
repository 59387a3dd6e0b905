"""What speculative decoding brings: the same prompts answered by several arms, and the numbers that follow.

An arm is a way to decode: plain, copied drafts alone, drafts of a model, a rule that chooses between them. Whoever runs
them hands in one `Answered` for each prompt and arm, or several where a run was repeated: then the median time counts.

    speed-up     geometric mean over prompts of rate / rate of `plain`, and its 95 % bootstrap interval over prompts
    gain         of a copied draft: its tokens that come true, each of which saves a pass of the target
    high pay-off a copied draft of which at least 6 tokens come true, as in Hybrid Verified Decoding (arXiv 2606.01019)

A speed-up counts prompts only whose answers were compared with the plain ones and are the same: faster and wrong is not
faster.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from nautilus.runtime.progress import finite

PLAIN, ORACLE, ALL = "plain", "oracle", "all"
HIGH = 6  # tokens of a draft that come true: high pay-off
DRAWS = 2000  # of the bootstrap
WIDTHS = {"1": 1, "2": 2, "3-4": 4, "5-8": 8, "9-16": 16, "17-32": 32, "33-": 1 << 30}  # tokens of a pass, at most
BEST = (0.01, 0.05, 0.1, 0.25, 0.5)  # shares of the drafts
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the answer that stands in the prompt


class Cycle(NamedTuple):
    """A pass of the target: the source of its draft (`plain` without one), its tokens, those of the draft accepted."""

    source: str
    width: int
    accepted: int


class Draft(NamedTuple):
    """A copied draft that could be had at some place, tried or not: how many of its tokens were foretold to come true,
    (nan: nothing foretold it) and how many do. ran: whether a cycle of this run began there, or it was passed over."""

    foretold: float
    true: int
    ran: bool = True


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One prompt answered by one arm of one target.

    tokens and seconds are those of decoding. same: whether the answer is that of the plain arm; None: not compared.
    spent: seconds by what they went into (draft, predict, verify, commit). copied, coded: see `structure`.
    """

    target: str
    family: str
    set: str
    prompt: str
    arm: str
    tokens: int
    seconds: float
    cycles: Sequence[Cycle]
    same: bool | None = None
    spent: Mapping[str, float] = field(default_factory=dict)
    drafts: Sequence[Draft] = ()
    copied: float = math.nan
    coded: float = math.nan

    def __post_init__(self):
        if self.tokens < 1 or not self.seconds > 0 or any(not 0 <= c.accepted < c.width for c in self.cycles):
            raise ValueError(
                f"{self.arm} on {self.set} {self.prompt}: tokens={self.tokens} and seconds={self.seconds} must be "
                f"above 0, and every cycle must accept fewer tokens than it is wide"
            )

    @classmethod
    def of_row(cls, row: Mapping) -> Answered:
        """Of what `row` gave, perhaps by way of a line of JSON."""
        number = lambda value: math.nan if value is None else value
        told = {name: row[name] for name in cls.__dataclass_fields__}
        told |= {name: number(told[name]) for name in ("copied", "coded")}
        told["cycles"] = [Cycle(*each) for *each, count in told["cycles"] for _ in range(count)]
        told["drafts"] = [Draft(number(first), *others) for first, *others in told["drafts"]]
        return cls(**told)

    def row(self) -> dict[str, Any]:
        """As values that JSON has; of equal cycles their number."""
        counted = [(*cycle, count) for cycle, count in Counter(self.cycles).items()]
        return {name: finite(getattr(self, name)) for name in self.__dataclass_fields__} | {"cycles": finite(counted)}

    @property
    def key(self) -> tuple[str, str]:
        return self.set, self.prompt

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Interval(NamedTuple):
    """A geometric mean of ratios and its 95 % interval; nan where there is none."""

    mean: float
    low: float
    high: float

    @property
    def reading(self) -> str:
        if math.isnan(self.low):
            return "no interval" if not math.isnan(self.mean) else "not compared"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "inside noise"

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.2f}" + ("" if math.isnan(self.low) else f" ({self.low:.2f}–{self.high:.2f})")


NOTHING = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of one arm of a target over the prompts of a family, or of all.

    compared, same: prompts whose answers were compared with the plain ones, and are the same. accepted: tokens of
    drafts a cycle; accepted_of: a cycle of each source; cycles_of, tokens_of: its share of cycles and of tokens.
    """

    target: str
    family: str
    arm: str
    prompts: int
    compared: int
    same: int
    tokens: int
    tokens_per_s: float
    speed_up: Interval
    of_oracle: float
    cycles_per_1000: float
    accepted: float
    width: float
    accepted_of: Mapping[str, float]
    cycles_of: Mapping[str, float]
    tokens_of: Mapping[str, float]
    widths: Mapping[str, float]
    spent: Mapping[str, float]


class Payoff(NamedTuple):
    """Of copied drafts: how many, the share of high pay-off, and what share of all gain the best of them give."""

    drafts: int
    high: float
    best: Mapping[float, float]


class Foretold(NamedTuple):
    """How well a predictor tells the drafts of high pay-off: as shares, nan where there is nothing to divide by."""

    drafts: int
    high: float
    chosen: float
    precision: float
    recall: float


PUBLISHED = {"high": (0.048, 0.089), "chosen": (0.088, 0.186), "precision": (0.78, 0.88), "recall": (0.61, 0.80)}


class Band(NamedTuple):
    """Prompts whose structural share lies from low to high, and an arm's speed-up on them."""

    low: float
    high: float
    prompts: int
    speed_up: Interval


def bootstrap(logs: Sequence[float], seed: int = 0) -> Interval:
    """The geometric mean of ratios given as logarithms; percentiles of the means of samples drawn with replacement."""
    if not logs:
        return NOTHING
    mean = math.exp(math.fsum(logs) / len(logs))
    if len(logs) == 1:
        return Interval(mean, math.nan, math.nan)
    values, draw = numpy.asarray(logs), numpy.random.default_rng(seed)
    means = values[draw.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1)
    low, high = numpy.exp(numpy.percentile(means, (2.5, 97.5)))
    return Interval(mean, float(low), float(high))


def medians(answers: Iterable[Answered]) -> list[Answered]:
    """One for each prompt and arm: of repeats the one whose time is the median (the lower of two in the middle)."""
    repeats: dict[tuple, list[Answered]] = {}
    for one in answers:
        repeats.setdefault((one.target, one.arm, *one.key), []).append(one)
    found = []
    for several in repeats.values():
        middle = statistics.median_low(one.seconds for one in several)
        found.append(next(one for one in several if one.seconds == middle))
    return found


def arms_of(answers: Iterable[Answered]) -> list[str]:
    """As they come, but plain before all others and the oracle after them."""
    names = dict.fromkeys(one.arm for one in answers)
    return sorted(names, key=lambda name: (name != PLAIN, name == ORACLE))


def numbers(answers: Sequence[Answered]) -> list[Numbers]:
    """For every target, family and arm; the family `all` has the prompts of all families. answers: without repeats."""
    found = []
    for target in dict.fromkeys(one.target for one in answers):
        mine = [one for one in answers if one.target == target]
        families = [*dict.fromkeys(one.family for one in mine)]
        for family in [*families, *([ALL] if len(families) > 1 else [])]:
            there = [one for one in mine if family in (one.family, ALL)]
            found += [numbers_of(there, target, family, arm) for arm in arms_of(there)]
    return found


def numbers_of(answers: Sequence[Answered], target: str, family: str, arm: str) -> Numbers:
    mine = [one for one in answers if one.arm == arm]
    cycles = [cycle for one in mine for cycle in one.cycles]
    tokens, seconds = sum(one.tokens for one in mine), math.fsum(one.seconds for one in mine)
    by_source = {name: [c for c in cycles if c.source == name] for name in dict.fromkeys(c.source for c in cycles)}
    stages = dict.fromkeys(stage for one in mine for stage in one.spent)
    return Numbers(
        target=target,
        family=family,
        arm=arm,
        prompts=len(mine),
        compared=sum(one.same is not None for one in mine),
        same=sum(one.same is True for one in mine),
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        speed_up=Interval(1.0, math.nan, math.nan) if arm == PLAIN else speed_up(answers, arm),
        of_oracle=math.exp(mean(ratios(mine, [one for one in answers if one.arm == ORACLE]))),
        cycles_per_1000=1000 * len(cycles) / tokens,
        accepted=mean(c.accepted for c in cycles),
        width=mean(c.width for c in cycles),
        accepted_of={name: mean(c.accepted for c in some) for name, some in by_source.items()},
        cycles_of={name: len(some) / len(cycles) for name, some in by_source.items()},
        tokens_of=shares({name: sum(1 + c.accepted for c in some) for name, some in by_source.items()}),
        widths=shares(Counter(next(name for name, most in WIDTHS.items() if c.width <= most) for c in cycles)),
        spent={stage: math.fsum(one.spent.get(stage, 0.0) for one in mine) / seconds for stage in stages},
    )


def mean(values: Iterable[float]) -> float:
    known = [*values]
    return math.fsum(known) / len(known) if known else math.nan


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def speed_up(answers: Sequence[Answered], arm: str, other: str = PLAIN) -> Interval:
    """Of an arm beside another one."""
    mine, others = ([one for one in answers if one.arm == name and one.same is not False] for name in (arm, other))
    return bootstrap(ratios([one for one in mine if one.same], others))


def ratios(mine: Iterable[Answered], others: Iterable[Answered]) -> list[float]:
    """Logarithms of rate / rate over the prompts of both."""
    rates = {one.key: one.rate for one in others}
    return [math.log(one.rate / rates[one.key]) for one in mine if one.key in rates]


def payoff(drafts: Iterable[Draft]) -> Payoff:
    gains = sorted((draft.true for draft in drafts), reverse=True)
    total = sum(gains)
    best = {share: sum(gains[: math.ceil(share * len(gains))]) / total if total else math.nan for share in BEST}
    return Payoff(len(gains), mean(gain >= HIGH for gain in gains), best)


def foretold(drafts: Sequence[Draft], threshold: float = HIGH) -> Foretold:
    """Chosen are drafts foretold to have more than `threshold` tokens that come true."""
    drafts = [draft for draft in drafts if not math.isnan(draft.foretold)]
    right = sum(draft.foretold > threshold and draft.true >= HIGH for draft in drafts)
    chosen, high = sum(draft.foretold > threshold for draft in drafts), sum(draft.true >= HIGH for draft in drafts)
    share = lambda part, whole: part / whole if whole else math.nan
    all_of = len(drafts)
    return Foretold(all_of, share(high, all_of), share(chosen, all_of), share(right, chosen), share(right, high))


def bands(answers: Sequence[Answered], arm: str, measure: Callable[[Answered], float]) -> list[Band]:
    """The speed-up of an arm on prompts of little and of much structure; bands without prompts are left out."""
    found = []
    for low, high in zip(SHARES, SHARES[1:], strict=False):
        there = [one for one in answers if low <= measure(one) < high or measure(one) == high == 1]
        if count := sum(one.arm == arm for one in there):
            found.append(Band(low, high, count, speed_up(there, arm)))
    return found
