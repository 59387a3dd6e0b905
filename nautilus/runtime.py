"""What every job needs around its work: errors for people, files never half written, a run folder, a progress line."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self


class UserError(ValueError):
    """A mistake a person can mend. The message says what was asked, which values clash, and what to do."""


# ----- files ---------------------------------------------------------------------------------------------------------


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_REFUSES = (errno.EACCES, errno.EPERM, errno.EROFS)


def disk_full(path: Path) -> UserError:
    """The error for a full disk; also for writers that report one in a way of their own."""
    free = shutil.disk_usage(first_existing(path)).free
    return UserError(
        f"cannot write {path}: the disk is full ({free / 1e6:,.0f} MB free); free some space or choose another"
        f" folder, then start again. What was saved before is untouched."
    )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, a full or refusing disk becomes a UserError about `path`; any other error passes through."""
    try:
        yield
    except OSError as bad:
        if bad.errno in DISK_FULL:
            raise disk_full(path) from bad
        if bad.errno in DISK_REFUSES:
            raise UserError(
                f"cannot write {path}: {bad.strerror} ({bad.filename or first_existing(path)});"
                f" choose a folder you may write to, or change its permissions."
            ) from bad
        raise


def first_existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file as a whole: a reader, or a crash at any moment, sees the old content or the new."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            with open(beside, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends well it replaces `path` as a whole.

    The files reach the disk first; then path -> .old, new -> path, and .old is removed. A crash between the two
    renames leaves no `path` but a complete .old, which `repair` puts back. A block that fails changes nothing.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not repair(path):
            raise UserError(f"cannot write {path}: another process is writing it now; wait for it or choose another")
        fresh = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        fresh.mkdir()
        lock = os.open(fresh, os.O_RDONLY)
        try:
            # The lock tells `repair` that this half-written folder has a living owner; the kernel drops it with us.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield fresh
            for place, _, names in os.walk(fresh):
                for name in (*names, "."):
                    to_disk(Path(place, name))
            swap(fresh, path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            os.close(lock)


def swap(fresh: Path, path: Path) -> None:
    try:
        if path.exists():
            path.rename(old_name(path))
        fresh.rename(path)
        to_disk(path.parent)
    finally:
        settle(path)


def settle(path: Path) -> None:
    """At most one of `path` and its .old may stay: the newer complete one."""
    old = old_name(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(path)


def repair(path: str | Path) -> bool:
    """Finish or undo what a killed `atomic_folder(path)` left. False, and nothing done, while one is still at work."""
    path = Path(os.path.realpath(path))
    leftovers = sorted(path.parent.glob(f".{path.name}.tmp-*"))
    if any(is_locked(folder) for folder in leftovers):
        return False
    settle(path)
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def is_locked(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def old_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----- memory --------------------------------------------------------------------------------------------------------


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor instead of handing it back; False on other systems.

    A training step frees and asks for the same large tensors again and again, and each fresh one costs a page fault
    per 4 KiB. The price: the process keeps its largest size to the end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(arena_max, 1))


# ----- the run folder ------------------------------------------------------------------------------------------------


class Run:
    """One stage's output folder, which the next stage reads.

    config.json    the stage's settings          model/         a plain Hugging Face checkpoint folder
    metrics.jsonl  one line per step             state/         what resuming needs
    report.html    for people
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.json"
        self.model = self.folder / "model"
        self.state = self.folder / "state"
        self.metrics = self.folder / "metrics.jsonl"
        self.report = self.folder / "report.html"

    @staticmethod
    def create(folder: str | Path, settings: dict) -> Run:
        """A new run in a new or empty folder."""
        run = Run(folder)
        with disk_errors(run.folder):
            if run.folder.exists() and not run.folder.is_dir():
                raise UserError(f"cannot create a run in {folder}: it is a file; choose another folder")
            run.folder.mkdir(parents=True, exist_ok=True)
            found = sorted(place.name for place in run.folder.iterdir() if not place.name.startswith("."))
        if found:
            raise UserError(
                f"cannot create a run in {folder}: it already holds {', '.join(found[:4])}; choose another folder,"
                f" resume the run that is there, or remove it."
            )
        write_atomic(run.config, json.dumps({"nautilus_run": 1, "settings": settings}, indent=2, default=str) + "\n")
        return run

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

    @property
    def settings(self) -> dict:
        return json.loads(self.config.read_text())["settings"]


def continue_or_create(folder: str | Path, settings: dict) -> Run:
    """The run that is in the folder, to be resumed, or a new one. A resumed run must have been begun with the same
    settings, `out` aside; otherwise a UserError names those that differ."""
    if not is_run(folder):
        return Run.create(folder, settings)
    run = Run.open(folder)
    begun, asked = (dict(flat_settings(json.loads(json.dumps(s, default=str)))) for s in (run.settings, settings))
    names = sorted(name for name in begun.keys() | asked.keys() if begun.get(name) != asked.get(name) and name != "out")
    if names:
        pairs = ", ".join(f"{name} (begun with {begun.get(name)}, now {asked.get(name)})" for name in names[:4])
        raise UserError(
            f"cannot go on with the run in {folder}: these settings differ: {pairs};"
            f" use the same, choose another folder with out=, or remove this one."
        )
    return run


def flat_settings(value, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, plain value) of every setting inside."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat_settings(inner, f"{name}.{key}" if name else str(key))


def is_run(folder: str | Path) -> bool:
    """Whether the folder is a run; a Hugging Face folder has a config.json too, but not a run's."""
    try:
        content = json.loads(Path(folder, "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and "nautilus_run" in content


# ----- progress ------------------------------------------------------------------------------------------------------


SHOWN = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_gb")
PLAIN_SECONDS = 10.0


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics file; a last line torn by a crash is left out."""
    if not Path(path).exists():
        return []
    return [row for _, row in parse_rows(Path(path).read_text(errors="replace"))]


def parse_rows(text: str) -> Iterator[tuple[str, dict]]:
    """Each line with its row, up to the first line that is none."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(row, dict):
            return
        yield line + "\n", row


class Progress:
    """One live line on stderr, one JSON line per step on disk. The file is the truth; the line is a view.

    `start` is the first step still to do: rows from there on, written after the checkpoint one resumes from, are
    dropped, so that no step occurs twice. Without a terminal the line is printed about every ten seconds instead.
    """

    def __init__(self, path: str | Path, total: int, start: int = 0, *, shown=SHOWN, clock=time.monotonic):
        self.path, self.total, self.start, self.shown, self.clock = Path(path), total, start, shown, clock

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True, soft_wrap=True)
        with disk_errors(self.path):
            self.drop_rows_from_start()
            self.file = open(self.path, "a")
        self.began = self.clock()
        self.printed = -math.inf
        self.bars = None
        if self.console.is_terminal:
            columns = BarColumn(20), TextColumn("{task.fields[body]}", markup=False)
            self.bars = Bars(*columns, console=self.console, refresh_per_second=4, transient=False)
            self.task = self.bars.add_task("", total=self.total, completed=self.start, body="starting")
            self.bars.start()
        return self

    def drop_rows_from_start(self) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(errors="replace")
        kept = ""
        for line, row in parse_rows(text):
            if row.get("step", -1) >= self.start:
                break
            kept += line
        if kept != text:
            write_atomic(self.path, kept)

    def __call__(self, metrics: dict) -> None:
        with disk_errors(self.path):
            self.file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
            self.file.flush()
        done = metrics["step"] + 1
        body = self.describe(done, metrics)
        if self.bars is not None:
            self.bars.update(self.task, completed=done, body=body)
        elif done == self.total or self.clock() - self.printed >= PLAIN_SECONDS:
            self.printed = self.clock()
            self.say(body)

    def describe(self, done: int, metrics: dict) -> str:
        """`120/500  loss 3.21  lr 0.001  2.4 steps/s  2:38 left`."""
        values = [
            f"{name} {number(metrics[name])}" for name in self.shown if isinstance(metrics.get(name), int | float)
        ]
        rate = (done - self.start) / max(self.clock() - self.began, 1e-9)
        left = (self.total - done) / max(rate, 1e-9)
        speed = f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.3g} s/step"
        return "  ".join([f"{done}/{self.total}", *values, speed, f"{clock_time(left)} left"])

    def say(self, text: str) -> None:
        """A line for people that stays; with a live line, above it."""
        self.console.print(text, markup=False, highlight=False)

    def __exit__(self, *error) -> None:
        if self.bars is not None:
            self.bars.stop()
        with disk_errors(self.path):
            self.file.close()


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finite(value):
    """The same metrics in strict JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clock_time(seconds: float) -> str:
    """Seconds as 0:42, 12:03 or 3:07:55."""
    minutes, seconds = divmod(round(min(seconds, 1e8)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
