"""How far a student's own answers are from what its teachers would say, on problems that nobody is trained on:

    log p(teacher) - log p(student)     of every token that the student drew, by the teacher of its task

Minus its mean is the reverse KL from the teacher, as far as it can be told from what was drawn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.profile import asking, exam
from nautilus.posttrain.rollout import Dropped, Rollout
from nautilus.posttrain.teachers import Teachers, score
from nautilus.runtime import Run, read_json, write_atomic
from nautilus.serve.prefixes import fingerprint
from nautilus.tasks import Problem
from nautilus.tasks.asked import Asked

LOW, HIGH = 0.05, 0.95
HEAD = "teacher", "of", "when", "mean", "5 %", "95 %", "tokens"


class Gap(NamedTuple):
    """Of so many tokens; LOW of them are at `low` or below, HIGH of them at `high` or below."""

    mean: float
    low: float
    high: float
    tokens: int


def gap_of(values: Tensor) -> Gap:
    ordered = values.double().sort().values
    low, high = (ordered[round(share * (len(ordered) - 1))].item() for share in (LOW, HIGH))
    return Gap(ordered.mean().item(), low, high, len(ordered))


def gaps(
    run: Run, name: str, student: Language, teachers: Teachers, *, tasks: Sequence[Asked], count: int,
    settings: Practice, tokenizer: Tokenizer,
) -> dict[str, Gap]:  # fmt: skip
    """By teacher, on the answers that the student is measured by. What the run has of these models is not asked
    again."""
    file, by = run.state / f"gaps_{name}.json", [fingerprint(one)[:16] for one in (student, *teachers.models.values())]
    known = read_json(file, "remove it, to have it measured again") if file.is_file() else {}
    if known.get("models") != by:
        questions = [(one.task, problem, 0) for one in tasks for problem in exam(one.task, count, levels=one.levels)]
        answers = list[tuple[Rollout, float]]()

        def told(problem: Problem, time: int, found: Rollout | Dropped) -> None:
            if isinstance(found, Rollout):
                answers.append((found, 0.0))

        asyncio.run(asking(student, tokenizer, questions, settings.playing, settings.together, 0, told))
        known = {"models": by, "gaps": apart(student, teachers, answers, settings.micro)}
        write_atomic(file, json.dumps(known) + "\n")
    return {teacher: Gap(*values) for teacher, values in known["gaps"].items()}


def apart(
    student: Language, teachers: Teachers, answers: Sequence[tuple[Rollout, float]], tokens: int
) -> dict[str, Gap]:
    """Both by the trainer's forward, in micro-batches of at most so many tokens."""
    found: dict[str, list[Tensor]] = {}
    for batch in teachers.batches(answers, tokens=tokens, pad=student.config.pad):
        assert batch.teacher_logprob is not None
        gap_BT = batch.teacher_logprob - score(student, batch)
        found.setdefault(batch.teacher, []).append(gap_BT[batch.weights["policy"] > 0])
    return {teacher: gap_of(torch.cat(parts)) for teacher, parts in found.items()}


def gap_table(found: Mapping[str, Mapping[str, Gap]], teachers: Teachers) -> tuple[str, Sequence[str], list[list[str]]]:
    """Title, head and rows for a report. found: by when they were measured, then by teacher."""
    rows = [
        [short, ", ".join(task for task, who in teachers.routes.items() if who == teacher), when,
         *(f"{value:+.3f}" for value in by_teacher[teacher][:3]), f"{by_teacher[teacher].tokens:,}"]
        for teacher, short in teachers.short.items()
        for when, by_teacher in found.items()
        if teacher in by_teacher
    ]  # fmt: skip
    return "Gap to the teachers", HEAD, rows
