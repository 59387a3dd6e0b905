"""Between the stages of post-training: questions for the next one, and what else can be made of specialists."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nautilus.data.mix import number_of
from nautilus.posttrain.blend import domain
from nautilus.posttrain.compared import Load
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.written import written
from nautilus.runtime import write_atomic
from nautilus.tasks.asked import Asked, asked


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
