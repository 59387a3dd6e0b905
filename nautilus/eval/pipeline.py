"""What became of each task on the way through post-training, and what each stage took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nautilus.posttrain.profile import Score
from nautilus.runtime import read_json

More = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # a table: title, head, rows


def told_of(
    scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[str], iterations: int, *, minutes: Mapping[str, float],
    drafts: Path | None,
) -> list[More]:  # fmt: skip
    """drafts: the run in which the prediction block was boosted."""
    found = [gains(scores, tasks, iterations), stages(minutes)]
    return found if drafts is None else [*found, accepted(drafts)]


def gains(scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[str], iterations: int) -> More:
    """Points of reward, times 100. Recovered: of what the first specialist gained, what the last student has."""
    students = [f"student {number}" for number in range(1, iterations + 1)]
    rows = []
    for task in tasks:
        base, best = (scores[name][task].mean for name in ("sft", f"{task} specialist 1"))
        last = scores[students[-1]][task].mean
        each = [f"{100 * scores[name][task].mean:.1f}" for name in students]
        part = f"{(last - base) / (best - base):.0%}" if best > base else "–"
        rows.append([task, f"{100 * base:.1f}", f"{100 * best:.1f}", f"{100 * (best - base):+.1f}", *each, part])
    return "Gains", ["task", "sft", "specialist", "gain", *students, "recovered"], rows


def stages(minutes: Mapping[str, float]) -> More:
    rows = [[name, f"{value:.1f}"] for name, value in minutes.items()]
    return "Stages", ["stage", "minutes"], [*rows, ["together", f"{sum(minutes.values()):.1f}"]]


def accepted(run: Path) -> More:
    """Tokens that a pass gives, before and after its block was trained on its own answers."""
    rows = [
        [row["texts"], row["drafter"], f"{row['length']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
        for row in read_json(run / "results.json", f"remove {run}, to have it made again").get("lengths", [])
    ]
    return "Tokens a pass", ["texts", "block", "length", "95 % interval"], rows
