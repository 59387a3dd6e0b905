"""Post-train a model from worked answers to one student of several teachers: the whole pipeline, at any size.

MODEL is a run, a checkpoint folder or a hub id. Each stage is a run of its own below out, with its report, and has
settings of its own: specialist.steps=200. The same command again goes on where an interrupted one stopped. A stage that
is done stays as it is: with other settings, or after an earlier one was removed, it has to be removed too.

| folder | |
|--|--|
| sft | supervised: worked answers of all tasks |
| 1-TASK | a specialist for each task: reinforcement from there |
| 1-warm | with warm=40: where the student begins, supervised, on 40 steps of what the specialists answer |
| 1-student | distilled from the specialists, on its own answers |
| 2-TASK, 2-warm, 2-student | the same from the first student; a teacher that this has not caught up with stays |
| boost | the last student, its prediction block trained on its own answers |

baselines=true has beside them what else could be made of the first specialists or of as many rollouts: the mean of
their weights, what they write learnt once, at the student's rate, and reinforcement on all tasks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import nautilus
from nautilus.config import setting, to_dict
from nautilus.eval import practice as report
from nautilus.eval.pipeline import told_of
from nautilus.posttrain.drafter import NoDrafts
from nautilus.posttrain.pipeline import Exam, Stages, alone, averaged, passed_on, questions, refuse_given, unsuited
from nautilus.posttrain.practice import budgeted
from nautilus.recipes import boost, mopd, rlvr, sft
from nautilus.runtime import UserError, continue_or_create, keep_memory
from nautilus.serve.prefixes import fingerprint
from nautilus.tasks.asked import Asked

SHORT: dict[str, Any] = {"tokens": 192, "turn_tokens": 64, "together": 256, "measured": 32, "save_every": 0}

GIVEN = {"supervised": (), "specialist": ("tasks", "budgets"), "student": ("tasks", "teachers"), "drafts": ("prompts",)}
FREE = {*GIVEN, "again", "caught_up", "warm", "measured", "budgets", "baselines"}  # each stage holds on to its own


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    tasks: tuple[str, ...] = setting(("sort:3", "reverse:4", "arithmetic:2"), "what is taught; see `nautilus rlvr`")
    out: Path = setting(Path("runs/posttrain"), "folder of all stages; gone on with if it is there")
    iterations: int = setting(2, "times that specialists are trained, and distilled into a student")
    again: float = setting(1.0, "steps of the later specialists, as a share of the first ones'")
    caught_up: float = setting(1.0, "part of its teacher's gain that a student needs for a new one; 0: none")
    warm: int = setting(0, "updates on what the teachers answer, with which a student begins; 0: none")
    supervised: sft.Settings = sft.Settings(steps=240, length=256, problems=12_000, save_every=0, cut=0.15)
    specialist: rlvr.Settings = rlvr.Settings(**SHORT)
    student: mopd.Settings = mopd.Settings(steps=60, **SHORT)
    drafts: boost.Settings = boost.Settings(
        chat=True, prompt_tokens=64, answers=512, tokens=48, steps=120, save_every=0
    )
    measured: int = setting(256, "problems of each task that every model is measured on")
    budgets: tuple[int, ...] = setting((0, 8, 16, 24, 32, 48), "thinking budgets that the last student is asked with")
    baselines: bool = setting(False, "what else could be made of as much")
    seed: int = setting(0, "of all stages")

    def __post_init__(self):
        if self.iterations < 1 or self.measured < 1 or self.warm < 0 or not self.caught_up >= 0:
            told = f"iterations={self.iterations} and measured={self.measured} must be at least 1"
            raise UserError(f"{told}, warm={self.warm} and caught_up={self.caught_up} at least 0")
        alone(self.specialist, share=self.again)  # for what it refuses
        passed_on(self.supervised, self.student.optim, self.warm or self.student.steps)  # likewise
        budgeted(self.budgets, (), self.specialist)
        refuse_given(self, GIVEN)


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to train; write nautilus posttrain MODEL, a run, a checkpoint folder or a hub id")
    how = mopd.students(replace(settings.student, tasks=settings.tasks))
    given = replace(settings.specialist, tasks=settings.tasks, seed=settings.seed)
    tasks = {one.task.name: words for one, words in zip(how, settings.tasks, strict=True)}
    keep_memory()
    unsuited(given, how, nautilus.load, together=settings.baselines)
    begun = {**to_dict(settings), "weights": fingerprint(nautilus.load(settings.model)[0])}
    run = continue_or_create(settings.out, begun, free=FREE)
    do = Stages(run=run, seed=settings.seed)
    exam = Exam(run=run, tasks=how, count=settings.measured, settings=given, load=nautilus.load)
    models = trained(settings, do, tasks, exam)
    student = models[f"student {settings.iterations}"]
    models |= baselines(settings, do, models, tasks) if settings.baselines else {}
    drafts = boosted(settings, do, student, how)
    scores = {name: exam(name, place) for name, place in models.items()}
    more = told_of(scores, [*tasks], settings.iterations, minutes=do.minutes, drafts=drafts)
    told = {"title": f"{Path(settings.model).name}: one student of {len(tasks)} teachers", "more": more}
    facts, curve = {"model": settings.model, "seed": str(settings.seed)}, exam.by_budget(student, settings.budgets)
    report.show(run, scores, facts=facts, curve=curve, **told)
    run.write_settings(begun)


def trained(settings: Settings, do: Stages, tasks: Mapping[str, str], exam: Exam) -> dict[str, Path]:
    """The runs of all specialists and students by name, and of what they begin from."""
    first, last = settings.supervised, "sft"
    models = {last: (student := do(last, sft, first, model=settings.model, tasks=first.tasks or settings.tasks))}
    grown = dict[str, tuple[str, str]]()  # by task: what its teacher grew from, and that teacher
    for number in range(1, settings.iterations + 1):
        for name, words in tasks.items():
            if name not in grown or exam.caught_up(name, models, *grown[name], last, share=settings.caught_up):
                grown[name] = last, f"{name} specialist {number}"
                told = alone(settings.specialist, name, words, share=1 if number == 1 else settings.again)
                models[grown[name][1]] = do(f"{number}-{name}", rlvr, told, of=(student,), model=str(student))
        teachers = {name: models[teacher] for name, (_, teacher) in grown.items()}
        if settings.warm:
            student = models[f"warm {number}"] = learnt(
                settings, do, f"{number}-warm", student, teachers, tasks, folder=do.run.state / f"{number}-written",
                count=-(-settings.warm * settings.supervised.rows // len(tasks)), steps=settings.warm,  # one for a row
            )  # fmt: skip
        student = models[last := f"student {number}"] = do(
            f"{number}-student", mopd, settings.student, of=(student, *teachers.values()), model=str(student),
            tasks=settings.tasks, teachers=tuple(f"{name}={place}" for name, place in teachers.items()),
        )  # fmt: skip
    return models


def boosted(settings: Settings, do: Stages, student: Path, tasks: Sequence[Asked]) -> Path | None:
    """The run of the last stage; None where the student has no block that predicts ahead, or says too little to measure
    drafts on."""
    file = questions(do.run.state / "questions.jsonl", tasks, settings.drafts.answers + settings.drafts.measured)
    try:
        return do("boost", boost, settings.drafts, of=(student,), model=str(student), prompts=(f"{file}#prompt",))
    except NoDrafts as bad:
        Console(soft_wrap=True, highlight=False).print(f"boost is left out: {bad}")
        return None


def learnt(
    settings: Settings, do: Stages, name: str, base: Path, teachers: Mapping[str, Path], tasks: Mapping[str, str], *,
    count: int, steps: int, folder: Path,
) -> Path:  # fmt: skip
    """The run in which a model learns what teachers answer to so many problems of each task, which lies in a folder."""
    file = do.lesson(name, teachers, tasks, settings.specialist, count, folder, nautilus.load)
    told = passed_on(settings.supervised, settings.student.optim, steps)
    return do(name, sft, told, of=(base, *teachers.values()), model=str(base), data=(file,))


def baselines(settings: Settings, do: Stages, models: dict[str, Path], tasks: Mapping[str, str]) -> dict[str, Path]:
    """Made of the first specialists, or with as many rollouts as they had."""
    run, base, teachers = do.run, models["sft"], {name: models[f"{name} specialist 1"] for name in tasks}
    do.forget_older([*teachers.values()], run.folder / "mean")
    mixed = replace(settings.specialist, steps=settings.specialist.steps * len(tasks))
    return {
        "mean of specialists": averaged([*teachers.values()], run.folder / "mean", nautilus.load),
        "their answers learnt": learnt(
            settings, do, "learnt", base, teachers, tasks, steps=0, folder=run.state / "written",
            count=settings.student.prompts * settings.student.steps // len(tasks),  # as many answers as a student gives
        ),
        "all at once": do("all", rlvr, mixed, of=(base,), model=str(base), tasks=settings.tasks),
    }  # fmt: skip
