"""Post-train a model from worked answers to one student of several teachers: the whole pipeline, at any size.

MODEL is a run, a checkpoint folder or a hub id. Each stage is a run of its own below out, with its report, and has
settings of its own: specialist.steps=200. The same command again goes on where an interrupted one stopped.

| folder | |
|--|--|
| sft | supervised: worked answers of all tasks |
| 1-TASK | a specialist for each task: reinforcement from there |
| 1-student | distilled from the specialists, on its own answers |
| 2-TASK, 2-student | the same from the first student |
| boost | the last student, its prediction block trained on its own answers |

baselines=true has beside them what else could be made of the first specialists or of as many rollouts: the mean of
their weights, what they write learnt as worked answers, and reinforcement on all tasks at once.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

import nautilus
from nautilus.config import to_dict
from nautilus.eval import practice as report
from nautilus.eval.pipeline import told_of
from nautilus.posttrain.pipeline import averaged, questions, written_by
from nautilus.posttrain.practice import wanted
from nautilus.posttrain.profile import Score, curve, examined
from nautilus.recipes import boost, mopd, rlvr, sft
from nautilus.runtime import Run, UserError, continue_or_create, keep_memory, read_json, write_atomic
from nautilus.train.optim import setting

SHORT: dict[str, Any] = {"tokens": 192, "turn_tokens": 64, "measured": 32, "save_every": 0}
LEARNT = 15_360  # answers of teachers that are learnt as worked ones


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    tasks: tuple[str, ...] = setting(("sort:3", "reverse:4", "arithmetic:2"), "what is taught; see `nautilus rlvr`")
    out: Path = setting(Path("runs/posttrain"), "folder of all stages; gone on with if it is there")
    iterations: int = setting(2, "times that specialists are trained, and distilled into a student")
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
        if self.iterations < 1 or self.measured < 1:
            raise UserError(f"iterations={self.iterations} and measured={self.measured} must be at least 1")


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to train; write nautilus posttrain MODEL, a run, a checkpoint folder or a hub id")
    asked = replace(settings.specialist, tasks=settings.tasks, seed=settings.seed)
    tasks, how = {one.task.name: words for one, words in zip(wanted(asked), settings.tasks, strict=True)}, wanted(asked)
    keep_memory()
    run = continue_or_create(settings.out, to_dict(settings))
    do = partial(stage, run, settings.seed)
    taught = settings.supervised.tasks or settings.tasks
    base = student = do("sft", sft, settings.supervised, model=settings.model, tasks=taught)
    models = {"sft": base}
    for number in range(1, settings.iterations + 1):
        teachers = {
            name: do(f"{number}-{name}", rlvr, settings.specialist, model=str(student), tasks=(words,))
            for name, words in tasks.items()
        }
        routes = tuple(f"{name}={place}" for name, place in teachers.items())
        given = {"model": str(student), "tasks": settings.tasks, "teachers": routes}
        student = do(f"{number}-student", mopd, settings.student, **given)
        models |= {f"{name} specialist {number}": place for name, place in teachers.items()}
        models[f"student {number}"] = student
    if settings.baselines:
        models |= baselines(settings, run, base, tasks)
    drafts = None
    if nautilus.load(student)[0].config.mtp:
        file = questions(run.state / "questions.jsonl", how, settings.drafts.answers + settings.drafts.measured)
        drafts = do("boost", boost, settings.drafts, model=str(student), prompts=(f"{file}#prompt",))
    scores = dict[str, dict[str, Score]]()
    for name, place in models.items():
        model, tokenizer = nautilus.load(place)
        given = {"tasks": how, "count": settings.measured, "settings": asked, "tokenizer": tokenizer}
        scores[name] = examined(run, name.replace(" ", "_"), model, **given)
        if place == student:
            by_budget = curve(run, model, settings.budgets, **given)
    title = f"{Path(settings.model).name}: one student of {len(tasks)} teachers"
    more = told_of(scores, [*tasks], settings.iterations, minutes=read_json(minutes(run)), drafts=drafts)
    report.show(run, scores, title=title, facts={"model": settings.model, "seed": str(settings.seed)},
                curve=by_budget, more=more)  # fmt: skip


def stage(run: Run, seed: int, name: str, recipe: ModuleType, settings: Any, **given: Any) -> Path:
    """The run of a recipe, which is not done again where it has its report."""
    out = run.folder / name
    if not (out / "report.html").is_file():
        Console(highlight=False).rule(name)
        begin = time.monotonic()
        recipe.main(replace(settings, out=out, seed=seed, **given))
        known = read_json(minutes(run)) if minutes(run).is_file() else {}
        write_atomic(minutes(run), json.dumps({**known, name: (time.monotonic() - begin) / 60}) + "\n")
    return out


def minutes(run: Run) -> Path:
    return run.state / "minutes.json"


def baselines(settings: Settings, run: Run, base: Path, tasks: dict[str, str]) -> dict[str, Path]:
    """Made of the first specialists, or with as many rollouts as they had."""
    do, teachers = partial(stage, run, settings.seed), {name: run.folder / f"1-{name}" for name in tasks}
    mean = averaged([*teachers.values()], run.folder / "mean")
    given = replace(settings.specialist, seed=settings.seed)
    file = written_by(teachers, tasks, given, LEARNT // len(tasks), run.state / "written")
    mixed = replace(settings.specialist, steps=settings.specialist.steps * len(tasks))
    learnt = replace(settings.supervised, tasks=(), problems=1, steps=settings.student.steps)
    return {
        "mean of specialists": mean,
        "their answers learnt": do("learnt", sft, learnt, model=str(base), data=(file,)),
        "all at once": do("all", rlvr, mixed, model=str(base), tasks=settings.tasks),
    }
