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
from nautilus.posttrain.compared import Judged, Load
from nautilus.posttrain.practice import Practice, routes, wanted
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
        begin = time.monotonic()
        recipe.main(told)
        known = {"minutes": (time.monotonic() - begin) / 60, "done": time.time(), "of": [one.name for one in of]}
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

    def forget_older(self, of: Sequence[Path], place: Path) -> None:
        """What was made of stages without a recipe is made again where these were."""
        if place.exists() and place.stat().st_mtime < max(self.known[one.name]["done"] for one in of):
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
    split: str = "test"

    def __call__(self, name: str, place: Path) -> dict[str, Score]:
        model, how = self.opened(place)
        return examined(self.run, filed(name), model, split=self.split, **how)

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


def filed(name: str) -> str:
    """A name as that of a file or a folder."""
    return name.replace(" ", "_").replace("/", "_")


def alone(settings: Judged, task: str = "", words: str = "", *, share: float) -> Any:
    """Of a specialist in one of the tasks, which has its own judge, with a share of the steps."""
    judges = tuple(one for one in settings.judges if one.startswith(f"{task}="))
    return replace(settings, tasks=(words,), judges=judges, steps=max(1, round(share * settings.steps)))


def unsuited(settings: Judged, tasks: Sequence[str], *, together: bool) -> None:
    """UserError for specialists that judge a task nobody is trained on; together: or that cannot be trained on all."""
    if strange := routes(settings.judges, "judge").keys() - {*tasks}:
        raise UserError(f"a judge of {', '.join(sorted(strange))} was named; what is taught is {', '.join(tasks)}")
    if together:
        wanted(settings)


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
    for name, place in teachers.items():
        model, tokenizer = load(str(place))
        one = asked(tasks[name])
        problems = domain(one.task, count, levels=one.levels, seed=number_of(settings.seed, 7)).problems
        pairs = [(one.task, problem) for problem in problems]
        how = replace(settings, tasks=(tasks[name],))
        teacher = settings.computing(model).requires_grad_(False).eval()
        file = written(folder / filed(name), teacher, tokenizer, pairs, how)
        parts.append(file.read_text())
    write_atomic(whole, "".join(parts))
    return whole
