"""The report of rows that a model made of texts: what was asked for, what left on the way and why, what is kept."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from nautilus.data.tally import Tally
from nautilus.eval import charts
from nautilus.eval.charts import LIGHT
from nautilus.eval.figures import picture
from nautilus.eval.page import card, chart, grid, page, paragraph, section, table, text
from nautilus.eval.report import environment
from nautilus.posttrain.synthesis import Made
from nautilus.runtime import Run, program, write_atomic

HEAD = "kind", "step", "why", "rows"
STEPS = {
    "kept": "one", "lost": "pale", "unreadable": "two", "unsound": "three", "again": "muted", "contaminated": "four",
    "unverified": "grid",
}  # fmt: skip
ABOUT = (
    "What a model wrote of texts. Unreadable: not in the form that was asked for. Unsound: a rephrasing with other"
    " facts or of another length, a question that gives its answer away. Again: asked before. Contaminated: with words"
    " of a problem that the named task holds back. Unverified: answered otherwise when it was asked with its text."
)
SHOWN = 3  # kept rows of each kind


@dataclass(frozen=True, kw_only=True)
class Synthesised:
    title: str
    made: Made
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[list[str]]:
        """Of HEAD: the texts, then kind by kind."""
        found = [["texts", "found", "", f"{self.made.texts.documents:,}"], *dropped("texts", self.made.texts)]
        for kind, tally in self.made.left.items():
            found.append([kind, "asked for", "", f"{tally.documents:,}"])
            found += dropped(kind, tally)
            found.append([kind, "kept", "", f"{len(self.made.kept(kind)):,}"])
        return found

    @property
    def steps(self) -> dict[str, dict[str, int]]:
        """By kind and step, how many rows ended there."""
        return {
            kind: {"kept": len(self.made.kept(kind)), **{step: tally.total(step)[0] for step in tally.dropped}}
            for kind, tally in self.made.left.items()
        }


def dropped(kind: str, tally: Tally) -> list[list[str]]:
    found = [(step, why, count) for step, reasons in tally.dropped.items() for why, (count, _) in reasons.items()]
    return [[kind, step, why, f"{count:,}"] for step, why, count in found]


def show(run: Run, made: Made, *, title: str, facts: Mapping[str, str]) -> None:
    """The report, and its table on the terminal."""
    found = Synthesised(title=title, made=made, facts=facts)
    write(run, found)
    shown = Table(*HEAD, title=title)
    for row in found.rows:
        shown.add_row(*row, style="bold" if row[1] == "kept" else "")
    Console(soft_wrap=True, highlight=False).print(shown, f"report {run.report}", sep="\n")


def write(run: Run, found: Synthesised) -> None:
    """results.json, report.html and, where matplotlib is there, report.png."""
    plain = {"title": found.title, "command": command(), "facts": dict(found.facts), "steps": found.steps}
    plain["rows"] = [dict(zip(HEAD, row, strict=True)) for row in found.rows]
    write_atomic(run.folder / "results.json", json.dumps(plain, indent=1) + "\n")
    write_atomic(run.report, render(found))
    if charts.missing() is None:
        charts.png(run.picture, [("What became of them", draw_steps, (found.steps,))])


def command() -> str:
    return f"{program()} {shlex.join(sys.argv[1:])}"


def render(found: Synthesised) -> str:
    numbers = table(HEAD, found.rows, kind="words")
    image = picture(draw_steps, found.steps, height=1.4 + 0.45 * len(found.steps))
    steps = chart("What became of them", "Each answer ends in one step.", image, numbers)
    facts = [*map(list, (dict(found.facts) | environment()).items())]
    parts = [
        f"<header><h1>{text(found.title)}</h1>{paragraph(ABOUT, 'lead')}</header><main>",
        section("steps", "Steps", grid(steps), numbers),
        section("kept", "Kept", grid(*kept(found.made))),
        section("examples", "Left out", grid(*examples(found.made))),
        section("reproduce", "Reproduce", f"<pre>{text(command())}</pre>", table(("", ""), facts)),
        "</main><footer>Written by Nautilus.</footer>",
    ]
    return page(found.title, "".join(parts))


def kept(made: Made) -> list[str]:
    return [
        card(
            f"<h3>{text(kind)}</h3>",
            *(told(one.source, f"{one.question}\n{one.answer}") for one in made.kept(kind)[:SHOWN]),
        )
        for kind in made.left
    ]


def told(name: str, words: str) -> str:
    return f"<p class='quiet'>{text(name)}</p><pre>{text(words.strip())}</pre>"


def examples(made: Made) -> list[str]:
    """One card for each reason."""
    return [
        card(f"<h3>{text(kind)}: {text(step)}, {text(why)}</h3>", *(told(*one) for one in some))
        for kind, tally in {"texts": made.texts, **made.left}.items()
        for step, reasons in tally.examples.items()
        for why, some in reasons.items()
    ]


def draw_steps(figure, steps: Mapping[str, Mapping[str, int]]) -> None:
    """A bar for each kind, in pieces by the step in which rows ended."""
    axes = figure.subplots()
    ends: Sequence[float] = [0.0] * len(steps)
    for step, colour in STEPS.items():
        counts = [each.get(step, 0) for each in steps.values()]
        if any(counts):
            axes.barh(range(len(steps)), counts, left=ends, height=0.6, color=LIGHT[colour], label=step)
            ends = [end + count for end, count in zip(ends, counts, strict=True)]
    axes.set_yticks(range(len(steps)), [*steps])
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.set_xlabel("answers")
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=4, handlelength=1)
