"""The stages of post-training, one after another; questions for the next one; what else can be made of specialists."""

from __future__ import annotations

import itertools
import json
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
from nautilus.posttrain.blend import domain
from nautilus.posttrain.compared import Load
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.written import written
from nautilus.runtime import Run, UserError, read_json, refuse_others, write_atomic
from nautilus.tasks.asked import Asked, asked


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Runs of recipes below one run, each done once."""

    run: Run
    seed: int

    def __post_init__(self):
        self.run.state.mkdir(exist_ok=True)

    def __call__(self, name: str, recipe: ModuleType, settings: Any, **given: Any) -> Path:
        """The run of a recipe, which is not done again where it is done. UserError where it was told otherwise then."""
        out = self.run.folder / name
        told = replace(settings, out=out, seed=self.seed, **given)
        if self.done(name):
            refuse_others(Run(out), to_dict(told), but={"out", "weights", *given})
            return out
        Console(highlight=False).rule(name)
        begin = time.monotonic()
        recipe.main(told)
        took = {**self.minutes, name: (time.monotonic() - begin) / 60}
        write_atomic(self.run.state / "minutes.json", json.dumps(took) + "\n")
        return out

    def done(self, name: str) -> bool:
        return (self.run.folder / name / "report.html").is_file()

    @property
    def minutes(self) -> dict[str, float]:
        """That each took; of one that was interrupted, since it was gone on with."""
        file = self.run.state / "minutes.json"
        return read_json(file) if file.is_file() else {}


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
