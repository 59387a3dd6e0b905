"""The figures of a report: from metrics and scores to a title, a sentence, a picture and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nautilus.eval import charts
from nautilus.eval.charts import Bar, Line
from nautilus.eval.loss import HeldOut, Score
from nautilus.eval.material import family, series, smooth, thin
from nautilus.eval.page import absent, chart, plain, table

ROWS = 12  # of a line in a table
SHOWN = 5  # lines of a family whose members have names of their own
NATS = "loss, nats per token"
STRENGTH = "Strong: smoothed; pale: each step."


def loss_chart(rows: Sequence[Mapping]) -> str:
    loss, rate = series(rows, "loss"), series(rows, "lr", "learning rate")
    if loss is None:
        return absent("Loss", "No step has been trained yet.")
    lines = [thin(smooth(loss)), *([thin(rate)] if rate is not None else [])]
    says = f"From {loss.values[0]:.3f} to {lines[0].values[-1]:.3f} in {len(loss.steps):,} steps. {STRENGTH}"
    title = "Loss" if rate is None else "Loss and learning rate"
    return chart(title, says, picture(charts.draw_loss, *lines), line_table(lines))


def depths_chart(rows: Sequence[Mapping]) -> str:
    """The losses of the prediction depths beside the next token's: depth k looks k tokens further."""
    found = [line for line in family(rows, "mtp_") if line.name.isdigit()]
    depths = [line._replace(name=f"{int(line.name) + 1} tokens ahead") for line in found]
    if not depths:
        return absent("Multi-token prediction", "This run trained no prediction block.")
    first = series(rows, "next_token", "next token")
    lines = [thin(smooth(line)) for line in [*([first] if first is not None else []), *depths]]
    return lines_chart("Multi-token prediction", f"At the end: {', '.join(map(ending, lines))}.", lines, NATS)


def load_chart(loads: Mapping[str, Sequence[float]]) -> str:
    """Which experts the routers use on held-out text."""
    if not loads:
        return absent("Expert load", "It has not been measured on held-out text.")
    loads = {plain(name): row for name, row in loads.items()}
    top, layer = max((max(row), name) for name, row in loads.items())
    idle, experts = (sum(map(count, loads.values())) for count in (count_idle, len))
    says = (
        f"On held-out text. Busiest: {top:.2f} times the mean, layer {layer}. Without a token: {idle:,} of {experts:,}."
    )
    image = picture(charts.draw_loads, loads, height=max(2.7, 1.3 + 0.2 * min(12, len(loads))))
    rows = [[name, max(row), min(row), count_idle(row)] for name, row in loads.items()]
    few = max(map(len, loads.values())) <= 32  # more columns than that nobody reads
    head = ["layer", "most", "least", "without a token", *(range(max(map(len, loads.values()))) if few else [])]
    data = [row + list(loads[row[0]]) for row in rows] if few else rows
    return chart("Expert load", says, image, table(head, data))


def count_idle(loads: Sequence[float]) -> int:
    return sum(load == 0 for load in loads)


def balance_chart(rows: Sequence[Mapping]) -> str:
    lines = [thin(layer_named(line)) for line in family(rows, "max_vio.")]
    if not lines:
        return absent("Balance in training", "This run logged no MaxVio.")
    worst = max(lines, key=lambda line: line.values[-1])
    says = f"The busiest expert over the mean of its layer; 1 is perfect. Worst at the end: {ending(worst)}."
    return lines_chart("Balance in training", says, lines, "MaxVio", draw=charts.draw_depths, level=1.0)


def norm_chart(rows: Sequence[Mapping]) -> str:
    norm = series(rows, "grad_norm", "gradient norm")
    if norm is None:
        return ""
    says = f"Before clipping; the largest was {max(norm.values):.3g}. {STRENGTH}"
    return lines_chart("Gradient norm", says, [thin(smooth(norm))], "norm", scale="log")


def residual_chart(rows: Sequence[Mapping]) -> str:
    lines = [thin(layer_named(line)) for line in family(rows, "residual_rms.")]
    if not lines:
        return ""
    says = f"Root mean square after each layer. At the end: {ending(lines[0])}, {ending(lines[-1])}."
    return lines_chart("Size of the residual", says, lines, "RMS", draw=charts.draw_depths, scale="log")


def zeros_chart(rows: Sequence[Mapping]) -> str:
    # The embedding's gradient is zero wherever a word does not occur in the batch: that says nothing.
    found = [line for line in family(rows, "zero_grad.") if line.name != "embeddings"]
    lines = sorted(found, key=lambda line: -line.values[-1])[:SHOWN]
    if not lines:
        return ""
    says = f"Share of gradient elements that are exactly zero. Highest at the end: {ending(lines[0])}."
    return lines_chart("Zero gradients", says, [thin(line) for line in lines], "share")


def speed_chart(rows: Sequence[Mapping]) -> str:
    speed = series(rows, "tokens_per_s", "tokens per second")
    if speed is None:
        return ""
    says = f"Between {min(speed.values):,.0f} and {max(speed.values):,.0f} tokens per second. {STRENGTH}"
    return lines_chart("Speed", says, [thin(smooth(speed))], "tokens per second")


def by_role(rows: Sequence[Mapping]) -> list[tuple[str, float, str]]:
    """(role, gradient norm, share of exact zeros), as last seen."""
    norms = {line.name: line.values[-1] for line in family(rows, "grad_norm.")}
    zeros = {line.name: line.values[-1] for line in family(rows, "zero_grad.")}
    return [(role, norm, f"{zeros[role]:.3%}" if role in zeros else "–") for role, norm in norms.items()]


def ending(line: Line) -> str:
    return f"{line.values[-1]:.3g} ({line.name})"


def layer_named(line: Line) -> Line:
    return line._replace(name=f"layer {line.name}" if line.name.isdigit() else line.name)


def lines_chart(
    title: str,
    says: str,
    lines: Sequence[Line],
    label: str,
    *,
    draw: Callable = charts.draw_lines,
    scale: str = "linear",
    level: float | None = None,
) -> str:
    return chart(title, says, picture(draw, lines, label, scale, level), line_table(lines))


def line_table(lines: Sequence[Line]) -> str:
    """About ROWS steps of the lines, evenly spaced, the last one always among them."""
    steps = sorted({step for line in lines for step in line.steps})
    chosen = sorted({round(i * (len(steps) - 1) / (ROWS - 1)) for i in range(ROWS)})
    values = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    rows = [[round(steps[i]), *(value.get(steps[i], "–") for value in values)] for i in chosen]
    return table(["step", *(line.name for line in lines)], rows)


def picture(draw: Callable, *data, height: float = 2.7) -> str | None:
    """The chart, or nothing where matplotlib is missing: then `notes` says so, and the numbers are shown."""
    return None if charts.missing() else charts.svg(draw, *data, height=height)


def scores_chart(held_out: HeldOut) -> str:
    """Bits per byte by source, the model beside the compressors."""
    scores = with_total(held_out)
    says = "What one byte of unseen text costs, with its standard error. xz -9e and bzip2 -9 compress the same bytes."
    head = ["source", "model", "±", "xz", "bzip2", "bytes", "tokens", "documents"]
    rows = [[s.source, *map(three, rates(s)), s.bytes, s.tokens, s.documents] for s in scores]
    bars = score_bars(held_out)
    image = picture(charts.draw_bars, bars, height=1.1 + 0.62 * len(bars))
    return chart("Bits per byte", says, image, table(head, rows, strong=len(rows) - 1 if len(rows) > 1 else None))


def with_total(held_out: HeldOut) -> list[Score]:
    return [*held_out.scores, *([held_out.total] if len(held_out.scores) > 1 else [])]


def rates(score: Score) -> tuple[float, float, float, float]:
    return score.bits_per_byte, score.standard_error, score.xz_bits_per_byte, score.bz2_bits_per_byte


def three(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def score_bars(held_out: HeldOut) -> list[Bar]:
    bars = [(score.source, *rates(score)) for score in with_total(held_out)]
    return [Bar(plain(name), model, error, {"xz": xz, "bzip2": bz2}) for name, model, error, xz, bz2 in bars]


def positions_chart(held_out: HeldOut) -> str:
    """Whether reading more of a document helps to predict the rest."""
    spans = held_out.spans
    if len(spans) < 2:
        return absent("Loss by position", "The held-out documents are one token long.")
    early, late = spans[1], spans[-1]
    says = f"A document's second token costs {early.nats:.2f} nats, those after {late.first:,} tokens {late.nats:.2f}."
    image = picture(charts.draw_positions, [(span.first, span.last, span.nats) for span in spans[1:]])
    rows = [[f"{span.first + 1:,} to {span.last + 1:,}", span.nats, span.tokens] for span in spans]
    rows[:2] = [[str(span.first + 1), span.nats, span.tokens] for span in spans[:2]]  # one position each
    return chart("Loss by position", says, image, table(["positions", "nats", "tokens"], rows))
