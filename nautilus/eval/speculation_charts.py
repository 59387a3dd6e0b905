"""The charts of the report of speculative decoding; see `charts` for what a chart is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nautilus.eval import charts
from nautilus.eval.charts import LIGHT, LINES
from nautilus.eval.speculation import SHARES, Band, Numbers, Payoff


def draw_matrix(
    figure, arms: Sequence[str], families: Sequence[str], cells: Sequence[Sequence[Numbers | None]]
) -> None:
    """Arms by families; a cell is a speed-up, bold where its interval leaves out 1."""
    axes = figure.subplots()
    values = [[each.speed_up.mean if each else math.nan for each in row] for row in cells]
    top = max([1.5, *(value for row in values for value in row if not math.isnan(value))])
    axes.imshow([[charts.shade(value, top) for value in row] for row in values], aspect="auto", interpolation="none")
    for y, row in enumerate(cells):
        for x, each in enumerate(row):
            if each and not math.isnan(each.speed_up.mean):
                weight = "bold" if each.speed_up.reading in ("faster", "slower") else "normal"
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": LIGHT["ink"], "fontweight": weight}
                axes.text(x, y, f"{each.speed_up.mean:.2f}", **style)
    axes.set_xticks(range(len(families)), families, rotation=30, ha="right")
    axes.set_yticks(range(len(arms)), [charts.shortened(arm) for arm in arms])
    axes.tick_params(length=0, labelcolor=LIGHT["ink"])
    axes.grid(False)


def draw_concentration(figure, lines: Sequence[tuple[str, Payoff]]) -> None:
    axes = figure.subplots()
    for place, (name, pays) in enumerate(lines):
        points = [(0.0, 0.0), *((100 * share, 100 * gain) for share, gain in pays.best.items()), (100.0, 100.0)]
        colour, style = LIGHT[LINES[place % len(LINES)]], ("-", "--", ":")[place // len(LINES) % 3]
        axes.plot(
            *zip(*points, strict=True), color=colour, linestyle=style, marker=".", label=charts.shortened(name, 28)
        )
    axes.plot([0, 100], [0, 100], color=LIGHT["muted"], linestyle=":", linewidth=1)
    axes.set(xlabel="best % of the drafts", ylabel="% of the tokens saved", ylim=(0, 102))
    axes.legend(loc="lower right", handlelength=1.2, fontsize=7.5)


def draw_bands(figure, told: Sequence[tuple[str, Band]], says: str) -> None:
    """A line for each arm over the bands of structure; 1 is plain decoding."""
    axes = figure.subplots()
    arms = [*dict.fromkeys(arm for arm, _ in told)]
    for place, arm in enumerate(arms):
        mine = [band for name, band in told if name == arm and not math.isnan(band.speed_up.mean)]
        middle = [100 * (band.low + band.high) / 2 + 1.2 * (place - (len(arms) - 1) / 2) for band in mine]
        means = [band.speed_up.mean for band in mine]
        ends = [[0.0 if math.isnan(end) else abs(end - m) for end, m in zip(side, means, strict=True)]
                for side in ([b.speed_up.low for b in mine], [b.speed_up.high for b in mine])]  # fmt: skip
        style = {"linestyle": ("-", "--", ":")[place // len(LINES) % 3], "linewidth": 1.2, "capsize": 2}
        axes.errorbar(middle, means, yerr=ends, fmt=".", color=LIGHT[LINES[place % len(LINES)]], label=arm, **style)
    axes.axhline(1, color=LIGHT["muted"], linestyle=":", linewidth=1)
    axes.set_xticks([100 * share for share in SHARES])
    axes.set(xlabel=f"% {says}", ylabel="speed-up")
    figure.legend(loc="outside lower center", ncols=min(4, len(arms)), handlelength=1.2, fontsize=7.5)
