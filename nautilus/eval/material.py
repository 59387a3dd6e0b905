"""What a report is made from: a run's settings, metrics and measurements, and the series read out of the metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from nautilus.config import Config
from nautilus.eval.charts import Line
from nautilus.eval.loss import HeldOut
from nautilus.eval.page import plain

LAST = 0.2  # of the updates
POINTS = 400  # of a line in a chart: more cannot be seen, and would only make the file large


@dataclass(frozen=True, kw_only=True)
class Sample:
    prompt: str
    completion: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report shows. `rows` are the lines of metrics.jsonl; `commands` map a purpose to a command line."""

    title: str
    config: Config
    settings: Mapping = field(default_factory=dict)
    rows: Sequence[Mapping] = ()
    held_out: HeldOut | None = None
    samples: Sequence[Sample] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return max((row["tokens"] for row in self.rows if is_number(row.get("tokens"))), default=0)

    @property
    def seconds(self) -> float:
        """Time spent in steps: each step's tokens over its rate. Saves, pauses and evaluation are not in it."""
        total, before = 0.0, 0
        for row in self.rows:
            if is_number(row.get("tokens_per_s")) and row["tokens_per_s"] > 0 and is_number(row.get("tokens")):
                total += (row["tokens"] - before) / row["tokens_per_s"]
                before = row["tokens"]
        return total

    @property
    def memory_gb(self) -> float:
        return max((row["memory_gb"] for row in self.rows if is_number(row.get("memory_gb"))), default=0.0)


def series(rows: Sequence[Mapping], key: str, name: str = "") -> Line | None:
    """One metric over the steps that have it. Values that were no number (null in the file) are left out."""
    found = [row for row in rows if "step" in row and is_number(row.get(key))]
    return Line(name or key, [row["step"] for row in found], [row[key] for row in found]) if found else None


def last_loss(line: Line) -> float:
    """The mean loss of the next token, in nats, over the last updates: of text not seen before, where none comes twice.

    Held-out text is scored with unrounded matrices; here what a format costs in the forward pass counts, and a mean
    over many updates wanders less than one state of the weights."""
    begin = line.steps[-1] * (1 - LAST)
    return statistics.fmean(value for step, value in zip(line.steps, line.values, strict=True) if step >= begin)


def is_number(value: object) -> bool:
    """One that can be drawn and added up: finite, and no whole number that floats do not reach."""
    return isinstance(value, int | float) and abs(value) < 1e300


def family(rows: Sequence[Mapping], prefix: str) -> list[Line]:
    """The series of all metrics called prefix + something, in the order of the file, named by that something."""
    found: dict[str, Line] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and "step" in row and is_number(value):
                if key not in found:
                    found[key] = Line(plain(key.removeprefix(prefix)), [], [])
                found[key].steps.append(row["step"])
                found[key].values.append(value)
    return [*found.values()]


def smooth(line: Line) -> Line:
    """The mean of about a fortieth of the line around each point, with the line itself faint behind it.

    The window is centred, so a steep start is not delayed; at the end, where half of it is missing, it looks back only.
    """
    last, sums = len(line.values) - 1, [0.0, *accumulate(line.values)]
    reach = math.ceil(len(line.values) / 80)
    spans = [(i - min(i, reach), min(last, i + min(i, reach)) + 1) for i in range(len(line.values))]
    return line._replace(values=[(sums[high] - sums[low]) / (high - low) for low, high in spans], faint=line.values)


def thin(line: Line, points: int = POINTS) -> Line:
    """At most about `points` points: the first, the last, and the mean of each stretch between."""
    stride = math.ceil((len(line.steps) - 2) / max(1, points - 2))
    if stride <= 1:
        return line
    return Line(
        line.name,
        stretches(line.steps, stride),
        stretches(line.values, stride),
        None if line.faint is None else stretches(line.faint, stride),
    )


def stretches(values: Sequence[float], stride: int) -> list[float]:
    inner = values[1:-1]
    parts = [inner[low : low + stride] for low in range(0, len(inner), stride)]
    return [values[0], *(math.fsum(part) / len(part) for part in parts), values[-1]]
