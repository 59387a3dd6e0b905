"""Tasks of `reasoning-gym` as tasks of ours; it draws them by a seed and scores answers from 0 to 1."""

from __future__ import annotations

import importlib
import random
import warnings
from typing import Any

from nautilus.tasks.task import GraderBroken, Problem, Question, Reply, Verdict, user

SEEDS = 1 << 31


class Puzzle(Question):
    """ImportError without the library, ValueError for a name that it does not know. Its settings are its own defaults,
    or those that are given."""

    def __init__(self, dataset: str, **settings: Any):
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of what it imports
            library: Any = importlib.import_module("reasoning_gym")
        self.make, self.dataset, self.settings = library.create_dataset, dataset, settings
        self.name = f"rg/{dataset}"
        self.judge = self.make(dataset, size=1, seed=0, **settings)

    def draw(self, rng: random.Random, level: int) -> Problem:
        """The entry goes with the problem: all that its score needs."""
        entry = self.make(self.dataset, size=1, seed=rng.randrange(SEEDS), **self.settings)[0]
        return Problem(task=self.name, level=level, messages=user(entry["question"]), truth=entry)

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        try:
            score = float(self.judge.score_answer(reply.content.strip(), problem.truth))
        except Exception as bad:  # of any of a hundred scorers
            raise GraderBroken(f"{self.name} could not score an answer: {bad!r}") from bad
        return Verdict(reward=min(1.0, max(0.0, score)), why=f"{score:.2f} of 1")
