"""The run folder, which one stage writes and the next one reads."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

from nautilus.runtime.errors import UserError, disk_errors
from nautilus.runtime.files import read_json, repair, write_atomic

CLAIMED: dict[Path, int] = {}  # lock files that this process holds until it ends
MANY = 3  # settings that only one of two runs has: their names would say less than that they are of two kinds


class Run:
    """One stage's output folder, which the next stage reads.

    config.json    the stage's settings          model/         a plain Hugging Face checkpoint folder
    metrics.jsonl  one line per step             state/         what resuming needs
    report.html    for people; report.png is its summary in one picture
    incidents.jsonl  one line per spike, if there was one; origin.json says where a run that went on from another began
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.json"
        self.model = self.folder / "model"
        self.state = self.folder / "state"
        self.metrics = self.folder / "metrics.jsonl"
        self.incidents = self.folder / "incidents.jsonl"
        self.report = self.folder / "report.html"
        self.picture = self.folder / "report.png"

    @staticmethod
    def create(folder: str | Path, settings: dict) -> Run:
        """A new run in a new or empty folder."""
        run = Run.vacant(folder)
        run.write_settings(settings)
        return run

    @staticmethod
    def vacant(folder: str | Path) -> Run:
        """A new or empty folder, for a run."""
        run = Run(folder)
        with disk_errors(run.folder):
            if run.folder.exists() and not run.folder.is_dir():
                raise UserError(f"cannot create a run in {folder}: it is a file; choose another folder")
            run.folder.mkdir(parents=True, exist_ok=True)
            found = sorted(place.name for place in run.folder.iterdir() if not place.name.startswith("."))
        if found:
            broken = (
                " Its config.json is damaged, or no run's." if "config.json" in found and not is_run(folder) else ""
            )
            raise UserError(
                f"cannot create a run in {folder}: it already holds {', '.join(found[:4])}; choose another folder,"
                f" resume the run that is there, or remove it.{broken}"
            )
        return run

    def write_settings(self, settings: dict) -> None:
        write_atomic(self.config, json.dumps({"nautilus_run": 1, "settings": settings}, indent=2, default=str) + "\n")

    @staticmethod
    def open(folder: str | Path) -> Run:
        """An existing run, after repairing what an interrupted save may have left."""
        run = Run(folder)
        if not is_run(folder):
            raise UserError(f"no run in {folder}: it has no config.json written by a recipe; check the path")
        with disk_errors(run.folder):
            repair(run.model)
            repair(run.state)
        return run

    def claim(self) -> Self:
        """Keeps other processes from training in this folder until this one ends; a UserError if one does."""
        path = self.folder.resolve() / ".lock"
        if path in CLAIMED:
            return self
        with disk_errors(self.folder):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"the run in {self.folder} is being trained by another process; wait for it, or choose another folder"
            ) from None
        CLAIMED[path] = handle
        return self

    @property
    def saved_step(self) -> int:
        """Updates made up to the newest saved state; 0 without one."""
        found = self.state.glob(f"step_{'[0-9]' * 9}")
        return max((int(folder.name.removeprefix("step_")) for folder in found), default=0)

    @property
    def settings(self) -> dict:
        found = read_json(self.config, "restore it from a copy, or choose another folder").get("settings")
        if not isinstance(found, dict):
            raise UserError(f"{self.config} holds no settings; restore it from a copy, or choose another folder")
        return found


def program() -> str:
    """How to call this program again, for commands that are shown to be pasted."""
    called = Path(sys.argv[0])
    if called.name != "nautilus":
        return "nautilus" if shutil.which("nautilus") else f"{Path(sys.executable).name} -m nautilus"
    found = shutil.which("nautilus")
    return "nautilus" if found and Path(found).samefile(called) else str(called)


def continue_or_create(folder: str | Path, settings: dict, *, free: Collection[str] = ()) -> Run:
    """The run that is in the folder, to be resumed, or a new one. A resumed run must have been begun with the same
    settings, `out` and those that are `free` aside; otherwise a UserError names those that differ. Free ones stay as
    they were, until `write_settings`. One that never saved a state begins anew."""
    if not is_run(folder):
        run = Run.vacant(folder).claim()
        if not is_run(folder):  # else another process was here between the two lines
            run.write_settings(settings)
            return run
    run = Run.open(folder).claim()
    if not run.state.is_dir() and not run.model.is_dir():
        run.write_settings(settings)
    refuse_others(run, settings, but={"out", *free})
    return run


def refuse_others(run: Run, settings: dict, *, but: Collection[str] = ("out",)) -> None:
    """UserError where the run was begun with other settings than these, those in `but` aside."""
    begun, asked = (
        {name: value for name, value in json.loads(json.dumps(one, default=str)).items() if name not in but}
        for one in (run.settings, settings)
    )
    cure = "choose another folder with out=, or remove this one"
    if len(begun.keys() ^ asked.keys()) > MANY:
        raise UserError(f"cannot go on with the run in {run.folder}: another command or version began it; {cure}")
    old, new = dict(flat_settings(begun)), dict(flat_settings(asked))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if names:
        pairs = ", ".join(f"{name} (begun with {old.get(name)}, now {new.get(name)})" for name in names)
        raise UserError(
            f"cannot go on with the run in {run.folder}: these settings differ: {pairs}; use the same, {cure}"
        )


def flat_settings(value, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, plain value) of every setting inside."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat_settings(inner, f"{name}.{key}" if name else str(key))


def last_part(value: object) -> object:
    """A card is for others: of a place on this machine it says the name, not the folders on the way."""
    return re.sub(r"(^|\*)(?:/|~|[A-Za-z]:\\)(?:[^#]*[/\\])?", r"\1", value) if isinstance(value, str) else value


def is_run(folder: str | Path) -> bool:
    """Whether the folder is a run; a Hugging Face folder has a config.json too, but not a run's."""
    path = Path(folder, "config.json")
    try:
        content = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "nautilus_run" in content
