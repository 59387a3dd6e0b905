"""The report of a comparison: variants of one training over several seeds, their paired differences, their curves.

`Comparison` holds what was found; `summary` is the table of the terminal, `write` the page and its picture, `record` a
line for `records/`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.table import Table

from nautilus.eval import charts
from nautilus.eval.charts import LIGHT, LINES, Line
from nautilus.eval.figures import picture
from nautilus.eval.material import smooth, thin
from nautilus.eval.page import card, chart, duration, grid, page, paragraph, section, table, text
from nautilus.eval.paired import Difference, paired
from nautilus.eval.report import environment
from nautilus.eval.techniques import Demonstration
from nautilus.runtime import Run, write_atomic

POINTS = 200


class Measure(NamedTuple):
    title: str
    better: str  # lower, higher


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant. `scores[measure][seed]`; `curves[seed]`: loss of the next token over steps; `failed[seed]`: why.

    `work` has tokens, parameters and active: those that one token multiplies with. `seconds[seed]` are those in steps.
    """

    name: str
    changes: str
    work: Mapping[str, int]
    scores: Mapping[str, Mapping[int, float]]
    curves: Mapping[int, Line] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`arms[0]` is the control."""

    title: str
    about: str
    command: str
    arms: Sequence[Arm]
    measures: Mapping[str, Measure]
    shared: Mapping[str, str] = field(default_factory=dict)
    demonstrations: Sequence[Demonstration] = ()

    @property
    def seeds(self) -> int:
        return max(len({*arm.failed, *arm.seconds}) for arm in self.arms)

    def differences(self, measure: str) -> dict[str, Difference]:
        """Of every variant to the control."""
        control, *others = (arm.scores.get(measure, {}) for arm in self.arms)
        return {arm.name: paired(own, control) for arm, own in zip(self.arms[1:], others, strict=True)}


def mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values()) if values else math.nan


def digits(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def signed(difference: Difference) -> str:
    """+0.0123 ± 0.0045; without an interval the difference alone."""
    if math.isnan(difference.mean):
        return "–"
    half = "" if math.isnan(difference.half) else f" ± {difference.half:.4f}"
    return f"{difference.mean:+.4f}{half}"


HEAD = "variant", "mean", "difference", "relative", "pairs", "reading"


def rows_of(comparison: Comparison, measure: str) -> list[list[str]]:
    found = comparison.differences(measure)
    rows = []
    for arm in comparison.arms:
        average = digits(mean(arm.scores.get(measure, {})))
        each = found.get(arm.name)
        if each is None:
            rows.append([arm.name, average, "control", "", str(len(arm.scores.get(measure, {}))), ""])
        else:
            relative = "–" if math.isnan(each.mean) else f"{each.percent:+.2f} %"
            rows.append([arm.name, average, signed(each), relative, str(len(each.by_seed)), each.verdict])
    return rows


def summary(comparison: Comparison) -> Iterator[Table]:
    for name, measure in comparison.measures.items():
        shown = Table(*HEAD, title=f"{measure.title} ({measure.better} is better)")
        for row in rows_of(comparison, name):
            shown.add_row(*row)
        yield shown
    shown = Table(*WORK_HEAD, title="Work")
    for row in work_rows(comparison):
        shown.add_row(*map(str, row))
    yield shown


WORK_HEAD = "variant", "parameters", "active", "tokens", "time in steps", "runs", "failed"


def work_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for arm in comparison.arms:
        counts = [f"{arm.work[name]:,}" for name in ("parameters", "active", "tokens")]
        spent = duration(mean(arm.seconds)) if arm.seconds else "–"
        rows.append([arm.name, *counts, spent, str(len(arm.seconds)), str(len(arm.failed) or "")])
    return rows


# ----- the page ------------------------------------------------------------------------------------------------------


def write(run: Run, comparison: Comparison) -> None:
    """report.html and, where matplotlib is there, report.png."""
    write_atomic(run.report, render(comparison))
    if charts.missing() is None:
        found = [(measure.title, comparison.differences(name)) for name, measure in comparison.measures.items()]
        parts: list = [(title, draw_differences, (each,)) for title, each in found]
        if bands := curves(comparison):
            parts.append(("Loss of the next token", draw_bands, (bands,)))
        charts.png(run.picture, parts)


def render(comparison: Comparison) -> str:
    lead = f"{len(comparison.arms)} variants, {comparison.seeds} seeds; the control is {comparison.arms[0].name}."
    bands = curves(comparison)
    head = f"<h1>{text(comparison.title)}</h1>{paragraph(comparison.about, 'lead')}{paragraph(lead)}"
    parts = [
        f"<header>{head}</header><main>",
        section("differences", "Differences", paragraph(READING), grid(*difference_charts(comparison))),
        section("curves", "Curves", grid(*curve_charts(comparison))) if bands else "",
        section("work", "Work", paragraph(WORK), table(WORK_HEAD, work_rows(comparison))),
        section("runs", "Runs", *run_tables(comparison)),
        section("techniques", "Techniques", grid(*shown(comparison))) if comparison.demonstrations else "",
        section("reproduce", "Reproduce", *reproduce(comparison)),
        "</main><footer>Written by Nautilus.</footer>",
    ]
    return page(comparison.title, "".join(parts))


READING = (
    "Differences are variant less control, seed by seed; ± is the half width of the 95 % t-interval over the seeds, "
    "each variant taken alone. Inside noise: the interval holds zero, so these runs do not tell the two apart."
)
WORK = (
    "Active: weights that one token multiplies with in the main stack, so its multiply-adds but for attention scores "
    "and the scan. Times are means over runs that shared this machine."
)


def difference_charts(comparison: Comparison) -> Iterator[str]:
    for name, measure in comparison.measures.items():
        found = comparison.differences(name)
        says = (
            f"Difference to {comparison.arms[0].name}; {measure.better} is better. Points: seeds; bars: 95 % intervals."
        )
        image = picture(draw_differences, found, height=0.9 + 0.42 * len(found))
        yield chart(measure.title, says, image, table(HEAD, rows_of(comparison, name), kind="words"))


def curve_charts(comparison: Comparison) -> Iterator[str]:
    says = "Smoothed mean over the seeds; the band is from the lowest to the highest of them."
    bands, apart = curves(comparison), gaps(comparison)
    yield chart("Loss of the next token", says, picture(draw_bands, bands, height=3.4), table(*last_of(bands)))
    if apart:
        says = (
            f"Loss less that of {comparison.arms[0].name} in the same step of the same seed; mean and range over seeds."
        )
        image = picture(draw_bands, apart, "difference, nats per token", height=3.4)
        yield chart("Difference while training", says, image, table(*last_of(apart)))


def run_tables(comparison: Comparison) -> Iterator[str]:
    """Every number that the differences were made of, and what failed."""
    for name, measure in comparison.measures.items():
        seeds = sorted({seed for arm in comparison.arms for seed in arm.scores.get(name, {})})
        rows = [[a.name, *(digits(a.scores.get(name, {}).get(s, math.nan)) for s in seeds)] for a in comparison.arms]
        yield card(f"<h3>{text(measure.title)}</h3>", table(["variant", *(f"seed {s}" for s in seeds)], rows))
    lost = [[arm.name, str(seed), why] for arm in comparison.arms for seed, why in arm.failed.items()]
    if lost:
        yield card("<h3>Failed</h3>", table(("variant", "seed", "why"), lost, kind="words"))


def shown(comparison: Comparison) -> Iterator[str]:
    for each in comparison.demonstrations:
        yield card(f"<h3>{text(each.title)}</h3>", paragraph(each.says), table(each.head, each.rows))


def reproduce(comparison: Comparison) -> Iterator[str]:
    changes = [[arm.name, arm.changes or "nothing"] for arm in comparison.arms]
    yield f"<pre>{text(comparison.command)}</pre>"
    yield table(("variant", "changes"), changes, kind="words")
    yield table(("shared", ""), [*map(list, (dict(comparison.shared) | environment()).items())], kind="words")


# ----- pictures ------------------------------------------------------------------------------------------------------


class Band(NamedTuple):
    middle: Line
    low: list[float]
    high: list[float]


def curves(comparison: Comparison) -> list[Band]:
    """Of every variant the smoothed mean over its seeds, at the steps that all of them have."""
    return [band_of(arm.name, [*arm.curves.values()]) for arm in comparison.arms if arm.curves]


def gaps(comparison: Comparison) -> list[Band]:
    """The same of the difference to the control, where both have a seed."""
    control, *others = comparison.arms
    bands = []
    for arm in others:
        shared = [(arm.curves[seed], control.curves[seed]) for seed in arm.curves.keys() & control.curves.keys()]
        lines = [
            own._replace(values=[a - b for a, b in zip(own.values, other.values, strict=False)])
            for own, other in shared
        ]
        bands += [band_of(arm.name, lines)] if lines else []
    return bands


def band_of(name: str, lines: Sequence[Line]) -> Band:
    lines = [thin(smooth(line)._replace(faint=None), POINTS) for line in lines]
    columns = [*zip(*(line.values for line in lines), strict=False)]
    middle = Line(name, lines[0].steps[: len(columns)], [statistics.fmean(column) for column in columns])
    return Band(middle, [*map(min, columns)], [*map(max, columns)])


def last_of(bands: Sequence[Band]) -> tuple[list[str], list[list[object]]]:
    rows = [[b.middle.name, int(b.middle.steps[-1]), b.middle.values[-1], b.low[-1], b.high[-1]] for b in bands]
    return ["variant", "step", "mean", "lowest", "highest"], rows


def draw_bands(figure, bands: Sequence[Band], label: str = "nats per token") -> None:
    """The scale leaves out the first tenth, where losses fall steeply. Past five variants lines are broken."""
    axes = figure.subplots()
    for place, (line, low, high) in enumerate(bands):
        colour, style = LIGHT[LINES[place % len(LINES)]], ("-", "--", ":")[place // len(LINES) % 3]
        axes.fill_between(line.steps, low, high, color=colour, alpha=0.15, linewidth=0)
        name = charts.shortened(line.name, 24)
        axes.plot(line.steps, line.values, color=colour, label=name, linewidth=1.2, linestyle=style)
    lows, highs = (
        [v for b in bands for v in side(b)[len(b.low) // 10 :]] for side in (lambda b: b.low, lambda b: b.high)
    )
    room = 0.03 * (max(highs) - min(lows)) or 1.0
    axes.set_ylim(min(lows) - room, max(highs) + room)
    axes.set_ylabel(label)
    charts.set_scale(axes)
    axes.legend(loc="upper right", handlelength=1.2, fontsize=7.5)


def draw_differences(figure, found: Mapping[str, Difference]) -> None:
    """A row for each variant: its seeds as points, the mean and its interval as a bar; zero is the control."""
    axes = figure.subplots()
    for place, each in enumerate(found.values()):
        axes.plot([*each.by_seed.values()], [place] * len(each.by_seed), "o", color=LIGHT["pale"], markersize=4)
        if not math.isnan(each.mean):
            half = None if math.isnan(each.half) else each.half
            colour = LIGHT["muted" if each.verdict in ("inside noise", "no interval") else "two"]
            axes.errorbar(each.mean, place, xerr=half, fmt="D", color=colour, markersize=5, capsize=4, linewidth=1.7)
    axes.axvline(0, color=LIGHT["ink"], linewidth=1, linestyle=":")
    axes.set_yticks(range(len(found)), [charts.shortened(name) for name in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("difference to the control")


# ----- records -------------------------------------------------------------------------------------------------------


def record(comparison: Comparison) -> dict:
    """One row for `records/`: every score of every seed, the differences, the work, the machine."""
    here = environment()
    machine = f"{here['processor']}, {here['cores']} cores, {here['system']}, {here['Python']}, torch {here['torch']}"
    rows = []
    for arm in comparison.arms:
        row = {"variant": arm.name, "changes": arm.changes, **arm.work, "seconds": rounded(arm.seconds, 1)}
        for name in comparison.measures:
            each = comparison.differences(name).get(arm.name)
            interval = None if each is None or math.isnan(each.half) else [each.mean - each.half, each.mean + each.half]
            far = {} if each is None or not each.by_seed else {"difference": each.mean, "interval_95": interval}
            row[name] = {"by_seed": rounded(arm.scores.get(name, {}), 6)} | far
        rows.append(row | ({"failed": len(arm.failed)} if arm.failed else {}))
    facts = {"command": comparison.command, "machine": machine, "date": time.strftime("%F")}
    return facts | {"study": comparison.title, "shared": dict(comparison.shared), "rows": rows}


def rounded(values: Mapping[int, float], places: int) -> dict[str, float]:
    return {str(seed): round(value, places) for seed, value in values.items()}
