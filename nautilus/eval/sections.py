"""The sections of a report's page, each from a Report to HTML. A part without data says so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

from nautilus.config import Layer, describe, weight_count
from nautilus.eval import charts, figures
from nautilus.eval.loss import Score
from nautilus.eval.material import Report, Sample, series, smooth
from nautilus.eval.page import absent, amount, card, duration, folded, grid, paragraph, table, text, tiles

KINDS = {"M": "Mamba-2", "*": "attention", "E": "experts", "-": "MLP", "L": "linear", "_": "nothing"}


def headline(report: Report) -> str:
    """The numbers a reader comes for."""
    count, entries = weight_count(report.config), []
    remark = f"{amount(count['active'])} active per token"
    remark += f"; {amount(count['mtp'])} in the prediction block" if count["mtp"] else ""
    entries.append(("Parameters", amount(count["main"] + count["mtp"]), remark))
    if report.tokens:
        entries.append(("Tokens", amount(report.tokens), f"in {len(report.rows):,} steps"))
    if report.seconds:
        entries.append(("Time in steps", duration(report.seconds), peak_memory(report)))
        entries.append(("Speed", f"{report.tokens / report.seconds:,.0f}", "tokens per second, mean of the run"))
    loss = series(report.rows, "next_token") or series(report.rows, "loss")
    if loss is not None:
        end, start = smooth(loss).values[-1], loss.values[0]
        entries.append(("Next-token loss", f"{end:.3f}", f"nats per token at the end; {start:.2f} at the start"))
    best = "Held-out bits per byte"
    if report.held_out is not None:
        total = report.held_out.total
        rivals = f"xz {total.xz_bits_per_byte:.3f}, bzip2 {total.bz2_bits_per_byte:.3f}"
        entries.append((best, f"{total.bits_per_byte:.3f}", f"{plus_minus(total)}{rivals}"))
    return tiles(entries, best=best)


def peak_memory(report: Report) -> str:
    return f"peak memory {report.memory_gb:.2g} GB" if report.memory_gb else "saves and evaluation not counted"


def plus_minus(score: Score) -> str:
    return "" if math.isnan(score.standard_error) else f"± {score.standard_error:.3f}; "


def notes(report: Report) -> str:
    """What a reader should not have to find out alone; nothing when there is nothing to say."""
    found = [charts.missing() or ""]
    dead = series(report.rows, "dead_experts")
    if dead is not None and dead.values[-1]:
        found.append(f"Experts that saw no token in step {dead.steps[-1]:,}: {dead.values[-1]:g}.")
    blank = [row.get("step") for row in report.rows if "loss" in row and row["loss"] is None]
    if blank:
        found.append(f"Steps whose loss is not a number: {len(blank)}, the first is step {blank[0]}.")
    if report.held_out is not None:
        worse = [score.source for score in report.held_out.scores if beaten(score)]
        found.append(f"A compressor that has learned nothing does better on {', '.join(worse)}." if worse else "")
    items = "".join(f"<li>{text(words)}</li>" for words in found if words)
    return f'<div class="notes" role="note"><ul>{items}</ul></div>' if items else ""


def beaten(score: Score) -> bool:
    return score.bits_per_byte > min(score.xz_bits_per_byte, score.bz2_bits_per_byte)


# ----- model ---------------------------------------------------------------------------------------------------------


def model_part(report: Report) -> str:
    """The layers as a strip of letters, what each kind is, and the settings."""
    config = report.config
    spoken, strip = f"Layers {config.pattern}", "".join(map(tag, config.layers))
    if config.mtp:
        strip += f'<li class="gap">then, to predict further ahead</li>{"".join(map(tag, config.mtp))}'
        spoken += f", prediction block {''.join(layer.letter for layer in config.mtp)}"
    legend = "".join(
        f'<dt><ul class="strip">{tag(layer)}</ul></dt>'
        f'<dd>{KINDS[layer.letter]} <span class="quiet">{text(describe(layer)[2:-1])}</span></dd>'
        for layer in dict.fromkeys([*config.layers, *config.mtp])
    )
    head = "tied to" if config.tied else "apart from"
    sizes = f"Vocabulary {config.vocab:,}, width {config.width:,}, head {head} the embedding."
    rows = [*flat(report.settings)]
    settings = table(["setting", "value"], rows, kind="words") if rows else paragraph("The run recorded none.")
    return card(
        paragraph(sizes),
        f'<div role="img" aria-label="{text(spoken)}"><ul class="strip">{strip}</ul></div>',
        f'<dl class="legend">{legend}</dl>',
        folded("Settings of the run", settings),
    )


def tag(layer: Layer) -> str:
    return f'<li class="{KINDS[layer.letter]}">{text(layer.letter)}</li>'


def flat(settings: Mapping, above: str = "") -> Iterator[tuple[str, str]]:
    """(a.b.c, value) of every plain value; a list of layer records is shown as its pattern."""
    for name, value in settings.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "kind" in item for item in value):
            yield path, "".join(str(item["kind"]) for item in value)
        else:
            yield path, value if isinstance(value, str) else json.dumps(value)


# ----- figures -------------------------------------------------------------------------------------------------------


def training_part(report: Report) -> str:
    return grid(figures.loss_chart(report.rows), figures.depths_chart(report.rows))


def experts_part(report: Report) -> str:
    if not any(layer.letter == "E" for layer in (*report.config.layers, *report.config.mtp)):
        return grid(absent("Expert load", "This model has no experts."))
    return grid(
        figures.load_chart(report.held_out.loads if report.held_out is not None else {}),
        figures.balance_chart(report.rows),
    )


def health_part(report: Report) -> str:
    """The signs that came before published divergences."""
    makers = figures.norm_chart, figures.residual_chart, figures.zeros_chart, figures.speed_chart
    parts = [make(report.rows) for make in makers]
    if not any(parts):
        return grid(absent("Check-ups", "This run logged no health metrics."))
    roles = figures.by_role(report.rows)
    last = folded("Gradients by role at the last check-up", table(["role", "norm", "exactly zero"], roles))
    return grid(*parts, *([card(last, kind="wide")] if roles else []))


def held_out_part(report: Report) -> str:
    if report.held_out is None:
        return grid(absent("Bits per byte", "The model has not been scored on held-out text."))
    return grid(figures.scores_chart(report.held_out), figures.positions_chart(report.held_out))


# ----- samples, reproduction -----------------------------------------------------------------------------------------


def samples_part(report: Report) -> str:
    """What the model writes; the prompt is bold."""
    if not report.samples:
        return grid(absent("Completions", "None were drawn."))
    return grid(*map(sample_card, report.samples), kind="narrow")


def sample_card(sample: Sample) -> str:
    return card(
        f'<pre dir="auto" tabindex="0"><b>{text(sample.prompt)}</b>{text(sample.completion)}</pre>',
        paragraph(sample.note, "quiet") if sample.note else "",
        kind="sample",
    )


def reproduce_part(report: Report) -> str:
    commands = "".join(f"<h3>{text(why)}</h3><pre>{text(line)}</pre>" for why, line in report.commands.items())
    rows = [*report.environment.items()]
    return grid(
        card("<h3>Environment</h3>", table([], rows, kind="words")) if rows else absent("Environment", "Not recorded."),
        card(commands) if commands else absent("Commands", "None were recorded."),
    )
