"""The report of speculative decoding: tables for the terminal, a page, a picture, and all numbers as CSV and JSON.

    found = gather(answers, title=…, about=…, command=…)
    write(run, found)

leaves results.json, results.csv, report.html and report.png in the run; `summary(found)` has the tables.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from rich.table import Table

from nautilus.eval import charts
from nautilus.eval.figures import picture
from nautilus.eval.page import chart, grid, page, paragraph, section, table, text
from nautilus.eval.report import environment
from nautilus.eval.speculation import (
    ALL,
    PLAIN,
    PUBLISHED,
    WIDTHS,
    Answered,
    Band,
    Draft,
    Interval,
    Numbers,
    Payoff,
    arms_of,
    bands,
    foretold,
    medians,
    numbers,
    payoff,
    speed_up,
)
from nautilus.eval.speculation_charts import draw_bands, draw_concentration, draw_matrix
from nautilus.runtime import Run, write_atomic
from nautilus.runtime.progress import finite

MEASURES = {"copied": "of the answer stands in the prompt", "coded": "of the prompt is code or data"}
HEAD = "arm", "tokens/s", "speed-up", "reading", "cycles / 1,000", "accepted", "width", "of oracle", "same answers"


@dataclass(frozen=True, kw_only=True)
class Speculated:
    """`answers` are without repeats; see `gather`. pairs: arms that are told beside each other."""

    title: str
    about: str
    command: str
    answers: Sequence[Answered]
    numbers: Sequence[Numbers]
    pairs: Sequence[tuple[str, str]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        return [*dict.fromkeys(each.target for each in self.numbers)]

    def of(self, target: str) -> list[Answered]:
        return [one for one in self.answers if one.target == target]

    def overall(self, target: str) -> list[Numbers]:
        """Of every arm over all prompts: those of the last family, which is `all` where there are several."""
        mine = [each for each in self.numbers if each.target == target]
        return [each for each in mine if each.family == mine[-1].family]

    def drafts(self, target: str) -> dict[str, list[Draft]]:
        """Of the arms that tell of any."""
        mine = self.of(target)
        found = {arm: [d for one in mine if one.arm == arm for d in one.drafts] for arm in arms_of(mine)}
        return {arm: drafts for arm, drafts in found.items() if drafts}


def gather(
    answers: Iterable[Answered], *, title: str, about: str, command: str, pairs: Sequence[tuple[str, str]] = (),
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Speculated:  # fmt: skip
    kept = medians(answers)
    return Speculated(
        title=title, about=about, command=command, answers=kept, numbers=numbers(kept), pairs=pairs, facts=facts
    )


def row_of(each: Numbers) -> list[str]:
    oracle = "–" if math.isnan(each.of_oracle) else f"{each.of_oracle:.0%}"
    reading = "" if each.arm == PLAIN else each.speed_up.reading
    same = "" if each.arm == PLAIN else f"{each.same} of {each.prompts}"
    figures = f"{each.cycles_per_1000:.0f}", two(each.accepted), two(each.width), oracle, same
    return [each.arm, f"{each.tokens_per_s:,.1f}", str(each.speed_up), reading, *figures]


def two(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def matrix(found: Speculated, target: str) -> tuple[list[str], list[str], list[list[Numbers | None]]]:
    """Arms, families, and the numbers of each arm (down) in each family (across)."""
    mine = {(each.arm, each.family): each for each in found.numbers if each.target == target}
    arms, families = ([*dict.fromkeys(key[place] for key in mine)] for place in (0, 1))
    return arms, families, [[mine.get((arm, family)) for family in families] for arm in arms]


def by_family(found: Speculated, target: str) -> tuple[list[str], list[list[str]]]:
    arms, families, cells = matrix(found, target)
    rows = [[str(each.speed_up) if each else "–" for each in row] for row in cells]
    return ["arm", *families], [[arm, *row] for arm, row in zip(arms, rows, strict=True)]


def ratios(found: Speculated, target: str) -> dict[tuple[str, str], dict[str, Interval]]:
    """How much faster the first of each pair is than the second, by family."""
    mine = found.of(target)
    families = [*dict.fromkeys(each.family for each in found.numbers if each.target == target)]
    there = {family: [one for one in mine if family in (one.family, ALL)] for family in families}
    return {pair: {family: speed_up(some, *pair) for family, some in there.items()} for pair in found.pairs}


def beside(found: Speculated, target: str) -> tuple[list[str], list[list[str]]]:
    told = ratios(found, target)
    families = [*dict.fromkeys(family for by_family in told.values() for family in by_family)]
    return ["", *families], [[f"{arm} / {other}", *map(str, each.values())] for (arm, other), each in told.items()]


def summary(found: Speculated) -> Iterator[Table]:
    """For every target its arms over all prompts, their speed-ups by family, and those beside other arms."""
    for target in found.targets:
        for title, (head, rows) in {
            f"{target}: all prompts": (HEAD, [*map(row_of, found.overall(target))]),
            f"{target}: speed-up by family": by_family(found, target),
            f"{target}: rate by that of another": beside(found, target),
        }.items():
            if not rows:
                continue
            shown = Table(*head, title=title, caption="ratios, paired by prompt (95 % interval)")
            shown.columns[0].no_wrap = True
            for row in rows:
                shown.add_row(*row)
            yield shown


# ----- files ---------------------------------------------------------------------------------------------------------


def write(run: Run, found: Speculated) -> None:
    """results.json, results.csv, report.html and, where matplotlib is there, report.png."""
    write_atomic(run.folder / "results.json", json.dumps(finite(plain(found)), indent=1) + "\n")
    write_atomic(run.folder / "results.csv", spreadsheet(found.numbers))
    write_atomic(run.report, render(found))
    if charts.missing() is None:
        parts: list = [(f"{target}: speed-up", draw_matrix, matrix(found, target)) for target in found.targets]
        if lines := concentrations(found):
            parts.append(("Gain of the best drafts", draw_concentration, (lines,)))
        charts.png(run.picture, parts)


def plain(found: Speculated) -> dict[str, Any]:
    """Everything that the report says, as values that JSON has."""
    rows = [asdict(each) | {"speed_up": each.speed_up._asdict()} for each in found.numbers]
    drafts, structure, pairs = [], [], []
    for target in found.targets:
        for (arm, other), by in ratios(found, target).items():
            pairs += [
                {"target": target, "arm": arm, "other": other, "family": f, **each._asdict()} for f, each in by.items()
            ]
        for arm, mine in found.drafts(target).items():
            counted = {"all": foretold(mine)._asdict(), "ran": foretold([d for d in mine if d.ran])._asdict()}
            pays = payoff(mine)
            best = {f"{share:g}": gain for share, gain in pays.best.items()}
            drafts.append({"target": target, "arm": arm, "high": pays.high, "best": best, "predictor": counted})
        for measure in MEASURES:
            for arm, each in banded(found, target, measure):
                told = each._asdict() | {"speed_up": each.speed_up._asdict()}
                structure.append({"target": target, "arm": arm, "measure": measure} | told)
    facts = {"title": found.title, "command": found.command, "facts": dict(found.facts)}
    return facts | {"rows": rows, "pairs": pairs, "drafts": drafts, "structure": structure, "published": PUBLISHED}


def spreadsheet(rows: Sequence[Numbers]) -> str:
    """A line for each arm of each target and family; what has a value for each source or stage is a column for each."""
    lines = []
    for each in rows:
        line: dict[str, Any] = {}
        for name, value in (asdict(each) | {"speed_up": each.speed_up._asdict()}).items():
            inside = value if isinstance(value, dict) else {"": value}
            line |= {f"{name} {key}".rstrip(): item for key, item in inside.items()}
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*dict.fromkeys(name for line in lines for name in line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value != value else value for name, value in line.items()} for line in lines)
    return out.getvalue()


# ----- the page ------------------------------------------------------------------------------------------------------


def render(found: Speculated) -> str:
    parts = {
        "speed": ("Speed", speed_part),
        "work": ("Passes and time", work_part),
        "drafts": ("Copied drafts", drafts_part),
        "structure": ("Structure of prompts", structure_part),
        "reproduce": ("Reproduce", reproduce_part),
    }
    head = f"<h1>{text(found.title)}</h1>{paragraph(found.about, 'lead')}"
    body = "".join(section(name, title, *make(found)) for name, (title, make) in parts.items())
    return page(found.title, f"<header>{head}</header><main>{body}</main><footer>Written by Nautilus.</footer>")


READING = (
    "Speed-ups are geometric means of ratios to plain decoding of the same prompt, with 95 % bootstrap intervals over "
    "prompts; only answers that are the same as the plain ones count. Faster: the lower end is above 1. All prompts "
    "weigh alike. Accepted: tokens of drafts a cycle, beside the one that every pass gives."
)


def speed_part(found: Speculated) -> Iterator[str]:
    yield paragraph(READING)
    shown = []
    for target in found.targets:
        arms, families, cells = matrix(found, target)
        image = picture(draw_matrix, arms, families, cells, height=1.1 + 0.3 * len(arms))
        data = table(*by_family(found, target), kind="words")
        shown.append(
            chart(f"{target}: speed-up", "Blue: slower than plain; orange: faster; bold: surely.", image, data)
        )
    yield grid(*shown)
    for target in found.targets:
        yield f"<h3>{text(target)}</h3>" + table(HEAD, [*map(row_of, found.overall(target))], kind="words")
        if found.pairs:
            yield paragraph("The rate of one arm by that of another, in the same way.")
            yield table(*beside(found, target), kind="words")


def work_part(found: Speculated) -> Iterator[str]:
    """Over all prompts of a target: where the tokens came from, how wide the passes were, where the time went."""
    for target in found.targets:
        rows = found.overall(target)
        sources = [*dict.fromkeys(name for each in rows for name in each.cycles_of)]
        stages = [*dict.fromkeys(name for each in rows for name in each.spent)]
        yield f"<h3>{text(target)}</h3>"
        told = [[each.arm, *(three(each, name) for name in sources)] for each in rows]
        yield paragraph("Of each source of drafts: share of cycles / share of tokens / accepted a cycle.")
        yield table(["arm", *sources], told, kind="words")
        yield paragraph("Tokens of a pass: share of cycles.")
        yield table(
            ["arm", *WIDTHS], [[each.arm, *(percent(each.widths.get(w, 0.0)) for w in WIDTHS)] for each in rows]
        )
        if stages:
            yield paragraph("Share of the seconds.")
            yield table(["arm", *stages], [[e.arm, *(percent(e.spent.get(s, 0.0)) for s in stages)] for e in rows])


def three(each: Numbers, source: str) -> str:
    if source not in each.cycles_of:
        return "–"
    return f"{each.cycles_of[source]:.1%} / {each.tokens_of[source]:.1%} / {each.accepted_of[source]:.2f}"


def drafts_part(found: Speculated) -> Iterator[str]:
    lines, told, known = concentrations(found), [], []
    for target in found.targets:
        for arm, mine in found.drafts(target).items():
            pays = payoff(mine)
            told.append([f"{target}, {arm}", pays.drafts, percent(pays.high), *map(percent, pays.best.values())])
            for name, some in {"all places": mine, "cycles that ran": [draft for draft in mine if draft.ran]}.items():
                count, *figures = foretold(some)
                known.append([f"{target}, {arm}: {name}", f"{count:,}", *map(percent, figures)])
    if not lines:
        yield paragraph("No arm told of its copied drafts.", "quiet")
        return
    head = ["", "drafts", "6 or more true", *(f"best {share:.0%}" for share in payoff(()).best)]
    says = "The share of all tokens saved that the best copied drafts save. Best: most of their tokens come true."
    yield chart("Gain of the best drafts", says, picture(draw_concentration, lines), table(head, told))
    published = ["published, three targets", "", *(f"{low:.1%}–{high:.1%}" for low, high in PUBLISHED.values())]
    yield paragraph(
        "A predictor chooses drafts of which it expects more than 6 tokens to come true; high: 6 or more do."
    )
    yield table(["", "drafts", *PUBLISHED], [*known, published], kind="words")


def concentrations(found: Speculated) -> list[tuple[str, Payoff]]:
    every = [(target, arm, mine) for target in found.targets for arm, mine in found.drafts(target).items()]
    return [(f"{target}, {arm}", payoff(mine)) for target, arm, mine in every]


def structure_part(found: Speculated) -> Iterator[str]:
    shown = []
    for target in found.targets:
        for measure, says in MEASURES.items():
            if told := [*banded(found, target, measure)]:
                rows = [[arm, f"{b.low:.0%}–{b.high:.0%}", b.prompts, str(b.speed_up)] for arm, b in told]
                data = table(["arm", "share", "prompts", "speed-up"], rows, kind="words")
                image = picture(draw_bands, told, says, height=3.6)
                shown.append(chart(f"{target}: speed-up by what {says}", "Bars: 95 % intervals.", image, data))
    yield grid(*shown) if shown else paragraph("No answer told of the structure of its prompt.", "quiet")


def banded(found: Speculated, target: str, measure: str) -> Iterator[tuple[str, Band]]:
    """Of every arm but plain, where any prompt has the measure."""
    mine = found.of(target)
    for arm in arms_of(mine):
        if arm != PLAIN:
            yield from ((arm, band) for band in bands(mine, arm, lambda one: getattr(one, measure)))


def reproduce_part(found: Speculated) -> Iterator[str]:
    prompts = [[one.target, one.family, one.set] for one in found.answers if one.arm == found.answers[0].arm]
    counts = [[*key, prompts.count([*key])] for key in dict.fromkeys(map(tuple, prompts))]
    yield f"<pre>{text(found.command)}</pre>"
    yield table(["target", "family", "set", "prompts"], counts, kind="words")
    yield table(["", ""], [*map(list, (dict(found.facts) | environment()).items())], kind="words")
