"""How many tokens of a block's drafts are right at every place of recorded answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nautilus.posttrain.acceptance import right
from nautilus.posttrain.drafter import Drafter
from nautilus.posttrain.own_text import Answer
from nautilus.posttrain.traces import Trace
from nautilus.runtime import Progress, read_metrics


def depths(drafter: Drafter, answer: Answer, drafts: int) -> list[int]:
    """At each place of an answer how many of so many drafts are right there; 0 at the first, which reading gives."""
    begin, count = len(answer.prompt), len(answer.tokens)
    longer = Answer(prompt=answer.prompt, tokens=(*answer.tokens, *[0] * (drafts + 2)))
    runs = right(drafter, longer, drafts).long().cumprod(-1).sum(-1).tolist()
    return [0, *(min(runs[begin + place - 2], count - place) for place in range(1, count))]


def with_depths(traces: Sequence[Trace], drafter: Drafter, drafts: int, path: Path) -> list[Trace]:
    """Traces that tell of a block's drafts; what the file holds of them is not computed again."""
    rows = read_metrics(path)
    with Progress(path, len(traces), len(rows), shown=(), unit="answer") as progress:
        for step, trace in enumerate(traces[len(rows) :], len(rows)):
            answer = Answer(prompt=tuple(trace.prompt), tokens=tuple(trace.answer))
            rows.append({"step": step, "depths": [*trace.depths] or depths(drafter, answer, drafts)})
            progress(rows[-1])
    return [replace(trace, depths=tuple(row["depths"])) for trace, row in zip(traces, rows, strict=True)]
