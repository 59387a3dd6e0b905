"""Tasks as a command line names them.

| words | |
|--|--|
| `sort` | the procedural task, all levels |
| `sort:1-3` | levels 1 to 3 |
| `sort:2*0.5` | level 2, with half the share of the others |
| `math@rows.jsonl` | rows of a file, judged as `math` |
| `pivot/store` | single turns of a task of several |
| `pivot@chats.jsonl` | the turns of recorded conversations that call tools |
| `rg/leg_counting` | a task of reasoning-gym, where that is installed |
| `verifiers@gsm8k` | an environment of verifiers, where both are installed |
| `gym@http://127.0.0.1:8000#rows.jsonl` | rows of a file, whose environment is asked at a URL, as NeMo Gym has it |
| `openenv@ws://127.0.0.1:8000` | an environment of OpenEnv |
| `task@mine.py#Even` | the class of that name in a Python file of your own; without a name the only one there |

What follows `://` is all of the address: such tasks have no levels.
"""

from __future__ import annotations

import math
import random
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nautilus.runtime import UserError, installing
from nautilus.tasks.gym import Gym
from nautilus.tasks.judging import Judge
from nautilus.tasks.named import TASKS
from nautilus.tasks.openenv import OpenEnv
from nautilus.tasks.pivot import Pivot, Recorded, turns_in
from nautilus.tasks.puzzle import Puzzle
from nautilus.tasks.rows import KINDS, Check, Rows, problem_of, rows_in
from nautilus.tasks.task import Task
from nautilus.tasks.verifiers import loaded

FORM = re.compile(
    r"(?P<what>\w+@\w+://[^*]+|[^:*]+)(?::(?P<low>\d{1,9})(?:-(?P<high>\d{1,9}))?)?(?:\*(?P<share>\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    task: Task
    levels: Sequence[int]
    share: float = 1.0


def asked(words: str) -> Asked:
    """UserError that says what there is."""
    found = FORM.fullmatch(words)
    if found is None:
        raise UserError(f"the task {words!r} was asked for; write NAME, NAME:1-3 or NAME:2*0.5, a file as KIND@FILE")
    task, share = named(found["what"]), float(found["share"] or 1)
    low, high = found["low"], found["high"]
    levels = task.levels if low is None else range(int(low), int(high or low) + 1)
    if not levels or levels[0] not in task.levels or levels[-1] not in task.levels:
        first, last = task.levels[0], task.levels[-1]
        raise UserError(f"{words!r} was asked for; {task.name} has levels {first} to {last}, the lower written first")
    if not 0 < share < math.inf:
        raise UserError(f"{words!r} was asked for, a share of {share:g}; leave the task out, or give more than 0")
    return Asked(task=task, levels=levels, share=share)


def named(what: str) -> Task:
    name, at, place = what.partition("@")
    if at and name == "verifiers":
        return loaded(place)
    if at and name == "task":
        return of_file(place)
    if at:
        return of_url(name, place) if "://" in place else of_rows(name, Path(place))
    if name.startswith("rg/"):
        try:
            return Puzzle(name.removeprefix("rg/"))
        except ImportError as bad:
            raise UserError(f"the task {name} needs the library reasoning-gym; {installing('rl')}") from bad
        except ValueError as bad:
            raise UserError(f"the task {name} was asked for: {bad}") from bad
    if name.startswith("pivot/"):
        return pivot_of(name.removeprefix("pivot/"))
    if name not in TASKS:
        rows = ", ".join([*KINDS, Judge.name])
        raise UserError(f"there is no task {name!r}; there are {', '.join(TASKS)}, and rows as {rows}@FILE")
    return TASKS[name]()


def of_file(place: str) -> Task:
    """An instance of a class that is defined in a Python file. What it defines does not stay among the modules that are
    imported, so that other processes are sent the class itself."""
    file, _, name = place.partition("#")
    module = Path(file).stem
    try:
        defined = runpy.run_path(file, run_name=module)
    except Exception as bad:  # of a program that somebody wrote
        raise UserError(f"the tasks in {file} could not be read: {type(bad).__name__}: {bad}") from bad
    own = {
        kind.__name__: kind
        for kind in defined.values()
        if isinstance(kind, type) and issubclass(kind, Task) and kind.__module__ == module
    }
    if (name or len(own) > 1) and name not in own:
        raise UserError(f"the task {name!r} of {file} was asked for; there is {', '.join(own) or 'none'}: {file}#NAME")
    if not own:
        raise UserError(f"{file} has no class that is a Task; see nautilus/tasks/letters.py for some")
    try:
        return (own[name] if name else own.popitem()[1])()
    except Exception as bad:
        raise UserError(f"the task {name or place} could not be made: {type(bad).__name__}: {bad}") from bad


def pivot_of(name: str) -> Task:
    task = named(name)
    if task.turns < 2:
        raise UserError(f"pivots of {name} were asked for, which has one turn; take {', '.join(several())}")
    return Pivot(task)


def several() -> list[str]:
    return [name for name, make in TASKS.items() if make().turns > 1]


def of_url(kind: str, place: str) -> Task:
    url, mark, file = place.partition("#")
    if kind == "openenv" and not mark:
        return OpenEnv(f"{kind}@{place}", url)
    if kind == "gym" and file:
        make = partial(Gym, f"{kind}@{place}", url)
        return read_rows(kind, Path(file), make, lambda row: problem_of(row, kind).id)
    raise UserError(f"the task {kind}@{place} was asked for; write openenv@URL, or gym@URL#ROWS.jsonl")


def of_rows(kind: str, path: Path) -> Task:
    if kind == Judge.name:
        return read_rows(kind, path, Judge, lambda row: Judge([row]).of_row(random.Random(0)).id)
    if kind == "pivot":
        return read_rows(kind, path, Recorded, lambda row: [problem_of(one, kind).id for one in turns_in(row)])
    if kind not in KINDS:
        raise UserError(f"rows of the task {kind!r} were asked for; there are {', '.join([*KINDS, Judge.name])}")
    return read_rows(kind, path, lambda rows: Rows(kind, rows), lambda row: problem_of(row, kind).id)


def read_rows(
    kind: str, path: Path, make: Callable[[list[dict[str, Any]]], Task], check: Check = lambda row: None
) -> Task:  # fmt: skip
    if path.is_dir() or not path.exists():
        what = "is no file" if path.is_dir() else "is not there"
        raise UserError(f"the rows of {kind} were to come from {path}, which {what}; write {kind}@FILE")
    try:
        if not (rows := [*rows_in(path, check)]):
            raise UserError(f"{path} has no rows; write one JSON object a line, or name another file")
        return make(rows)
    except (ValueError, OSError) as bad:
        raise UserError(str(bad)) from bad
