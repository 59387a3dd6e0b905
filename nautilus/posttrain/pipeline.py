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
from nautilus.posttrain.compared import Load
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.profile import Score, curve, examined
from nautilus.posttrain.written import written
from nautilus.runtime import Run, UserError, read_json, refuse_others, write_atomic
from nautilus.tasks.asked import Asked, asked

PLACES = {"model", "teachers", "prompts", "data"}  # settings that say where something lies
UNSEEN = {"out", "weights", "together", "actors", "teacher_actors", "seconds", "save_every"}  # which change no result


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Runs of recipes below one run, each done once. state/stages.json has the minutes that each took, of one that was
    interrupted those since it was gone on with, when it was done, in seconds since 1970, and of which it was made."""

    run: Run
    seed: int

    def __post_init__(self):
        self.run.state.mkdir(exist_ok=True)

    def __call__(
        self, name: str, recipe: ModuleType, settings: Any, *, of: Sequence[str] = (), **given: Any
    ) -> Path:  # fmt: skip
        """The run of a recipe, which is not done again where it is done. of: stages that it is made of; given: settings
        that the pipeline gives. UserError where it was told otherwise then, or was made of others."""
        out = self.run.folder / name
        told = replace(settings, out=out, seed=self.seed, **given)
        if self.done(name):
            self.refuse_older(name, of)
            refuse_others(Run(out), to_dict(told), but={*UNSEEN, *(given.keys() & PLACES)})
            return out
        Console(highlight=False).rule(name)
        begin = time.monotonic()
        recipe.main(told)
        known = {"minutes": (time.monotonic() - begin) / 60, "done": time.time(), "of": [*of]}
        write_atomic(self.file, json.dumps({**self.known, name: known}, indent=1) + "\n")
        return out

    def done(self, name: str) -> bool:
        return name in self.known and (self.run.folder / name / "report.html").is_file()

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

    def forget_older(self, of: Sequence[str], *places: Path) -> None:
        """What was made of stages without a recipe is made again where these were."""
        newest = max(self.known[one]["done"] for one in of)
        for place in places:
            if place.exists() and place.stat().st_mtime < newest:
                shutil.rmtree(place)

    @property
    def file(self) -> Path:
        return self.run.state / "stages.json"

    @property
    def known(self) -> dict[str, dict[str, Any]]:
        return read_json(self.file) if self.file.is_file() else {}

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

    def __call__(self, name: str, place: Path) -> dict[str, Score]:
        model, how = self.opened(place)
        return examined(self.run, name.replace(" ", "_"), model, **how)

    def caught_up(self, task: str, models: Mapping[str, Path], share: float) -> bool:
        """The last of the students among `models` has so much of what its teacher of the task, the last specialist,
        had gained over the model that it was trained from."""
        teacher = [name for name in models if name.startswith(f"{task} specialist ")][-1]
        number, student = int(teacher.split()[-1]), [name for name in models if name.startswith("student ")][-1]
        asked = f"student {number - 1}" if number > 1 else "sft", teacher, student
        before, best, now = (self(name, models[name])[task].mean for name in asked)
        return not share or now - before >= share * (best - before)

    def by_budget(self, place: Path, budgets: Sequence[int]) -> dict[int, dict[str, Score]]:
        model, how = self.opened(place)
        return curve(self.run, model, budgets, **how)

    def opened(self, place: Path) -> tuple[Language, dict[str, Any]]:
        """The model, and how it is asked."""
        model, tokenizer = self.load(str(place))
        how = {"tasks": self.tasks, "count": self.count, "settings": self.settings, "tokenizer": tokenizer}
        return self.settings.computing(model).requires_grad_(False).eval(), how


def refuse_given(name: str, settings: Any, fields: Sequence[str]) -> None:
    """UserError where a stage is told what the pipeline tells it: these fields, its model, folder and seed."""
    for field in ("model", "out", "seed", *fields):
        if (value := getattr(settings, field)) != getattr(type(settings)(), field):
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


def written_by(
    teachers: Mapping[str, Path], tasks: Mapping[str, str], settings: Practice, count: int, folder: Path, load: Load
) -> Path:
    """What each teacher answers to so many problems of its task, right or wrong, as conversations in one file."""
    whole, parts = folder / "conversations.jsonl", list[str]()
    if whole.is_file():
        return whole
    for name, place in teachers.items():
        model, tokenizer = load(str(place))
        one = asked(tasks[name])
        problems = domain(one.task, count, levels=one.levels, seed=number_of(settings.seed, 7)).problems
        pairs = [(one.task, problem) for problem in problems]
        how = replace(settings, tasks=(tasks[name],))
        file = written(folder / name, settings.computing(model).requires_grad_(False).eval(), tokenizer, pairs, how)
        parts.append(file.read_text())
    write_atomic(whole, "".join(parts))
    return whole
