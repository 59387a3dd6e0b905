"""Which problems a step puts to a model: fixed shares of tasks, and within each those of the right difficulty.

Every task has the same share of each step from the first to the last, as training on some makes others worse. Within a
task the pass rate p of a problem, found with the model that training begins from, decides how often it comes:

    weight = exp(-(p - mu)^2 / (2 spread^2)),   mu from `begin`, what is easy, to `end`, what is hard, step by step

Problems that are always solved teach nothing and are left out. One that is never solved stays, as it may be solved
later, but for single turns of a longer way: of these only such count whose answers differ (PivotRL, arXiv 2603.21383).
Source: Nemotron 3 Nano (arXiv 2512.20848), which does not say mu and the spread.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from nautilus.config import setting
from nautilus.runtime import UserError
from nautilus.tasks import Problem, Task, distinct


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """least, most: problems that are solved less often than the one, or as often as the other, are left out."""

    begin: float = setting(0.75, "pass rate of the problems that come most at the beginning")
    end: float = setting(0.25, "and at the end")
    spread: float = setting(0.15, "of these rates")
    least: float = setting(0.0, "problems solved less often are left out")
    most: float = setting(1.0, "and those solved as often as this or more")

    def __post_init__(self):
        if not (0 <= self.begin <= 1 and 0 <= self.end <= 1 and self.spread > 0 and 0 <= self.least < self.most <= 1):
            raise UserError(
                f"a curriculum from {self.begin} to {self.end} with spread {self.spread} of problems from {self.least}"
                f" to {self.most} was asked for; pass rates are 0 to 1, and the spread is more than 0"
            )

    def weight(self, rate: float, done: float) -> float:
        """Of a problem that is solved so often, when so much of the training is done."""
        if not self.least <= rate < self.most:
            return 0.0
        at = self.begin + (self.end - self.begin) * done
        return math.exp(-((rate - at) ** 2) / (2 * self.spread**2))


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A task with its problems. rates: how often each was solved, by its id; None: all come alike."""

    task: Task
    problems: Sequence[Problem]
    share: float = 1.0
    rates: Mapping[str, float] | None = None


def domain(task: Task, count: int, *, levels: Sequence[int] = (), share: float = 1.0, seed: int = 0) -> Domain:
    """So many problems of the split that is trained on, of these levels in turn, each once."""
    return Domain(task=task, problems=distinct(task, "train", count, levels=levels, seed=seed), share=share)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """prompts: of a step; steps: of the whole training, for the curriculum."""

    domains: Sequence[Domain]
    prompts: int
    steps: int
    curriculum: Curriculum = field(default_factory=Curriculum)
    seed: int = 0

    def __post_init__(self):
        if not self.domains or self.prompts < len(self.domains):
            raise UserError(
                f"a step of {self.prompts} prompts of {len(self.domains)} tasks was asked for; each task needs one"
            )
        if min(one.share for one in self.domains) <= 0:
            raise UserError("a task with a share that is not more than 0 was asked for; leave it out")

    def step(self, number: int) -> list[tuple[Domain, Problem]]:
        """The problems of a step; the same however often it is asked for."""
        rng, shares = random.Random(f"{self.seed} {number}"), [one.share for one in self.domains]
        return [
            (one, problem)
            for one, count in zip(self.domains, counts(self.prompts, shares), strict=True)
            for problem in self.drawn(one, count, number, rng)
        ]

    def drawn(self, one: Domain, count: int, number: int, rng: random.Random) -> list[Problem]:
        if one.rates is None:
            return [rng.choice(one.problems) for _ in range(count)]
        done = number / max(1, self.steps - 1)
        rates = [one.rates.get(problem.id, 0.0) for problem in one.problems]
        weights = [0.0 if one.task.pivotal and not rate else self.curriculum.weight(rate, done) for rate in rates]
        if not any(weights):
            raise UserError(
                f"none of {len(weights)} problems of {one.task.name} is solved now and then, not always; take other"
                " levels"
            )
        return rng.choices(one.problems, weights, k=count)


def counts(prompts: int, shares: Sequence[float]) -> list[int]:
    """Of each domain in a step: by shares, those with the largest remainders rounded up; none gets nothing."""
    exact = [prompts * share / math.fsum(shares) for share in shares]
    found = [max(1, int(value)) for value in exact]
    order = sorted(range(len(exact)), key=lambda at: (found[at] - exact[at], at))
    for at in islice(iter_cycle(order), max(0, prompts - sum(found))):
        found[at] += 1
    while sum(found) > prompts:
        found[max(range(len(found)), key=lambda at: found[at])] -= 1
    return found


def iter_cycle(order: Sequence[int]) -> Iterator[int]:
    while True:
        yield from order
