"""Environments of the library `verifiers` as tasks of ours, and ours as theirs. One turn each.

task = OfVerifiers("gsm8k", vf.load_environment("gsm8k"))
env = as_environment(TASKS["sort"](), 1000)
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import json
import random
from collections.abc import Awaitable, Mapping
from typing import Any

from nautilus.tasks.task import GraderBroken, Problem, Question, Reply, Verdict


class OfVerifiers(Question):
    """The rows of an environment's data set, and the functions of its rubric with their weights. Functions are asked
    for what they name: prompt, completion, answer, info, state; one that needs more is a broken grader."""

    def __init__(self, name: str, environment: Any):
        self.name, self.environment = name, environment
        data: Any = environment.dataset
        rows: Any = data() if callable(data) else data
        self.rows = [dict(row) for row in rows]
        if not self.rows:
            raise ValueError(f"the environment {name} has no rows")

    def draw(self, rng: random.Random, level: int) -> Problem:
        row = rng.choice(self.rows)
        messages = row.get("prompt") or [{"role": "user", "content": row["question"]}]
        info = row.get("info")
        truth = {"answer": row.get("answer", ""), "info": json.loads(info) if isinstance(info, str) and info else info}
        return Problem(task=self.name, level=level, messages=tuple(messages), truth=truth)

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        completion = [{"role": "assistant", "content": reply.content}]
        known = {"prompt": [*problem.messages], "completion": completion, **problem.truth}
        known["state"] = dict(known)
        rubric, parts, total = self.environment.rubric, {}, 0.0
        for function, weight in zip(rubric.funcs, rubric.weights, strict=True):
            name = getattr(function, "__name__", "reward")
            parts[name] = value = float(called(function, known))
            total += weight * value
        return Verdict(reward=total, why=", ".join(f"{name} {value:.2f}" for name, value in parts.items()), parts=parts)


def called(function: Any, known: Mapping[str, Any]) -> Any:
    wanted = inspect.signature(function).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in wanted.values())
    given = {name: value for name, value in known.items() if takes_all or name in wanted}
    try:
        found = function(**given)
        return asyncio.run(awaited(found)) if inspect.isawaitable(found) else found
    except Exception as bad:  # of whoever wrote it
        raise GraderBroken(f"the reward function {function} failed: {bad!r}") from bad


async def awaited(found: Awaitable[Any]) -> Any:
    return await found


def as_environment(task: Question, count: int, *, split: str = "train", seed: int = 0) -> Any:
    """So many problems of a task of one turn, as an environment of theirs; ImportError without the library."""
    import datasets

    verifiers: Any = importlib.import_module("verifiers")
    problems = [*itertools.islice(task.problems(split, seed=seed), count)]
    known = {one.id: one for one in problems}
    rows = [{"prompt": [*one.messages], "answer": one.id} for one in problems]

    def reward(completion: Any, answer: str) -> float:
        said = completion if isinstance(completion, str) else completion[-1]["content"]
        return task.grade(known[answer], Reply(content=said)).reward

    return verifiers.SingleTurnEnv(dataset=datasets.Dataset.from_list(rows), rubric=verifiers.Rubric(funcs=[reward]))
