"""Distil several teachers into one student, on the student's own answers (multi-teacher on-policy distillation).

MODEL is the student: a run, a checkpoint folder or a hub id. It answers the problems of all tasks, each once; the
teacher of the task says how likely it finds every token, and the student moves towards it. Each task has exactly one
teacher, with the student's tokenizer and best of its own lineage. The same command again goes on where an interrupted
run stopped.

runs/sft tasks=sort,reverse teachers=sort=runs/sort,reverse=runs/reverse

A second iteration begins from the first student, with teachers that were trained on from it. With reward=0.1
answers are compared by what they earn as well, and the student may become better than its teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nautilus
from nautilus.config import setting
from nautilus.data.batch import Batch
from nautilus.data.tokenizer import Tokenizer
from nautilus.eval import practice as report
from nautilus.model.language import Language
from nautilus.posttrain.blend import Blend, counts
from nautilus.posttrain.credit import leave_one_out
from nautilus.posttrain.gaps import gap_table, gaps
from nautilus.posttrain.practice import Practice, domains, open_practice, practise, routes, wanted
from nautilus.posttrain.profile import examined
from nautilus.posttrain.remote import connected
from nautilus.posttrain.rollout import Rollout
from nautilus.posttrain.stream import Group, Rows
from nautilus.posttrain.teachers import TeacherActors, Teachers, same_words
from nautilus.runtime import UserError, keep_memory
from nautilus.tasks.asked import Asked
from nautilus.train.policy import Correction, Surrogate


@dataclass(frozen=True, kw_only=True)
class Settings(Practice):
    out: Path = setting(Path("runs/mopd"), "the run's folder; gone on with if it is there")
    teachers: tuple[str, ...] = setting((), "who teaches what: task=RUN for each task")
    teacher_actors: int = setting(0, "processes of Ray that score answers for all teachers; 0: this one does")
    whole: bool = setting(
        False, "at every token all words are compared with the teacher's, and not the drawn one alone"
    )
    prompts: int = setting(256, "problems of a step")
    group: int = setting(1, "answers to each problem")
    reward: float = setting(0.0, "weight, beside its teacher, of what an answer earned more than others")
    advantage: float = setting(20.0, "most by which teacher and student may differ on a token, or rewards, either way")
    least: float = setting(0.5, "tokens of other weights are left out whose probability has changed by less than this")
    most: float = setting(5.0, "or by more than this")
    apart: float = setting(2.0, "answers are left out whose probabilities are off by more than this factor in the mean")
    measured: int = setting(256, "other problems of each task, measured before and after")

    def __post_init__(self):
        super().__post_init__()
        if not self.advantage > 0:
            raise UserError(f"advantage={self.advantage} was asked for, the most of one; give more than 0")
        self.surrogate()  # for what it refuses
        if not 0 <= self.reward < math.inf:
            raise UserError(f"reward={self.reward} was asked for, a weight; give 0 or more")
        if self.measured < 1 or self.teacher_actors < 0:
            raise UserError(
                f"measured={self.measured} and teacher_actors={self.teacher_actors} were asked for; a mean needs at"
                " least 1 problem, and there are no fewer processes than none"
            )
        if self.whole and self.teacher_actors:
            raise UserError(
                f"whole=true compares all words in this process, without teacher_actors={self.teacher_actors}; leave"
                " either out"
            )

    def surrogate(self) -> Surrogate:
        correction = Correction(kind="mask", least=self.least, most=self.most, apart=self.apart)
        return Surrogate(correction=correction, most=self.advantage)


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no student to train; write nautilus mopd MODEL tasks=… teachers=task=RUN,…")
    tasks = students(settings)
    keep_memory()
    model, tokenizer = nautilus.load(settings.model)
    teachers = teachers_of(settings, tokenizer)
    teachers.check([one.task.name for one in tasks], model)
    run = open_practice(settings, model, tokenizer, teaching=teachers.fingerprints)
    how = {"tasks": tasks, "count": settings.measured, "settings": settings, "tokenizer": tokenizer}
    exam = partial(examined, run, **how)
    scores = {"before": exam("before", model)}
    short = teachers.short
    scores |= {(name := f"teacher {short[place]}"): exam(name, one) for place, one in teachers.models.items()}
    lead = {"before": gaps(run, "before", model, teachers, **how)}
    blend = Blend(domains=domains(settings, tasks), prompts=settings.prompts, steps=settings.steps, seed=settings.seed)
    if settings.teacher_actors:
        ray = connected(settings.teacher_actors)
        teachers = replace(teachers, actors=TeacherActors(ray, settings.teacher_actors, teachers.models))
    learnt = partial(rows, settings, teachers, model.config.pad)
    distill = teachers.distill_whole if settings.whole else teachers.distill
    objective = distill(settings.surrogate(), settings.mtp, settings.reward)
    practise(run, settings, model, tokenizer, blend, learnt, objective)
    scores["after"], lead["after"] = exam("after", model), gaps(run, "after", model, teachers, **how)
    model.save(run.model, tokenizer=tokenizer, facts={"distilled": f"from teachers of {', '.join(teachers.routes)}"})
    title = f"{Path(settings.model).name}: distilled from {len(teachers.models)} teachers"
    facts = {"model": settings.model, "seed": str(settings.seed)}
    report.show(run, scores, title=title, facts=facts, more=[gap_table(lead, teachers)])


def students(settings: Settings) -> list[Asked]:
    """The tasks that a student can be taught so."""
    tasks = wanted(settings)
    if settings.reward and settings.group == 1 and min(counts(settings.prompts, [one.share for one in tasks])) < 2:
        raise UserError(
            f"reward={settings.reward} was asked for, but with group=1 and prompts={settings.prompts} a task has one"
            " answer in a step, and no other to compare it with; raise group or prompts"
        )
    return tasks


def teachers_of(settings: Settings, tokenizer: Tokenizer) -> Teachers:
    named = routes(settings.teachers, "teacher")
    models, words_of = dict[str, Language](), dict[str, Tokenizer]()
    for place in dict.fromkeys(named.values()):
        teacher, words_of[place] = nautilus.load(place)
        models[place] = settings.computing(teacher.float()).requires_grad_(False).eval()
    same_words(tokenizer, words_of)
    return Teachers(routes=named, models=models)


def rows(settings: Settings, teachers: Teachers, pad: int, groups: Sequence[Group]) -> list[Batch]:
    return teachers.batches(compared(settings, groups), tokens=settings.micro, pad=pad, whole=settings.whole)


def compared(settings: Settings, groups: Sequence[Group]) -> Rows:
    """All answers, each with its advantage over the others to its problem, or to its task where problems have one."""
    beside: dict[object, list[Rollout]] = {}
    for number, group in enumerate(groups):
        beside.setdefault(number if settings.group > 1 else group.problem.task, []).extend(group.rollouts)
    found = Rows()
    for some in beside.values():
        told = settings.reward and len(some) > 1
        rewards = [one.verdict.reward for one in some]
        found += zip(some, leave_one_out(rewards, settings.advantage) if told else [0.0] * len(some), strict=True)
    return found
