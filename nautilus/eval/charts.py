"""The charts of a report, drawn once with matplotlib: as SVG for a page in light or dark, or side by side in a PNG.

A chart is a function (figure, data). It fills a figure or a part of one and uses no colour outside `LIGHT`; in an SVG
each of these becomes a variable of the page's style sheet, so one drawing serves both colour schemes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nautilus.runtime import UserError, installing, write_atomic

LIGHT = {
    "page": "#f3f6f8",
    "card": "#fffffe",
    "ink": "#17212b",
    "muted": "#566472",
    "grid": "#dbe2e8",
    "one": "#0e7490",
    "two": "#b45309",
    "three": "#6d28d9",
    "four": "#b5175f",
    "pale": "#a3b1bf",
}
DARK = {
    "page": "#0c131a",
    "card": "#141e27",
    "ink": "#e5ecf2",
    "muted": "#9badbd",
    "grid": "#293743",
    "one": "#45c4dc",
    "two": "#f2a24f",
    "three": "#b69cff",
    "four": "#f587b9",
    "pale": "#5d7184",
}
LINES = ("one", "two", "three", "four", "muted")
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a source called "$x$" is a name, not a formula
    "axes.edgecolor": LIGHT["grid"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["grid"],
    "ytick.labelcolor": LIGHT["muted"],
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": LIGHT["ink"],
    "svg.fonttype": "none",  # text stays text: selectable, read aloud, in the page's own font
}


class Line(NamedTuple):
    """A named series over steps; `faint` is a second, noisier version drawn behind it."""

    name: str
    steps: list[float]
    values: list[float]
    faint: list[float] | None = None


class Bar(NamedTuple):
    """A model's bits per byte on one source, with its standard error, and those of the compressors."""

    name: str
    model: float
    error: float
    others: dict[str, float]


def missing() -> str | None:
    """Why no picture can be drawn here; None where one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"Pictures need matplotlib, which is not installed: {installing('report')}"
    return None


def matplotlib() -> Any:
    if reason := missing():
        raise UserError(reason)
    import matplotlib.figure
    import matplotlib.ticker

    return matplotlib


def svg(draw: Callable[..., None], *data, height: float = 2.7) -> str:
    """The chart as an <svg> element to stand inside a page; its colours are var(--ink) and the like."""
    pictures = matplotlib()
    out = io.StringIO()
    # A salt of its own keeps the ids of two charts on one page apart, and the same data gives the same bytes.
    with pictures.rc_context({**STYLE, "svg.hashsalt": f"{draw.__name__} {data}"}), quiet_fonts():
        figure = pictures.figure.Figure(figsize=(4.75, height), layout="constrained")
        draw(figure, *data)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    return themed(out.getvalue())


@contextlib.contextmanager
def quiet_fonts() -> Iterator[None]:
    """A name in a script that the bundled font lacks is no cause for alarm: the page's own font will have it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def themed(text: str) -> str:
    """matplotlib's document reduced to one element without size, fonts or colours of its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg aria-hidden="true" \1>', text, count=1)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # every chart of a page would have a "figure_1"
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def png(path: Path, charts: Sequence[tuple[str, Callable[..., None], tuple]]) -> None:
    """The charts, each (title, function, data), side by side in one light picture."""
    pictures = matplotlib()
    out = io.BytesIO()
    with pictures.rc_context(STYLE), quiet_fonts():
        figure = pictures.figure.Figure(figsize=(4.3 * len(charts), 3.3), layout="constrained", facecolor=LIGHT["card"])
        parts = figure.subfigures(1, len(charts), wspace=0.04, squeeze=False)[0]
        for part, (title, draw, data) in zip(parts, charts, strict=True):
            part.suptitle(title, fontsize=11, fontweight="bold", color=LIGHT["ink"])
            part.set_facecolor(LIGHT["card"])
            draw(part, *data)
        figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
    write_atomic(path, out.getvalue())


def draw_loss(figure, loss: Line, rate: Line | None = None) -> None:
    """Loss over steps, the learning rate in a strip below it on the same axis."""
    if rate is None:
        draw_lines(figure, [loss], "loss, nats per token")
        return
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2])
    fill_lines(above, [loss], "loss, nats per token")
    below.plot(rate.steps, rate.values, color=LIGHT["two"], linewidth=1.3)
    below.fill_between(rate.steps, rate.values, color=LIGHT["two"], alpha=0.15, linewidth=0)
    below.set_ylim(bottom=0)
    below.set_ylabel("rate")
    set_scale(below)
    below.yaxis.set_major_locator(matplotlib().ticker.MaxNLocator(2))


def draw_lines(figure, lines: Sequence[Line], label: str, scale: str = "linear", level: float | None = None) -> None:
    """Lines over steps, told apart by colour; `level` is a dotted line to compare them with."""
    axes = figure.subplots()
    fill_lines(axes, lines, label)
    set_scale(axes, scale)
    if level is not None:
        axes.axhline(level, color=LIGHT["muted"], linestyle=":", linewidth=1.2)


def fill_lines(axes, lines: Sequence[Line], label: str) -> None:
    for line, colour in zip(lines, LINES * len(lines), strict=False):
        if line.faint is not None:
            axes.plot(line.steps, line.faint, color=LIGHT[colour], alpha=0.25, linewidth=0.8)
        axes.plot(line.steps, line.values, color=LIGHT[colour], label=shortened(line.name, 34), marker=dot(line))
    axes.set_ylabel(label)
    if len(lines) > 1:
        axes.legend(loc="best", handlelength=1.2)


def draw_depths(figure, lines: Sequence[Line], label: str, scale: str = "linear", level: float | None = None) -> None:
    """One line per layer in one hue, deeper layers stronger; the first and the last are named."""
    axes = figure.subplots()
    width = max(0.5, min(1.7, 12 / len(lines)))
    for i, line in enumerate(lines):
        name = (
            shortened(line.name) if i in (0, len(lines) - 1) else "_"
        )  # a leading underscore keeps it out of the legend
        style = {"color": LIGHT["three"], "alpha": 0.3 + 0.7 * (i + 1) / len(lines), "linewidth": width}
        axes.plot(line.steps, line.values, label=name, marker=dot(line), **style)
    axes.set_ylabel(label)
    set_scale(axes, scale)
    if level is not None:
        axes.axhline(level, color=LIGHT["muted"], linestyle=":", linewidth=1.2)
    axes.legend(loc="best", handlelength=1.2)


def dot(line: Line) -> str:
    """A line of one point would be invisible without a mark."""
    return "o" if len(line.steps) == 1 else ""


def draw_loads(figure, loads: Mapping[str, Sequence[float]]) -> None:
    """Layers by experts; each cell is the expert's tokens over the mean of its layer. Balanced cells are clear."""
    rows, layers = [*loads.values()], [*loads]
    widest, top = max(map(len, rows)), max(2.0, max(map(max, rows)))
    cells = [[*row, *[math.nan] * (widest - len(row))] for row in rows]
    axes, key = figure.subplots(2, 1, height_ratios=[8, 1])
    axes.imshow([[shade(cell, top) for cell in row] for row in cells], aspect="auto", interpolation="none")
    marks = range(0, len(layers), math.ceil(len(layers) / 12))
    axes.set_yticks(marks, [shortened(layers[i]) for i in marks])
    axes.set(ylabel="layer", xlabel="expert")
    axes.xaxis.set_major_locator(matplotlib().ticker.MaxNLocator(8, integer=True))
    steps = [top * i / 60 for i in range(61)]
    key.imshow([[shade(value, top) for value in steps]], aspect="auto", extent=(0, top, 0, 1), interpolation="none")
    key.set_yticks([])
    key.set_xlabel("tokens of the expert / mean of its layer")
    for each in (axes, key):
        each.grid(False)
        each.spines[["top", "right"]].set_visible(True)


def shade(value: float, top: float) -> tuple[float, float, float, float]:
    """Red, green, blue and opacity: blue where an expert idles, clear at the mean, orange where it is crowded."""
    if math.isnan(value):
        return (0.5, 0.5, 0.5, 0.25)
    if value < 1:
        return (0.05, 0.52, 0.72, 0.95 * (1 - value))
    return (0.88, 0.42, 0.06, 0.95 * min(1, (value - 1) / (top - 1)))


def draw_bars(figure, bars: Sequence[Bar]) -> None:
    """Bits per byte, one group per source; shorter is better."""
    axes = figure.subplots()
    names = ["model", *bars[0].others]
    thick = 0.8 / len(names)
    for i, (name, colour) in enumerate(zip(names, ("one", "muted", "pale"), strict=False)):
        lengths = [bar.model if i == 0 else bar.others[name] for bar in bars]
        places = [group + (i - (len(names) - 1) / 2) * thick for group in range(len(bars))]
        errors = [0.0 if math.isnan(bar.error) else bar.error for bar in bars] if i == 0 else None
        style = {"ecolor": LIGHT["ink"], "error_kw": {"linewidth": 1}}
        drawn = axes.barh(places, lengths, thick * 0.9, xerr=errors, color=LIGHT[colour], label=name, **style)
        axes.bar_label(drawn, [f"{length:.2f}" for length in lengths], padding=3, fontsize=8, color=LIGHT["ink"])
    axes.set_yticks(range(len(bars)), [shortened(bar.name) for bar in bars])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel("bits per byte, shorter is better")
    figure.legend(loc="outside lower center", ncols=3, handlelength=1)


def draw_positions(figure, spans: Sequence[tuple[int, int, float]]) -> None:
    """Nats per token at positions (first, last, nats) of their documents, on a scale of doublings."""
    axes = figure.subplots()
    edges = [first + 1 for first, _, _ in spans] + [spans[-1][1] + 2]
    axes.stairs([nats for _, _, nats in spans], edges, baseline=None, color=LIGHT["one"], linewidth=1.7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib().ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="position in the document, from 1", ylabel="loss, nats per token")


def set_scale(axes, scale: str = "linear") -> None:
    """Steps along x; y linear or logarithmic, both with plain short numbers."""
    ticks = matplotlib().ticker
    axes.set_xlabel("step")
    if scale == "log" and any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_formatter(ticks.NullFormatter())
    axes.xaxis.set_major_locator(ticks.MaxNLocator(6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticks.FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """12k for 12000, 0.002 as it is."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def shortened(name: str, longest: int = 18) -> str:
    name = " ".join(name.split())
    return name if len(name) <= longest else name[: longest - 1] + "…"
