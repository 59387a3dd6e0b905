"""The report of training on tasks: how often each is solved, by whom, and what came of the answers on the way."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from nautilus.eval import charts
from nautilus.eval.charts import LIGHT, LINES, Line, shortened
from nautilus.eval.figures import lines_chart, loss_chart, picture
from nautilus.eval.material import family, series, smooth, thin
from nautilus.eval.page import absent, chart, grid, page, paragraph, section, table, text
from nautilus.eval.pipeline import More
from nautilus.eval.report import environment
from nautilus.eval.suite import wilson
from nautilus.posttrain.profile import Score, mean
from nautilus.runtime import Run, program, read_metrics, write_atomic
from nautilus.runtime.progress import finite

MARKS = "os^Dv"
NARROW = 14  # characters of an interval
HEAD = "task", "model", "reward", "95 % interval", "answers", "lost"
CURVE = "task", "budget", "reward", "95 % interval", "thinking", "longest", "rises", "within"
PARTS = "task", "part", "model", "mean", "answers"
BUDGET = (
    "The same with thinking closed after so many tokens, whatever the model was about to think. Thinking: tokens of "
    "it in an answer, in the mean; longest: in a turn, at most. Rises: no smaller budget is better beyond the "
    "intervals of both; within: no turn thought for longer than it might."
)
ABOUT = (
    "The mean reward of answers to problems of each task that nobody was trained on, each drawn once at temperature 1. "
    "Lost: answers that nothing is known of, because an environment or a grader failed."
)


@dataclass(frozen=True, kw_only=True)
class Practised:
    """scores[model][task]; curve[thinking budget][task]; more: further tables, as title, head and rows."""

    title: str
    command: str
    scores: Mapping[str, Mapping[str, Score]]
    facts: Mapping[str, str] = field(default_factory=dict)
    curve: Mapping[int, Mapping[str, Score]] = field(default_factory=dict)
    more: Sequence[More] = ()

    @property
    def tasks(self) -> list[str]:
        return [*dict.fromkeys(task for by_task in self.scores.values() for task in by_task)]

    @property
    def rows(self) -> list[list[str]]:
        found = []
        for task in self.tasks:
            for name, by_task in self.scores.items():
                if task in by_task:
                    one = by_task[task]
                    found.append([task, name, *measured(one), f"{len(one.rewards):,}", f"{one.lost:,}"])
        return found

    @property
    def by_budget(self) -> list[list[str]]:
        """Rows of CURVE, task by task."""
        thinking = [*dict.fromkeys(task for by_task in self.curve.values() for task in by_task)]
        return [
            [
                task, f"{budget:,}", *measured(one), f"{mean(one.thought):.1f}", f"{max(one.longest, default=0):,}",
                *("yes" if holds else "no" for holds in kept(self.curve, budget, task).values()),
            ]
            for task in thinking
            for budget, by_task in self.curve.items()
            for one in (by_task[task],)
        ]  # fmt: skip

    @property
    def parts(self) -> list[list[str]]:
        """Rows of PARTS: what else is seen of answers, each over those of which it is known."""
        seen = dict.fromkeys(
            (task, part) for by_task in self.scores.values() for task, one in by_task.items() for part in one.parts
        )
        return [
            [task, part, name, f"{mean(values):.3f}", f"{len(values):,}"]
            for task, part in sorted(seen, key=lambda pair: self.tasks.index(pair[0]))
            for name, by_task in self.scores.items()
            if task in by_task and (values := by_task[task].parts.get(part))
        ]


def measured(one: Score) -> tuple[str, str]:
    """Its mean, and the ends of its interval."""
    low, high = interval(one)
    return f"{one.mean:.3f}", "–" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


def interval(one: Score) -> tuple[float, float]:
    """Of 95 %, nan where nothing is known. Where rewards are 0 or 1 that of Wilson, which also says something of few
    answers, and of such as are all right; otherwise 1.96 standard errors, where rewards are 0 to 1 within these."""
    count = len(one.rewards)
    if count and {*one.rewards} <= {0, 1}:
        return wilson(one.mean, count)
    low, high = one.mean - 1.96 * one.error, one.mean + 1.96 * one.error
    within = count > 1 and 0 <= min(one.rewards) and max(one.rewards) <= 1
    return (max(0.0, low), min(1.0, high)) if within else (low, high)


def kept(curve: Mapping[int, Mapping[str, Score]], budget: int, task: str) -> dict[str, bool]:
    """rises: no smaller budget is better beyond the intervals of both; within: no turn thought longer than it might."""
    one = curve[budget][task]
    smaller = [interval(by_task[task])[0] for other, by_task in curve.items() if other < budget]
    high, most = interval(one)[1], math.inf if one.most is None else one.most
    return {"rises": not any(low > high for low in smaller), "within": max(one.longest, default=0) <= most}


def summary(found: Practised) -> list[Table]:
    shown = []
    known = ("Reward", HEAD, found.rows), ("Thinking budget", CURVE, found.by_budget), *found.more
    for title, head, rows in known:
        if rows:
            shown.append(Table(title=title))
            for name, cells in zip(head, zip(*rows, strict=True), strict=True):
                # On a narrow terminal names are folded, and numbers stay whole.
                shown[-1].add_column(name, overflow="fold", no_wrap=max(map(len, cells)) <= NARROW)
            for row in rows:
                shown[-1].add_row(*row)
    return shown


def show(run: Run, scores: Mapping[str, Mapping[str, Score]], **told: Any) -> None:
    """The report, and its tables on the terminal. told: title, facts, curve and more of `Practised`."""
    found = Practised(command=f"{program()} {shlex.join(sys.argv[1:])}", scores=scores, **told)
    write(run, found)
    Console(soft_wrap=True, highlight=False).print(*summary(found), f"report {run.report}", sep="\n")


def write(run: Run, found: Practised) -> None:
    """results.json, report.html and, where matplotlib is there, report.png."""
    scores = {name: plain_scores(by_task) for name, by_task in found.scores.items()}
    curve = {
        str(budget): {task: told | kept(found.curve, budget, task) for task, told in plain_scores(by_task).items()}
        for budget, by_task in found.curve.items()
    }
    plain = {"title": found.title, "command": found.command, "facts": dict(found.facts), "scores": scores}
    plain |= {"curve": curve} if curve else {}
    plain |= {title.lower(): [dict(zip(head, row, strict=True)) for row in rows] for title, head, rows in found.more}
    write_atomic(run.folder / "results.json", json.dumps(finite(plain), indent=1) + "\n")
    rows = read_metrics(run.metrics)
    write_atomic(run.report, render(found, rows))
    if charts.missing() is None:
        parts: list = [("Reward by task", draw_scores, (found,))]
        if found.curve:
            parts.append(("Reward by thinking budget", draw_curve, (found,)))
        if lines := rewards(rows):
            parts.append(("Reward in training", charts.draw_lines, (lines, "reward")))
        charts.png(run.picture, parts)


def plain_scores(by_task: Mapping[str, Score]) -> dict[str, dict]:
    return {
        task: {
            "reward": one.mean, "error": one.error, "answers": len(one.rewards), "lost": one.lost,
            "thinking": mean(one.thought), "longest": max(one.longest, default=0),
            **({"parts": {name: mean(values) for name, values in one.parts.items()}} if one.parts else {}),
        }
        for task, one in by_task.items()
    }  # fmt: skip


def rewards(rows: Sequence[Mapping]) -> list[Line]:
    """By task, smoothed."""
    return [thin(smooth(line)) for line in family(rows, "reward_")]


def render(found: Practised, rows: Sequence[Mapping]) -> str:
    image = picture(draw_scores, found, height=max(2.7, 1 + 0.2 * max(len(found.scores), len(found.tasks))))
    says = "Means with their 95 % intervals."
    scores = chart("Reward by task", says, image, table(HEAD, found.rows, kind="words"))
    facts = [*map(list, (dict(found.facts) | environment()).items())]
    parts = [
        f"<header><h1>{text(found.title)}</h1>{paragraph(ABOUT, 'lead')}</header><main>",
        section("scores", "Scores", grid(scores, *budgets(found))),
        *(
            section(title.lower(), title, table(head, rows, kind="words"))
            for title, head, rows in (("Parts", PARTS, found.parts), *found.more)
            if rows
        ),
        section("training", "Training", grid(reward_chart(rows), loss_chart(rows), *on_the_way(rows))) if rows else "",
        section("reproduce", "Reproduce", f"<pre>{text(found.command)}</pre>", table(("", ""), facts)),
        "</main><footer>Written by Nautilus.</footer>",
    ]
    return page(found.title, "".join(parts))


def budgets(found: Practised) -> list[str]:
    if not found.curve:
        return []
    image, rows = picture(draw_curve, found), found.by_budget
    broken = [f"{key} for {row[0]} at {row[1]}" for key in CURVE[-2:] for row in rows if row[CURVE.index(key)] == "no"]
    verdict = f"Not so: {', '.join(broken)}." if broken else "Both are so for every budget."
    return [chart("Reward by thinking budget", f"{BUDGET} {verdict}", image, table(CURVE, rows, kind="words"))]


def reward_chart(rows: Sequence[Mapping]) -> str:
    lines = rewards(rows)
    if not lines:
        return absent("Reward", "No step has been trained yet.")
    ends = ", ".join(f"{line.name} {line.values[0]:.2f} to {line.values[-1]:.2f}" for line in lines)
    return lines_chart("Reward in training", f"Means of a step, smoothed: {ends}.", lines, "reward")


ON_THE_WAY = {
    "answer_tokens": ("Length of answers", "Tokens that the model drew for a problem.", "tokens"),
    "mismatch": ("Trainer and engine", "How far apart their log-probs of drawn tokens are, in the mean.", "nats"),
    "surprise": ("Surprise", "Minus the mean log-prob of drawn tokens: falls to 0 as answers become certain.", "nats"),
    "left_out": ("Left out", "Drawn tokens that count nothing: their probability has changed by too much.", "share"),
    "silent_groups": ("Groups that say nothing", "Those whose answers all earn the same.", "share"),
    "teacher_gap": ("Teacher's lead", "Its log-prob of a drawn token less the student's, in the mean.", "nats"),
}


def on_the_way(rows: Sequence[Mapping]) -> list[str]:
    found = []
    for key, (title, says, unit) in ON_THE_WAY.items():
        lines = family(rows, f"{key}_") or [line for line in (series(rows, key, title),) if line is not None]
        if lines:
            found.append(lines_chart(title, says, [thin(smooth(line)) for line in lines], unit))
    return found


def draw_scores(figure, found: Practised) -> None:
    """A point with its interval for each model on each task: of models and tasks the more have a line each, the others
    a colour each, and a mark of another form once these are used up."""
    axes, models, tasks = figure.subplots(), [*found.scores], found.tasks
    down, apart = (models, tasks) if len(models) > len(tasks) else (tasks, models)
    for place, name in enumerate(apart):
        pairs = [(line, name) if down is models else (name, line) for line in down]
        known = {at: one for at, (model, task) in enumerate(pairs) if (one := found.scores[model].get(task))}
        rows = [at + 0.6 * ((place + 0.5) / len(apart) - 0.5) for at in known]
        means, errors = [one.mean for one in known.values()], ends([*known.values()])
        form, colour = MARKS[place // len(LINES) % len(MARKS)], LIGHT[LINES[place % len(LINES)]]
        axes.errorbar(means, rows, xerr=errors, fmt=form, markersize=4, capsize=2, color=colour, label=shortened(name))
    axes.set_yticks(range(len(down)), [shortened(name, 24) for name in down])
    axes.set_ylim(len(down) - 0.5, -0.5)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("reward")
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=min(3, len(apart)), handlelength=1)


def draw_curve(figure, found: Practised) -> None:
    """A line for each task that thinks, over budgets."""
    axes = figure.subplots()
    for place, task in enumerate(dict.fromkeys(task for by_task in found.curve.values() for task in by_task)):
        pairs = [(budget, by_task[task]) for budget, by_task in found.curve.items() if task in by_task]
        means, errors = [one.mean for _, one in pairs], ends([one for _, one in pairs])
        colour = LIGHT[LINES[place % len(LINES)]]
        axes.errorbar([budget for budget, _ in pairs], means, yerr=errors, marker="o", markersize=4, capsize=3,
                      color=colour, label=task)  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens of thinking at most")
    axes.set_ylabel("reward")
    axes.legend(loc="best", handlelength=1)


def ends(scores: Sequence[Score]) -> list[list[float]]:
    """How far the ends of their intervals are, below and above."""
    known = [(one.mean, *(one.mean if math.isnan(end) else end for end in interval(one))) for one in scores]
    return [[mean - low for mean, low, _ in known], [high - mean for mean, _, high in known]]
