"""Letters moved about: sorted, reversed, rotated, counted. The answer is one word or number, exactly."""

from __future__ import annotations

import random
import string
from abc import abstractmethod

from nautilus.tasks.task import Problem, Question, Reply, Verdict, assistant, user

LETTERS = string.ascii_lowercase


class Letters(Question):
    """Levels are letters beyond two. Letters stand apart, or a tokenizer would hide them."""

    levels = range(1, 9)
    thinks = False

    def draw(self, rng: random.Random, level: int) -> Problem:
        letters = [rng.choice(LETTERS) for _ in range(level + 2)]
        asked, truth = self.of(letters, rng)
        return Problem(task=self.name, level=level, messages=user(asked), truth=truth, worked=(assistant(truth),))

    @abstractmethod
    def of(self, letters: list[str], rng: random.Random) -> tuple[str, str]:
        """What is asked of them, and what is right."""

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        said = reply.content.strip()
        return Verdict(reward=float(said.split() == problem.truth.split()), why=f"{said[:80]!r}, {problem.truth!r}")


class Sort(Letters):
    name = "sort"

    def of(self, letters: list[str], rng: random.Random) -> tuple[str, str]:
        return f"sort: {' '.join(letters)}", " ".join(sorted(letters))


class Reverse(Letters):
    name = "reverse"

    def of(self, letters: list[str], rng: random.Random) -> tuple[str, str]:
        return f"reverse: {' '.join(letters)}", " ".join(reversed(letters))


class Rotate(Letters):
    """By one place or two to the left."""

    name = "rotate"

    def of(self, letters: list[str], rng: random.Random) -> tuple[str, str]:
        by = rng.randint(1, 2)
        return f"rotate by {by}: {' '.join(letters)}", " ".join(letters[by:] + letters[:by])


class Count(Letters):
    """How often a letter stands there, which it does at least once; of few letters, or all counts would be one."""

    name = "count"

    def of(self, letters: list[str], rng: random.Random) -> tuple[str, str]:
        few = [rng.choice("abc") for _ in letters]
        asked = rng.choice(few)
        return f"count {asked}: {' '.join(few)}", str(few.count(asked))
