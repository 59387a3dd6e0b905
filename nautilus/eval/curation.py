"""The report of a curation: what went in, what each step dropped and why, with examples, and one picture."""

from __future__ import annotations

from nautilus.data.curate import Result
from nautilus.eval import charts
from nautilus.eval.charts import LIGHT
from nautilus.eval.page import amount, card, chart, folded, grid, page, paragraph, section, table, text, tiles
from nautilus.runtime import Run, write_atomic

ORDER = (
    *("undecodable", "extraction", "empty", "language", "repetition", "quality", "c4", "contaminated"),
    *("exact duplicate", "near duplicate"),
)


def ordered(result: Result) -> list[str]:
    """The steps that dropped anything, in the order of the work."""
    return sorted(result.dropped.dropped, key=ORDER.index)


def funnel(result: Result) -> list[tuple[str, int, int]]:
    """(step, documents, bytes): found, minus every step in order, kept."""
    rows = [("found", result.before.documents, result.before.bytes)]
    for stage in ordered(result):
        documents, size = result.dropped.total(stage)
        rows.append((stage, -documents, -size))
    if result.before.edited_bytes:
        rows.append(("edited", 0, -result.before.edited_bytes))
    return [*rows, ("kept", result.after.documents, result.after.bytes)]


def write_curation(run: Run, result: Result) -> None:
    """report.html and, where matplotlib is there, report.png."""
    write_atomic(run.report, render(run.folder.name, result))
    if charts.missing() is None:
        charts.png(run.picture, [("What each step dropped", draw_funnel, (funnel(result),))])


def render(title: str, result: Result) -> str:
    before, after = result.before, result.after
    share = f"{after.bytes / max(before.bytes, 1):.1%} of the bytes"
    head = tiles(
        [
            ("found", f"{before.documents:,}", f"documents, {amount(before.bytes)}B"),
            ("kept", f"{after.documents:,}", f"documents, {share}"),
            ("dropped", f"{before.documents - after.documents:,}", f"for {len(reasons(result))} reasons"),
        ],
        best="kept",
    )
    rows = [(step, f"{documents:,}", f"{size:,}") for step, documents, size in funnel(result)]
    numbers = table(("step", "documents", "bytes"), rows)
    picture = charts.svg(draw_funnel, funnel(result)) if charts.missing() is None else None
    steps = chart("Documents by step", "Every document that was found is in one row.", picture, numbers)
    why = [(stage, reason, f"{count:,}", f"{size:,}") for stage, reason, count, size in reasons(result)]
    body = [
        f"<header><h1>{text(title)}</h1>{paragraph('A curation of text.', 'lead')}{head}</header><main>",
        section("steps", "Steps", grid(steps)),
        section("reasons", "Reasons", table(("step", "reason", "documents", "bytes"), why, kind="words")),
        section("examples", "Examples", grid(*examples(result))),
        *notes(result),
        "</main>",
    ]
    return page(title, "".join(body))


def reasons(result: Result) -> list[tuple[str, str, int, int]]:
    return [
        (stage, reason, count, size)
        for stage in ordered(result)
        for reason, (count, size) in sorted(result.dropped.dropped[stage].items(), key=lambda each: -each[1][0])
    ]


def examples(result: Result) -> list[str]:
    """One card per reason, with the beginnings of documents that went."""
    cards = []
    for stage, reason, count, _ in reasons(result):
        shown = [
            f"<p class='quiet'>{text(name)}</p><pre>{text(start)}</pre>"
            for name, start in result.dropped.examples[stage][reason]
        ]
        cards.append(card(f"<h3>{text(stage)}: {text(reason)}</h3>", f"<p>{count:,} documents</p>", *shown))
    return cards


def notes(result: Result) -> list[str]:
    """What was not read, and which evaluation texts could not be looked for."""
    found = []
    if result.skipped:
        listing = "".join(f"<p>{text(name)}</p>" for name in result.skipped[:100])
        words = f"{len(result.skipped):,} files have names of no kind of text and were not read."
        found.append(section("files", "Other files", paragraph(words), folded("the first of them", listing)))
    if result.sets:
        short = result.sets.total("too short to be found")[0]
        words = f"{result.sets.documents:,} texts of evaluation sets were looked for; {short:,} are too short for that."
        found.append(section("sets", "Evaluation sets", paragraph(words)))
    return found


def draw_funnel(figure, rows) -> None:
    """A bar of documents for what was found, what each step dropped, and what was kept."""
    axes = figure.subplots()
    steps = [(step, abs(documents)) for step, documents, _ in rows if step != "edited"]
    names, values = [step for step, _ in steps], [count for _, count in steps]
    colours = [LIGHT["one"] if step in ("found", "kept") else LIGHT["two"] for step in names]
    axes.barh(range(len(steps)), values, color=colours, height=0.7)
    axes.set_yticks(range(len(steps)), names)
    axes.invert_yaxis()
    axes.set_xlabel("documents")
    axes.set_xlim(0, max([*values, 1]) * 1.2)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:,}", va="center", color=LIGHT["ink"], fontsize=8)
    axes.grid(False, axis="y")
