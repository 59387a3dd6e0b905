"""One progress line for people, one JSON line for machines."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nautilus.runtime.errors import UserError, disk_errors
from nautilus.runtime.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = ("loss", "next_token", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_gb")
PLAIN_SECONDS = 10.0


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics file; a last line torn by a crash is left out, any other that is no row is an error."""
    return [row for _, row in lines_and_rows(Path(path))]


def lines_and_rows(path: Path) -> Iterator[tuple[str, dict]]:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            yield line + "\n", row
        elif number < len(lines):
            raise UserError(
                f"{path} line {number} is no row of metrics: {line[:60]!r}; remove that line, or restore the file"
            )


def parse_row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < 1 << 53 else None


def screen() -> Console:
    """Stderr, for people. When its reader has gone, as `tee` does on Ctrl-C, nothing more is shown and work goes on."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True

    return Screen(stderr=True, soft_wrap=True)


class Progress:
    """One live line on stderr, one JSON line per step on disk. The file is the truth; the line is a view.

    `start` is the first step still to do: rows from there on, written after the checkpoint one resumes from, are
    dropped, so that no step occurs twice. Without a terminal the line is printed about every ten seconds instead.
    `unit` is what people read for a step.
    """

    def __init__(self, path: str | Path, total: int, start: int = 0, *, shown=SHOWN, unit="step", clock=time.monotonic):
        self.path, self.total, self.start, self.shown, self.clock = Path(path), total, start, shown, clock
        self.unit = unit

    def __enter__(self) -> Self:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self.console = screen()
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

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is done inside is in neither the rate nor the time left."""
        begin = self.clock()
        try:
            yield
        finally:
            self.began += self.clock() - begin

    def drop_rows_from_start(self) -> None:
        kept = "".join(line for line, row in lines_and_rows(self.path) if row["step"] < self.start)
        if self.path.is_file() and self.path.read_text(errors="replace") != kept:
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
        speed = f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.3g} s/{self.unit}"
        return "  ".join([f"{done}/{self.total}", *values, speed, f"{clock_time(left)} left"])

    def say(self, text: str) -> None:
        """A line for people that stays; with a live line, above it."""
        with contextlib.suppress(OSError):  # of a terminal that is gone
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
