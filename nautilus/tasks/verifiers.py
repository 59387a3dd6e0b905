"""Environments of the library `verifiers`, before its version 0.4, as tasks of ours, and ours as theirs. One turn each.

task = loaded("gsm8k")
env = as_environment(TASKS["sort"](), 1000)
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import json
import random
from collections.abc import Awaitable, Iterator, Mapping
from typing import Any

from nautilus.runtime import UserError
from nautilus.tasks.task import GraderBroken, Problem, Question, Reply, Verdict, user


class OfVerifiers(Question):
    """The rows of an environment's data set, and the functions of its rubrics with their weights. Functions are asked
    for what they name: prompt, completion, answer, info, state, parser; one that needs more is a broken grader."""

    def __init__(self, name: str, environment: Any):
        if getattr(environment, "max_turns", 1) != 1:
            raise ValueError(f"the environment {name} has several turns; those of one turn can be asked")
        self.name, self.judges = name, [*judges(environment.rubric)]
        self.rows = [dict(row) for row in environment.get_dataset()]
        if not self.rows or not self.judges:
            raise ValueError(f"the environment {name} has {len(self.rows)} rows and {len(self.judges)} judges of them")

    def draw(self, rng: random.Random, level: int) -> Problem:
        row = rng.choice(self.rows)
        asked, info = row.get("prompt") or row["question"], row.get("info")
        messages = user(asked) if isinstance(asked, str) else tuple(asked)
        truth = {"answer": row.get("answer", ""), "info": json.loads(info) if isinstance(info, str) and info else info}
        return Problem(task=self.name, level=level, messages=messages, truth=truth)

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        completion = [{"role": "assistant", "content": reply.content}]
        known = {"prompt": [*problem.messages], "completion": completion, **problem.truth}
        known["state"], parts, total = dict(known), {}, 0.0
        for function, weight, more in self.judges:
            name = getattr(function, "__name__", "reward")
            parts[name] = value = called(function, {**known, **more})
            total += weight * value
        return Verdict(reward=total, why=", ".join(f"{name} {value:.2f}" for name, value in parts.items()), parts=parts)


def judges(rubric: Any) -> Iterator[tuple[Any, float, Mapping[str, Any]]]:
    """Functions with a weight, and what else they may name; those without only watch. A group has rubrics inside."""
    for inner in getattr(rubric, "rubrics", ()):
        yield from judges(inner)
    for function, weight in zip(rubric.funcs, rubric.weights, strict=True):
        if weight:
            yield function, weight, getattr(rubric, "class_objects", {})


def called(function: Any, known: Mapping[str, Any]) -> float:
    wanted = inspect.signature(function).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in wanted.values())
    given = {name: value for name, value in known.items() if takes_all or name in wanted}
    try:
        found = function(**given)
        return float(asyncio.run(awaited(found)) if inspect.isawaitable(found) else found)
    except Exception as bad:  # of whoever wrote it
        raise GraderBroken(f"the reward function {function} failed: {bad!r}") from bad


async def awaited(found: Awaitable[Any]) -> Any:
    return await found


def loaded(name: str) -> OfVerifiers:
    """An environment that is installed; UserError without the library, and for one that cannot be asked."""
    task = f"verifiers@{name}"
    try:
        library: Any = importlib.import_module("verifiers")
        return OfVerifiers(task, library.load_environment(name))
    except (ImportError, AttributeError) as bad:
        raise UserError(f"the task {task} needs the library verifiers; pip install 'verifiers<0.4' ({bad})") from bad
    except (ValueError, RuntimeError) as bad:
        raise UserError(f"the task {task} was asked for: {bad}") from bad


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
