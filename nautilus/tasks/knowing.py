"""What stands in the prompt, or does not: looked up, chosen, or said to be unknown.

| task | asked | right |
|--|--|--|
| `needle` | the value of one of 2^(level + 1) keys | that value |
| `choice` | one of four answers to a comparison | the letter in the last `\\boxed{}` |
| `abstain` | the value of a key that may not be there | the value, or `[IDK]` where there is none |
"""

from __future__ import annotations

import random
import re

from nautilus.tasks.letters import LETTERS
from nautilus.tasks.task import Problem, Question, Reply, Verdict, assistant, user

UNKNOWN = "[IDK]"
BOXED = re.compile(r"\\boxed\s*\{\s*([^{}]*?)\s*\}")


def pairs(rng: random.Random, count: int) -> dict[str, str]:
    """Keys of two letters and values of two digits."""
    keys = rng.sample([first + second for first in LETTERS for second in LETTERS], count)
    return {key: str(rng.randint(10, 99)) for key in keys}


def written(known: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in known.items())


class Needle(Question):
    """Levels double the pairs: 4 to 64."""

    name, levels = "needle", range(1, 6)
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        known = pairs(rng, 2 ** (level + 1))
        key = rng.choice([*known])
        asked = user(f"{written(known)}. What is {key}?")
        worked = assistant(known[key])
        return Problem(task=self.name, level=level, messages=asked, truth=known[key], worked=(worked,))

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        said = reply.content.strip().rstrip(".")
        return Verdict(reward=float(said == problem.truth), why=f"{said[:80]!r}, {problem.truth!r}")


class Choice(Question):
    """Which of four numbers is the largest or smallest; levels are their digits beyond one."""

    name, levels = "choice", range(1, 5)
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        numbers, most = rng.sample(range(10**level, 10 ** (level + 1)), 4), rng.random() < 0.5
        letter = "ABCD"[numbers.index(max(numbers) if most else min(numbers))]
        options = " ".join(f"{name}) {number}" for name, number in zip("ABCD", numbers, strict=True))
        asked = user(f"Which is the {'largest' if most else 'smallest'}? {options}")
        worked = assistant(f"\\boxed{{{letter}}}")
        return Problem(task=self.name, level=level, messages=asked, truth=letter, worked=(worked,))

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        return letter_is(reply.content, problem.truth)


def letter_is(answer: str, truth: str) -> Verdict:
    """The last box must hold the letter and nothing else."""
    found = BOXED.findall(answer)
    if not found:
        return Verdict(reward=0.0, why="no answer in a box")
    return Verdict(reward=float(found[-1] == truth), why=f"{found[-1][:80]!r}, {truth!r}")


class Abstain(Question):
    """1 for what is right, `unsure` for [IDK] where the value is there, 0 for what is wrong."""

    name, levels = "abstain", range(1, 5)
    thinks = False

    def __init__(self, unsure: float = 0.5):
        if not 0 <= unsure <= 1:
            raise ValueError(f"unsure={unsure} was asked for; a reward is 0 to 1")
        self.unsure = unsure

    def draw(self, rng: random.Random, level: int) -> Problem:
        known = pairs(rng, 2**level + 1)
        there = rng.random() < 0.5
        key = rng.choice([*known])
        truth = known[key] if there else UNKNOWN
        if not there:
            del known[key]
        asked = user(f"{written(known)}. What is {key}? Say {UNKNOWN} if you cannot know.")
        return Problem(task=self.name, level=level, messages=asked, truth=truth, worked=(assistant(truth),))

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        said, truth = reply.content.strip().rstrip("."), problem.truth
        right = said == truth
        reward = 1.0 if right else self.unsure if said == UNKNOWN else 0.0
        invented = float(truth == UNKNOWN and not right)
        return Verdict(
            reward=reward, why=f"{said[:80]!r}, {truth!r}", parts={"right": float(right), "invented": invented}
        )
