"""A model's answers to tasks as conversations to learn from: what a teacher says, or what a model gets right.

Of answers that are drawn, those with enough reward are kept: rejection sampling, by the graders of the tasks. A file of
them is what `nautilus sft` reads. One that was begun is gone on with.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.profile import asking
from nautilus.posttrain.rollout import Rollout
from nautilus.runtime import Progress, UserError, read_metrics, write_atomic
from nautilus.tasks import Problem, Task
from nautilus.tasks.task import assistant


def conversation(one: Rollout) -> dict[str, Any]:
    """All its messages, as a row of JSON lines."""
    messages = [*one.problem.messages]
    for turn in one.turns:
        said = turn.reply
        messages += [assistant(said.content, said.thinking or "", said.calls), *turn.told]
    return {"messages": messages, **({"tools": [*one.problem.tools]} if one.problem.tools else {})}


def written(
    folder: Path, model: Language, tokenizer: Tokenizer, questions: Sequence[tuple[Task, Problem]],
    settings: Practice, *, times: int = 1, least: float = -math.inf,
) -> Path:  # fmt: skip
    """The file of the conversations. UserError where none is left."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, kept = folder / "answers.jsonl", folder / "conversations.jsonl"
    rows = read_metrics(drawn)
    known = {(row["problem"], row["time"]) for row in rows}
    asked = [(task, problem, time) for task, problem in questions for time in range(times)]
    left = [one for one in asked if (one[1].id, one[2]) not in known]
    with Progress(drawn, len(asked), len(rows), shown=("reward",), unit="answer") as progress:

        def told(problem: Problem, time: int, found: Rollout | None) -> None:
            row = {"step": len(rows), "problem": problem.id, "task": problem.task, "time": time, "reward": None}
            if found is not None:
                row |= {"reward": found.verdict.reward, "ended": found.ended, **conversation(found)}
            rows.append(row)
            progress(row)

        asyncio.run(asking(model, tokenizer, left, settings.playing, settings.together, settings.seed + 2, told))
    good = [row for row in rows if row["reward"] is not None and row["ended"] and row["reward"] >= least]
    if not good:
        raise UserError(f"none of {len(rows)} answers earned {least:g} or more; ask easier problems, or lower it")
    lines = (json.dumps({key: row[key] for key in ("messages", "tools") if key in row}) + "\n" for row in good)
    write_atomic(kept, "".join(lines))
    return kept
