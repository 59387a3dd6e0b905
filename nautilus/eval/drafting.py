"""The report of a drafter's training: how many tokens a pass over its drafts gives, before and after, and by depth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from nautilus.eval import charts
from nautilus.eval.charts import LIGHT, LINES, Line
from nautilus.eval.figures import loss_chart, picture
from nautilus.eval.material import series, smooth, thin
from nautilus.eval.page import chart, grid, page, paragraph, section, table, text
from nautilus.eval.report import environment
from nautilus.posttrain.acceptance import Acceptance, gain
from nautilus.runtime import Run, read_metrics, write_atomic
from nautilus.runtime.progress import finite

HEAD = "drafter", "texts", "length", "95 % interval", "gain", "95 % interval", "passes"
ABOUT = (
    "Length: tokens that a pass of the model gives, the one that is free included, over answers that it has written. "
    "Gains are of the same texts, their intervals drawn text by text. By depth: of the drafts whose predecessors were "
    "all right, the share that was right."
)
ENOUGH = 20  # drafts of a depth that are shown as a point of a line


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """`found[drafter][texts]`; where there are two drafters, gains are of the second over the first."""

    title: str
    about: str
    command: str
    found: Mapping[str, Mapping[str, Acceptance]]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[tuple[str, str, Acceptance]]:
        return [(name, texts, each) for name, by_texts in self.found.items() for texts, each in by_texts.items()]

    @property
    def rows(self) -> list[list[str]]:
        first = next(iter(self.found))
        rows = []
        for name, texts, each in self.cells:
            won = "", ""
            if name != first and texts in self.found[first]:
                mean, (low, high) = gain(self.found[first][texts], each)
                won = f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"
            low, high = each.interval
            rows.append([name, texts, f"{each.length:.3f}", f"{low:.3f} to {high:.3f}", *won, f"{each.visits:,}"])
        return rows

    @property
    def depths(self) -> list[list[str]]:
        return [[name, texts, *map(share, each.by_depth)] for name, texts, each in self.cells]

    @property
    def depth_head(self) -> list[str]:
        most = max(each.drafts for _, _, each in self.cells)
        return ["drafter", "texts", *(f"draft {depth}" for depth in range(1, most + 1))]


def share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def summary(found: Drafting) -> list[Table]:
    drafts = found.cells[0][2].drafts
    tables = Table(*HEAD, title=f"Tokens a pass, {drafts} drafts at a time"), Table(*found.depth_head, title="By depth")
    for shown, rows in zip(tables, (found.rows, found.depths), strict=True):
        for row in rows:
            shown.add_row(*row)
    return [*tables]


def write(run: Run, found: Drafting) -> None:
    """results.json, report.html and, where matplotlib is there, report.png."""
    plain = {"title": found.title, "command": found.command, "facts": dict(found.facts)}
    plain["lengths"] = [dict(zip(("drafter", "texts"), cell, strict=False)) | numbers(cell[2]) for cell in found.cells]
    write_atomic(run.folder / "results.json", json.dumps(finite(plain), indent=1) + "\n")
    write_atomic(run.report, render(run, found))
    if charts.missing() is None:
        parts: list = [("Tokens a pass", draw_lengths, (found,)), ("Right drafts by depth", draw_by_depth, (found,))]
        if (loss := series(read_metrics(run.metrics), "loss")) is not None:
            parts.append(("Divergence from the model", charts.draw_loss, (thin(smooth(loss)),)))
        charts.png(run.picture, parts)


def numbers(each: Acceptance) -> dict:
    low, high = each.interval
    return {
        "drafts": each.drafts, "length": each.length, "low": low, "high": high, "passes": each.visits,
        "by_depth": each.by_depth,
    }  # fmt: skip


def render(run: Run, found: Drafting) -> str:
    lengths = chart("Tokens a pass", ABOUT, picture(draw_lengths, found), table(HEAD, found.rows, kind="words"))
    says = "Of the drafts whose predecessors were all right, the share that was right."
    depths = table(found.depth_head, found.depths, kind="words")
    by_depth = chart("By depth", says, picture(draw_by_depth, found), depths)
    facts = [*map(list, (dict(found.facts) | environment()).items())]
    parts = [
        f"<header><h1>{text(found.title)}</h1>{paragraph(found.about, 'lead')}</header><main>",
        section("acceptance", "Acceptance", grid(lengths, by_depth)),
        section("training", "Training", grid(loss_chart(read_metrics(run.metrics)))),
        section("reproduce", "Reproduce", f"<pre>{text(found.command)}</pre>", table(("", ""), facts)),
        "</main><footer>Written by Nautilus.</footer>",
    ]
    return page(found.title, "".join(parts))


def draw_lengths(figure, found: Drafting) -> None:
    """A point with its interval for each drafter on each kind of texts."""
    axes = figure.subplots()
    kinds = [*dict.fromkeys(texts for _, texts, _ in found.cells)]
    for place, (name, by_texts) in enumerate(found.found.items()):
        rows = [kinds.index(texts) + 0.6 * ((place + 0.5) / len(found.found) - 0.5) for texts in by_texts]
        lengths = [each.length for each in by_texts.values()]
        ends = [each.interval for each in by_texts.values()]
        errors = [[n - low for n, (low, _) in zip(lengths, ends, strict=True)]]
        errors += [[high - n for n, (_, high) in zip(lengths, ends, strict=True)]]
        colour = LIGHT[LINES[place % len(LINES)]]
        axes.errorbar(lengths, rows, xerr=errors, fmt="o", markersize=5, capsize=3, color=colour, label=name)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(left=1)
    axes.set_xlabel("tokens a pass")
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=len(found.found), handlelength=1)


def draw_by_depth(figure, found: Drafting) -> None:
    axes = figure.subplots()
    charts.fill_lines(axes, depth_lines(found), "share right")
    axes.set_xlabel("draft, as far as enough of them came so far")
    axes.xaxis.set_major_locator(charts.matplotlib().ticker.MaxNLocator(integer=True))
    axes.set_ylim(0, 1.03)


def depth_lines(found: Drafting) -> Sequence[Line]:
    """Without shares of a few drafts, which say nothing."""
    lines = []
    for name, texts, each in found.cells:
        counted = zip(each.reached, each.by_depth, strict=False)
        known = [(float(depth), value) for depth, (drafts, value) in enumerate(counted, 1) if drafts >= ENOUGH]
        if known:
            lines.append(Line(f"{name}, {texts}", [depth for depth, _ in known], [value for _, value in known]))
    return lines
