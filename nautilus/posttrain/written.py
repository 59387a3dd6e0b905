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
from nautilus.posttrain.profile import asking, kept
from nautilus.posttrain.rollout import Dropped, Playing, Rollout
from nautilus.runtime import Progress, UserError, write_atomic
from nautilus.serve.prefixes import fingerprint
from nautilus.tasks import Problem, Task
from nautilus.tasks.task import assistant


def conversation(one: Rollout) -> dict[str, Any]:
    """All its messages, as a row of JSON lines."""
    messages = [*one.problem.messages]
    for turn in one.turns:
        said = turn.reply
        messages += [assistant(said.content, said.thinking or "", said.calls), *turn.told]
    return {"messages": messages, **({"tools": [*one.problem.tools]} if one.problem.tools else {})}


def recorded(
    path: Path, model: Language, tokenizer: Tokenizer, asked: Sequence[tuple[Task, Problem, int]], playing: Playing, *,
    together: int, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each (task, problem, time), with its conversation, or with the reward null where it was lost. They are
    kept in the file as they come, and what that has is not asked again."""
    by = fingerprint(model)[:16]
    known = kept(path, by, "ended", "messages")
    left = {(one[1].id, one[2]): one for one in asked if (one[1].id, one[2]) not in known}
    with Progress(path, len(known) + len(left), len(known), shown=("reward",), unit="answer") as progress:

        def told(problem: Problem, time: int, found: Rollout | Dropped) -> None:
            row = {"step": len(known), "model": by, "problem": problem.id, "task": problem.task, "time": time}
            row["reward"] = None
            if isinstance(found, Dropped):
                row |= {"lost": found.kind, "why": str(found)[:300]}
            else:
                row |= {"reward": found.verdict.reward, "why": found.verdict.why, "ended": found.ended}
                row |= conversation(found)
            known[problem.id, time] = row
            progress(row)

        if left:
            asyncio.run(asking(model, tokenizer, [*left.values()], playing, together, seed, told))
    return [known[problem.id, time] for _, problem, time in asked]


def written(
    folder: Path, model: Language, tokenizer: Tokenizer, questions: Sequence[tuple[Task, Problem]],
    settings: Practice, *, times: int = 1, least: float = -math.inf,
) -> Path:  # fmt: skip
    """The file of the conversations. UserError where none is left."""
    asked = [(task, problem, time) for task, problem in questions for time in range(times)]
    kept = folder / "conversations.jsonl"
    rows = recorded(
        folder / "answers.jsonl", model, tokenizer, asked, settings.playing, together=settings.together,
        seed=settings.seed + 2,
    )  # fmt: skip
    good = [row for row in rows if row["reward"] is not None and row["ended"] and row["reward"] >= least]
    if not good:
        lost = [row for row in rows if row["reward"] is None]
        why = f"; {len(lost)} were lost, the first: {lost[0]['why']}" if lost else ""
        enough = f" and earned {least:g} or more" if least > -math.inf else ""
        raise UserError(
            f"none of {len(rows)} answers of {folder.name} came to its end{enough}; train the model for longer, raise"
            f" turn_tokens, or ask easier problems{why}"
        )
    lines = (json.dumps({key: row[key] for key in ("messages", "tools") if key in row}) + "\n" for row in good)
    write_atomic(kept, "".join(lines))
    return kept
