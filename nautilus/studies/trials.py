"""Many trainings carried through, a few at a time, each in a process of its own.

    out/<variant>/seed_0/               the run of one training
    out/<variant>/seed_0/result.json    what it came to; written last
    out/<variant>/seed_0.log            what it printed

A training with a result is not repeated, one without goes on from its last saved state. One that fails leaves its log
and does not stop the others. Processes end, after saving, when this one is asked to stop or is killed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nautilus.runtime import UserError, flat_settings, read_json, write_atomic
from nautilus.runtime.progress import screen
from nautilus.train.continuing import kept
from nautilus.train.interrupt import stop_signals

Work = Callable[[Any], Mapping[str, float]]
TAIL = 1 << 14  # bytes at the end of a file of metrics that surely hold a whole row


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training: its settings, of which `out` is its folder."""

    variant: str
    seed: int
    settings: Any

    @property
    def folder(self) -> Path:
        return self.settings.out

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def scores(self) -> dict[str, float] | None:
        """What it came to; None while it has not. A UserError where that was with other settings."""
        if not self.result.is_file():
            return None
        found = read_json(self.result)
        if not all(isinstance(found.get(name), dict) for name in ("settings", "scores")):
            raise UserError(f"{self.result} is no result of a training; remove it, and it is written anew")
        before, now = (dict(flat_settings(each)) for each in (found["settings"], plain(self.settings)))
        names = [n for n in before.keys() | now.keys() if before.get(n) != now.get(n) and n != "out"]
        if names:
            raise UserError(
                f"{self.folder} was trained with other settings: {', '.join(sorted(names))}; use the same, choose "
                f"another folder with out=, or remove this one"
            )
        return found["scores"]

    @property
    def log(self) -> Path:
        """Beside the run and not in it: a new run wants an empty folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def steps_done(self) -> int:
        """Of a training under way, by its file of metrics; the whole of one that has a result."""
        if self.result.is_file():
            return self.settings.steps
        torn = OSError, ValueError, IndexError, KeyError  # not begun, or its last row is being written
        with contextlib.suppress(*torn), open(self.folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            return json.loads(file.read().splitlines()[-1])["step"] + 1
        return 0

    def why(self, code: int) -> str:
        """Why it failed: the last words of its log."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.is_file() else []
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        killed = f"killed by signal {-code}; " if code < 0 else ""
        return f"{killed}{said.removeprefix('nautilus.runtime.errors.UserError: ')}"


def plain(settings) -> Any:
    return json.loads(json.dumps(kept(settings), default=str))


def run_trials(trials: Sequence[Trial], work: Work, *, jobs: int, threads: int) -> dict[tuple[str, int], str]:
    """Carries out, in this order, what has no result yet; (variant, seed) of what failed, and why.

    work: trains and measures; it is called in another process, so it is a function of a module. SystemExit when asked
    to stop, by a signal.
    """
    waiting, failed = [trial for trial in trials if trial.scores is None], {}
    running: dict[SpawnProcess, Trial] = {}
    with board(trials) as show, stop_signals(True) as stop:
        try:
            while (waiting or running) and not stop.asked:
                while waiting and len(running) < jobs:
                    trial = waiting.pop(0)
                    running[start(trial, work, threads)] = trial
                wait([process.sentinel for process in running], timeout=0.5)
                for process in [each for each in running if each.exitcode is not None]:
                    trial = running.pop(process)
                    if not trial.result.is_file():
                        failed[trial.variant, trial.seed] = trial.why(process.exitcode or 0)
                    show(trial, failed.get((trial.variant, trial.seed)))
                show()
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
    if stop.asked:
        raise SystemExit(f"stopped by {stop.asked}; the same command again goes on")
    return failed


@contextlib.contextmanager
def board(trials: Sequence[Trial]) -> Iterator[Callable[..., None]]:
    """A bar over the steps of all trainings with the time left, and a line that stays for each that has ended."""
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
    bars = Progress(*columns, console=screen())
    whole = sum(trial.settings.steps for trial in trials)
    task = bars.add_task("steps", total=whole, completed=sum(trial.steps_done for trial in trials))

    def show(trial: Trial | None = None, error: str | None = None) -> None:
        bars.update(task, completed=sum(each.steps_done for each in trials))
        if trial is not None:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in (trial.scores or {}).items())
            bars.console.print(f"{trial.variant} seed {trial.seed}: {error or scores}", markup=False, highlight=False)

    with bars:
        yield show


def start(trial: Trial, work: Work, threads: int) -> SpawnProcess:
    """A new interpreter: one that is forked would share threads that are not there."""
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=carry_out, args=(trial, work, threads))
    process.start()
    return process


def carry_out(trial: Trial, work: Work, threads: int) -> None:
    """In the process of one training."""
    os.setsid()  # Ctrl-C is for the parent, which then asks this process to save and stop
    threading.Thread(target=follow_parent, daemon=True).start()
    with open(trial.log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    scores = dict(work(trial.settings))
    found = {"settings": plain(trial.settings), "scores": scores}
    write_atomic(trial.result, json.dumps(found, indent=1) + "\n")


def follow_parent() -> None:
    """A killed parent asks for nothing, so its end is watched."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
