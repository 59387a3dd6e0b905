"""The report of a predictor of pay-off: how fast answers come with it, how often it is right, and what passes cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from nautilus.eval import charts
from nautilus.eval.charts import LIGHT
from nautilus.eval.figures import picture
from nautilus.eval.page import chart, grid, page, paragraph, section, table, text
from nautilus.eval.report import environment
from nautilus.posttrain.judged import HIGH, Quality
from nautilus.posttrain.policies import Outcome, Prices
from nautilus.posttrain.replay import LOOKED_UP
from nautilus.runtime import Run, write_atomic
from nautilus.runtime.progress import finite

RATES = "policy", "tokens/s", "plain =", "oracle =", "cycles/1000", "accepted/draft", "copying cycles", "their tokens"
QUALITIES = "predictor", "counted by", "states", "with a draft", "error", "precision", "recall", "high", "chosen"
CURVE = "tokens", "predicted", "true", "calibration error"
PAPER = "the paper has a precision of 78-88 % and a recall of 61-80 % there"


@dataclass(frozen=True, kw_only=True)
class PayOff:
    """outcomes: the first is plain, the last the oracle; qualities: by predictor, the one that is kept first."""

    title: str
    command: str
    outcomes: Sequence[Outcome]
    qualities: Mapping[str, Sequence[Quality]]
    prices: Prices
    facts: Mapping[str, str]

    @property
    def rates(self) -> list[list[str]]:
        plain, oracle = self.outcomes[0].rate, self.outcomes[-1].rate
        return [row_of(one, plain, oracle) for one in self.outcomes]

    @property
    def judged(self) -> list[list[str]]:
        return [quality_row(name, one) for name, both in self.qualities.items() for one in both]

    @property
    def curve(self) -> Sequence[tuple[int, float, float, float]]:
        """Of the predictor that is kept, over the cycles."""
        return next(iter(self.qualities.values()))[-1].calibration


def row_of(one: Outcome, plain: float, oracle: float) -> list[str]:
    cycles, tokens = one.cycles.total(), one.tokens.total()
    drafts = cycles - one.cycles["plain"]
    copied = next((arm for arm in ("cache", *LOOKED_UP) if one.cycles[arm]), "cache")
    return [
        one.name, f"{one.rate:,.1f}", f"{one.rate / plain:.3f}", f"{one.rate / oracle:.3f}",
        f"{1000 * cycles / tokens:.0f}", f"{one.accepted.total() / drafts:.2f}" if drafts else "–",
        f"{one.cycles[copied] / cycles:.1%}", f"{one.tokens[copied] / tokens:.1%}",
    ]  # fmt: skip


def quality_row(name: str, one: Quality) -> list[str]:
    shares = (one.precision, one.recall, one.high, one.chosen)
    counts = f"{one.states:,}", f"{one.rows:,}", f"{one.error:.2f}"
    return [name, one.counted, *counts, *(f"{share:.1%}" for share in shares)]


def summary(found: PayOff) -> list[Table]:
    regret = 1 - found.outcomes[-2].rate / found.outcomes[-1].rate
    rates = Table(*RATES, title=found.title, caption=f"simulated; {regret:.1%} slower than who knows what comes true")
    judged = Table(*QUALITIES, caption=f"high: {HIGH:g} tokens come true; {PAPER}")
    for shown, rows in ((rates, found.rates), (judged, found.judged)):
        for row in rows:
            shown.add_row(*row)
    return [rates, judged]


def write(run: Run, found: PayOff) -> None:
    """results.json, report.html and, where matplotlib is there, report.png."""
    plain = {"title": found.title, "command": found.command, "facts": dict(found.facts)}
    plain["outcomes"] = [{**vars(one), "rate": one.rate} for one in found.outcomes]
    plain["qualities"] = {name: [finite(asdict(one)) for one in both] for name, both in found.qualities.items()}
    plain["prices"] = asdict(found.prices)
    write_atomic(run.folder / "results.json", json.dumps(plain, indent=1) + "\n")
    write_atomic(run.report, render(found))
    if charts.missing() is None:
        charts.png(run.picture, [("Speed", draw_rates, (speeds(found),)), ("Survival", draw_curve, (found.curve,))])


def render(found: PayOff) -> str:
    rates, curve = speeds(found), [[size, *(f"{value:.3f}" for value in values)] for size, *values in found.curve]
    says = "Tokens per second beside plain decoding, simulated on requests that were not trained on."
    faster = chart("Speed", says, picture(draw_rates, rates), table(RATES, found.rates, kind="words"))
    sure = "How often so many tokens of a draft come true, and how often that was predicted."
    known = chart("Survival", sure, picture(draw_curve, found.curve), table(CURVE, curve))
    passes = [[size, f"{1e3 * seconds:.3f}"] for size, seconds in sorted(found.prices.passes.items())]
    facts = [*map(list, (dict(found.facts) | environment()).items())]
    high = f"High is a pay-off of {HIGH:g} tokens; {PAPER}. By place counts every place, by cycle where one began."
    lead = paragraph("What copied drafts bring, predicted.", "lead")
    parts = [
        f"<header><h1>{text(found.title)}</h1>{lead}</header><main>",
        section("speed", "Speed", grid(faster, known), table(RATES, found.rates, kind="words")),
        section("judged", "How often it is right", paragraph(high), table(QUALITIES, found.judged, kind="words")),
        section("costs", "What passes cost", table(("tokens", "milliseconds"), passes)),
        section("reproduce", "Reproduce", f"<pre>{text(found.command)}</pre>", table(("", ""), facts)),
        "</main><footer>Written by Nautilus.</footer>",
    ]
    return page(found.title, "".join(parts))


def speeds(found: PayOff) -> list[tuple[str, float]]:
    return [(one.name, one.rate / found.outcomes[0].rate) for one in found.outcomes]


def draw_rates(figure, rates: Sequence[tuple[str, float]]) -> None:
    """A bar for each policy; the dotted line is plain decoding."""
    axes = figure.subplots()
    names, values = zip(*rates, strict=True)
    colours = [LIGHT["pale" if name in ("plain", "oracle") else "one"] for name in names]
    drawn = axes.barh(range(len(names)), values, 0.7, color=colours)
    axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3, fontsize=8, color=LIGHT["ink"])
    axes.axvline(1, color=LIGHT["muted"], linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(names)), [charts.shortened(name) for name in names])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], length=0)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per second, plain = 1")


def draw_curve(figure, curve: Sequence[tuple[int, float, float, float]]) -> None:
    axes = figure.subplots()
    sizes = [size for size, *_ in curve]
    axes.plot(sizes, [said for _, said, _, _ in curve], color=LIGHT["one"], marker="o", markersize=4, label="predicted")
    axes.plot(sizes, [true for _, _, true, _ in curve], color=LIGHT["two"], marker="s", markersize=4, label="true")
    axes.set(xlabel="tokens of the draft", ylabel="share that comes true", ylim=(-0.03, 1.03))
    axes.legend(loc="best", handlelength=1.2)
