"""Tasks of `reasoning-gym` as tasks of ours, and ours of one turn as data sets of theirs.

    task = Puzzle("leg_counting")                     # problems by a seed, scored from 0 to 1
    offered(TASKS["sort"]())
    reasoning_gym.create_dataset("nautilus/sort", size=100, seed=1, levels=[1, 2])

An entry of ours is JSON and has all that its score needs, so that it is scored wherever it was carried.
"""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nautilus.tasks.rows import posed, row_of
from nautilus.tasks.task import GraderBroken, Problem, Question, Reply, Verdict, user

SEEDS = 1 << 31


def gym() -> Any:
    """The library; ImportError without it."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of what it imports
        return importlib.import_module("reasoning_gym")


class Puzzle(Question):
    """ImportError without the library, ValueError for a name that it does not know. Its settings are its own defaults,
    or those that are given."""

    def __init__(self, dataset: str, **settings: Any):
        self.make, self.dataset, self.settings = gym().create_dataset, dataset, settings
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


# ----- the other way --------------------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """Which problems a data set of theirs has. levels: in turn, all of the task's where none are named; it is not
    frozen, as the library sets the seeds of copies."""

    seed: int | None = None
    size: int = 500
    levels: Sequence[int] = ()
    split: str = "train"


def offered(task: Question) -> str:
    """Registers it, and says under which name. ImportError without the library, ValueError for a name that it has."""
    library, name = gym(), f"nautilus/{task.name}"

    class Offered(library.dataset.ProceduralDataset):
        def __init__(self, config: Drawing):
            super().__init__(config, seed=config.seed, size=config.size)

        def __getitem__(self, at: int) -> dict[str, Any]:
            levels = self.config.levels or task.levels
            level, seed = levels[at % len(levels)], random.Random(f"{self.seed} {at}").randrange(SEEDS)
            problem = next(task.problems(self.config.split, level=level, seed=seed))
            where = {"source_dataset": name, "source_index": at, "difficulty": {"level": level}}
            return entry_of(problem, where)

        def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float:
            return task.grade(posed(entry["metadata"]["row"], task), Reply(content=answer or "")).reward

    library.register_dataset(name, Offered, Drawing)
    return name


def entry_of(problem: Problem, where: Mapping[str, Any]) -> dict[str, Any]:
    """A problem as they have one; its answer is the worked one, "" where there is none."""
    asked = "\n\n".join(message["content"] for message in problem.messages)
    answer = problem.worked[-1]["content"] if problem.worked else ""
    return {"question": asked, "answer": answer, "metadata": {**where, "row": row_of(problem)}}
