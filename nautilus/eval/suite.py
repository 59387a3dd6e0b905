"""The report of an evaluation: what a model scored in which task, with how many examples and how sure that is.

Shares of what was right have Wilson's interval, with z the normal quantile of 95 %,

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

which also holds for n of n. A score of an example may lie between 0 and 1, where it asks for several things: no such
scores of mean p vary more than shares do, so their interval is not wider than this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.table import Table

from nautilus.eval import charts
from nautilus.eval.charts import LIGHT, LINES
from nautilus.eval.figures import picture
from nautilus.eval.page import chart, grid, page, paragraph, section, table, text
from nautilus.eval.report import environment
from nautilus.runtime import Run, write_atomic
from nautilus.runtime.progress import finite

Z = 1.959964


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A task in one column: a length, or a metric. low, high: the 95 % interval, nan where there is none."""

    task: str
    column: str
    count: int
    score: float
    low: float
    high: float

    @property
    def shown(self) -> str:
        """0.917 (0.782–0.971) n 36"""
        interval = "" if math.isnan(self.low) else f" ({self.low:.3f}–{self.high:.3f})"
        return f"{self.score:.3f}{interval} n {self.count}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    title: str
    about: str
    command: str
    cells: Sequence[Cell]
    facts: Mapping[str, str] = field(default_factory=dict)
    examples: Sequence[Sequence[str]] = ()  # task, column, asked for, answered

    @property
    def tasks(self) -> list[str]:
        return [*dict.fromkeys(cell.task for cell in self.cells)]

    @property
    def columns(self) -> list[str]:
        return [*dict.fromkeys(cell.column for cell in self.cells)]

    @property
    def head(self) -> list[str]:
        return ["task", *self.columns]

    @property
    def rows(self) -> list[list[str]]:
        found = {(cell.task, cell.column): cell.shown for cell in self.cells}
        return [[task, *(found.get((task, column), "–") for column in self.columns)] for task in self.tasks]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` examples; nan where there is none."""
    if not count:
        return math.nan, math.nan
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    middle, whole = share + Z * Z / (2 * count), 1 + Z * Z / count
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def share(task: str, column: str, scores: Sequence[float]) -> Cell:
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    low, high = wilson(mean, len(scores))
    return Cell(task=task, column=column, count=len(scores), score=mean, low=low, high=high)


def summary(found: Evaluation) -> Table:
    shown = Table(*found.head, title=found.title, caption="score, (95 % interval), n examples")
    for row in found.rows:
        shown.add_row(*row)
    return shown


def write(run: Run, found: Evaluation) -> None:
    """results.json, report.html and, where matplotlib is there, report.png."""
    plain = {"title": found.title, "command": found.command, "facts": dict(found.facts)}
    plain["cells"] = [finite(asdict(cell)) for cell in found.cells]
    write_atomic(run.folder / "results.json", json.dumps(plain, indent=1) + "\n")
    write_atomic(run.report, render(found))
    if charts.missing() is None and (cells := drawable(found)):
        charts.png(run.picture, [(found.title, draw_cells, (cells,))])


def render(found: Evaluation) -> str:
    cells = drawable(found)
    height = 0.9 + 0.13 * len(cells) + 0.2 * len({cell.task for cell in cells})
    image = picture(draw_cells, cells, height=height) if cells else None
    says = "Points: mean scores; bars: 95 % intervals."
    shown = chart("Scores", says, image, table(found.head, found.rows, kind="words"))
    parts = [
        f"<header><h1>{text(found.title)}</h1>{paragraph(found.about, 'lead')}</header><main>",
        section("scores", "Scores", grid(shown), table(found.head, found.rows, kind="words")),
        section("examples", "Examples", table(EXAMPLE_HEAD, found.examples, kind="words")) if found.examples else "",
        section("reproduce", "Reproduce", f"<pre>{text(found.command)}</pre>", table(("", ""), facts(found))),
        "</main><footer>Written by Nautilus.</footer>",
    ]
    return page(found.title, "".join(parts))


EXAMPLE_HEAD = "task", "column", "asked for", "answered"


def facts(found: Evaluation) -> list[list[str]]:
    return [*map(list, (dict(found.facts) | environment()).items())]


def drawable(found: Evaluation) -> list[Cell]:
    """Those on the scale from 0 to 1."""
    return [cell for cell in found.cells if 0 <= cell.score <= 1]


def draw_cells(figure, cells: Sequence[Cell]) -> None:
    """A row for each task, in it a point with its interval for each column."""
    axes = figure.subplots()
    tasks, columns = ([*dict.fromkeys(getattr(cell, name) for cell in cells)] for name in ("task", "column"))
    for place, column in enumerate(columns):
        mine = [cell for cell in cells if cell.column == column]
        rows = [tasks.index(cell.task) + 0.7 * ((place + 0.5) / len(columns) - 0.5) for cell in mine]
        lows, highs = ([0.0 if math.isnan(end) else abs(end - cell.score) for cell, end in side] for side in ends(mine))
        axes.errorbar(
            [cell.score for cell in mine], rows, xerr=[lows, highs], fmt="o", markersize=4, capsize=2, linewidth=1.3,
            color=LIGHT[LINES[place % len(LINES)]], label=charts.shortened(column),
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), [charts.shortened(task, 24) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("score")
    figure.legend(loc="outside lower center", ncols=min(5, len(columns)), handlelength=1)


def ends(cells: Sequence[Cell]) -> tuple[list[tuple[Cell, float]], list[tuple[Cell, float]]]:
    return [(cell, cell.low) for cell in cells], [(cell, cell.high) for cell in cells]
