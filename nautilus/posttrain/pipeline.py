"""The stages of post-training, one after another; questions for the next one; what else can be made of specialists."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from nautilus.config import to_dict
from nautilus.data.mix import number_of
from nautilus.model.language import Language
from nautilus.posttrain.blend import domain
from nautilus.posttrain.compared import Judged, Load, judges_of
from nautilus.posttrain.practice import Practice, wanted
from nautilus.posttrain.profile import Score, curve, examined, filed
from nautilus.posttrain.written import written
from nautilus.runtime import Run, UserError, is_run, read_json, refuse_others, write_atomic
from nautilus.tasks.asked import Asked, asked
from nautilus.train.optim import OptimConfig

PLACES = {"model", "teachers", "prompts", "data"}  # settings that say where something lies
# Which change no result, or are watched by the stages themselves.
UNSEEN = {"out", "weights", "teaching", "together", "actors", "teacher_actors", "seconds", "save_every"}


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Runs of recipes below one run, each done once. state/stages.json has the minutes that each took, of one that was
    interrupted those since it was gone on with, when it was done, in seconds since 1970, and of which it was made."""

    run: Run
    seed: int

    def __post_init__(self):
        self.run.state.mkdir(exist_ok=True)

    def __call__(
        self, name: str, recipe: ModuleType, settings: Any, *, of: Sequence[Path] = (), **given: Any
    ) -> Path:  # fmt: skip
        """The run of a recipe, which is not done again where it is done. of: stages that it is made of; given: settings
        that the pipeline gives. UserError where it was told otherwise then, or was made of others."""
        out = self.run.folder / filed(name)
        name = out.name
        told = replace(settings, out=out, seed=self.seed, **given)
        if self.done(name):
            self.refuse_older(name, [one.name for one in of])
            refuse_others(Run(out), to_dict(told), but={*UNSEEN, *(given.keys() & PLACES)})
            return out
        Console(highlight=False).rule(name)
        begin, before = time.monotonic(), self.known.get(name) if is_run(out) else None
        recipe.main(told)
        done = before["done"] if before else time.time()  # what lacked a part of it is still what it was
        known = {"minutes": (time.monotonic() - begin) / 60, "done": done, "of": [one.name for one in of]}
        write_atomic(self.file, json.dumps({**self.known, name: known}, indent=1) + "\n")
        return out

    def lesson(
        self, name: str, teachers: Mapping[str, Path], tasks: Mapping[str, str], settings: Practice, count: int,
        folder: Path, load: Load,
    ) -> Path:  # fmt: skip
        """What each teacher answers to so many problems of its task, right or wrong, as conversations in one file, for
        the stage of this name; the file as it is where that is done."""
        whole, parts = folder / "conversations.jsonl", list[str]()
        for task, place in () if self.done(name) else teachers.items():
            model, tokenizer = load(str(place))
            one, how = asked(tasks[task]), replace(settings, tasks=(tasks[task],), seed=self.seed)
            problems = domain(one.task, count, levels=one.levels, seed=number_of(self.seed, 7)).problems
            teacher, pairs = how.computing(model).requires_grad_(False).eval(), [(one.task, each) for each in problems]
            parts.append(written(folder / filed(task), teacher, tokenizer, pairs, how).read_text())
        if parts:
            write_atomic(whole, "".join(parts))
        return whole

    def done(self, name: str) -> bool:
        run = Run(self.run.folder / name)
        return name in self.known and run.report.is_file() and run.model.is_dir()

    def refuse_older(self, name: str, of: Sequence[str]) -> None:
        """UserError where a stage is older than those that it is made of, or was made of others."""
        known = self.known
        if {*(made := known[name].get("of", of))} != {*of}:
            raise UserError(
                f"{self.run.folder / name} was made of {', '.join(made)}, and is now to be made of {', '.join(of)};"
                " remove it, and what was made of it, to have it made again"
            )
        if later := [one for one in of if known[one]["done"] > known[name]["done"]]:
            raise UserError(
                f"{self.run.folder / name} was made before {', '.join(later)} was made again; remove it, and what was"
                " made of it, to have it made again too"
            )

    def forget_older(self, of: Sequence[Path], place: Path) -> None:
        """What was made of stages without a recipe is made again where these were."""
        if place.exists() and place.stat().st_mtime < max(self.known[one.name]["done"] for one in of):
            shutil.rmtree(place)

    @property
    def file(self) -> Path:
        return self.run.state / "stages.json"

    @property
    def known(self) -> dict[str, dict[str, Any]]:
        cure = "remove it; stages that are whole are found so once more"
        found = read_json(self.file, cure) if self.file.is_file() else {}
        for name, one in found.items():
            told = isinstance(one, dict) and [one.get("minutes"), one.get("done")]
            if not told or not all(isinstance(value, int | float) for value in told):
                raise UserError(f"{self.file} does not say how long {name} took and when it was done; {cure}")
        return found

    @property
    def minutes(self) -> dict[str, float]:
        return {name: one["minutes"] for name, one in self.known.items()}


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The same problems for every model, so many of each task, asked as `settings` say."""

    run: Run
    tasks: Sequence[Asked]
    count: int
    settings: Practice
    load: Load
    split: str = "test"

    def __call__(self, name: str, place: Path) -> dict[str, Score]:
        model, how = self.opened(place)
        return examined(self.run, name, model, split=self.split, **how)

    def caught_up(
        self, task: str, models: Mapping[str, Path], base: str, teacher: str, student: str, *, share: float
    ) -> bool:
        """A student has so much of what its teacher of a task had gained over the base that it grew from; with 0 it
        need not be asked. All three are names of `models`. They are asked what no model is reported on."""
        if not share:
            return True
        alone = replace(self, tasks=[one for one in self.tasks if one.task.name == task], split="valid")
        before, best, now = (alone(f"{name} on {task}", models[name])[task].mean for name in (base, teacher, student))
        return now - before >= share * (best - before)

    def by_budget(self, place: Path, budgets: Sequence[int]) -> dict[int, dict[str, Score]]:
        model, how = self.opened(place)
        return curve(self.run, model, budgets, **how)

    def opened(self, place: Path) -> tuple[Language, dict[str, Any]]:
        """The model, and how it is asked."""
        model, tokenizer = self.load(str(place))
        how = {"tasks": self.tasks, "count": self.count, "settings": self.settings, "tokenizer": tokenizer}
        return self.settings.computing(model).requires_grad_(False).eval(), how


def alone(settings: Judged, task: str = "", words: str = "", *, share: float) -> Any:
    """Of a specialist in one of the tasks, which has its own judge, with a share of the steps."""
    if not 0 < share <= 1:
        raise UserError(f"again={share} must be more than 0 and at most 1")
    judges = tuple(one for one in settings.judges if one.startswith(f"{task}="))
    return replace(settings, tasks=(words,), judges=judges, steps=max(1, round(share * settings.steps)))


def passed_on(supervised: Any, optim: OptimConfig, steps: int) -> Any:
    """How answers of others are learnt: with the student's rates, in so many steps or, with 0, once."""
    return replace(supervised, tasks=(), problems=1, steps=steps, optim=replace(optim, warmup=-1))


def unsuited(settings: Judged, tasks: Sequence[Asked], load: Load, *, together: bool) -> None:
    """UserError for specialists with judges that are none; together: or that cannot be trained on all tasks."""
    judges_of(settings, [one.task for one in tasks], load)
    if together:
        wanted(settings)


def refuse_given(settings: Any, given: Mapping[str, Sequence[str]]) -> None:
    """UserError where a stage is told what the pipeline tells it: these fields, its model, folder and seed."""
    for name, field in ((name, field) for name, fields in given.items() for field in ("model", "out", "seed", *fields)):
        stage = getattr(settings, name)
        if (value := getattr(stage, field)) != getattr(type(stage)(), field):
            raise UserError(f"{name}.{field}={value} was asked for, which the pipeline gives; leave it out")


def questions(path: Path, tasks: Sequence[Asked], count: int, seed: int = 0) -> Path:
    """So many problems of the tasks in turn, as JSON lines with the last message of each as `prompt`."""
    share = -(-count // len(tasks))
    found = [domain(one.task, share, levels=one.levels, seed=seed).problems for one in tasks]
    mixed = [one for some in itertools.zip_longest(*found) for one in some if one is not None]
    lines = (json.dumps({"prompt": one.messages[-1]["content"]}) + "\n" for one in mixed)
    write_atomic(path, "".join(dict.fromkeys(lines)))
    return path


def averaged(runs: Sequence[Path], folder: Path, load: Load) -> Path:
    """A checkpoint folder with the mean of their weights, each with the same say."""
    if not folder.is_dir():
        model, tokenizer = load(str(runs[0]))
        others = [load(str(place))[0].state_dict() for place in runs[1:]]
        for name, mine in model.state_dict().items():
            same = [mine, *(weights[name] for weights in others)]
            mine.copy_(torch.stack([one.double() for one in same]).mean(0))
        model.save(folder, tokenizer=tokenizer, facts={"mean of": ", ".join(place.name for place in runs)})
    return folder
