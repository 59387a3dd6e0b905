"""Questions of `ruler` asked of an engine, a few at a time, and their answers kept as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.eval.ruler import TASKS, Question, keys, question
from nautilus.eval.suite import Cell, share
from nautilus.runtime import Progress, Run, UserError, read_metrics
from nautilus.serve import Completion, Engine, Sampling, opens_thinking, split_answer
from nautilus.serve.asking import answered

GRACE = 64  # tokens that reasoning may go on for after its budget, until its line ends
SHOWN = 200  # characters of an answer that are kept


@dataclass(frozen=True, kw_only=True)
class Plan:
    """chat: as a message, with so many tokens of reasoning (thinking); else as text to be continued."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    seed: int = 0
    chat: bool = False
    thinking: int = 0


def refuse(plan: Plan, positions: int) -> None:
    """A UserError for a task that is not there, and a length that the model does not have."""
    if strange := [task for task in plan.tasks if task not in TASKS]:
        raise UserError(f"suite=ruler has no task {strange[0]!r}; have {', '.join(TASKS)}")
    if bad := [length for length in plan.lengths if not 1 < length <= positions]:
        raise UserError(
            f"suite=ruler was asked for lengths={bad[0]}, but the model has positions={positions}; choose lengths "
            f"up to that, or a model of more positions"
        )


def retrieve(run: Run, engine: Engine, plan: Plan) -> tuple[list[Cell], list[list[str]]]:
    """All answers of the plan, with those that the run has already: cells of their scores, and the first of each."""
    asked, rows = [*keys(plan.tasks, plan.lengths, plan.samples)], read_metrics(run.metrics)
    known = {(row["task"], row["length"], row["index"]): row for row in rows}
    left = [key for key in asked if key not in known]
    questions = (question(*key, seed=plan.seed, tokens_of=as_read(engine, plan), more=extra(plan)) for key in left)
    with Progress(run.metrics, len(rows) + len(left), len(rows), shown=("score",), unit="question") as progress:
        for step, (one, completion) in enumerate(answers(engine, questions, plan), len(rows)):
            row = row_of(one, completion, engine, plan)
            known[one.key] = row
            progress({"step": step, **row})
    mine = [known[key] for key in asked]
    return cells_of(mine, plan), [example_of(row) for row in mine if row["index"] == 0]


def as_read(engine: Engine, plan: Plan) -> Callable[[str], list[int]]:
    """Text to the tokens that the model is given."""
    how = ChatSettings(enable_thinking=plan.thinking > 0)
    if plan.chat:
        return lambda text: chat_tokens(engine.tokenizer, [{"role": "user", "content": text}], settings=how)
    return engine.tokens


def extra(plan: Plan) -> int:
    return plan.thinking + GRACE if plan.chat and plan.thinking else 0


def answers(engine: Engine, questions: Iterable[Question], plan: Plan) -> Iterator[tuple[Question, Completion]]:
    """As they come."""
    # What one question of a document has read the next ones need not read.
    marks = lambda one: (len(one.tokens),) if one.example.begins else ()  # noqa: E731
    asked = ((one, engine.request(one.tokens, sampling(one, plan), marks=marks(one))) for one in questions)
    for one, request in answered(engine, asked):
        yield one, request.completion()


def sampling(one: Question, plan: Plan) -> Sampling:
    budget = plan.thinking if extra(plan) else None
    return Sampling(temperature=0, max_tokens=one.longest, thinking_budget=budget, thinking_grace=GRACE)


def row_of(one: Question, completion: Completion, engine: Engine, plan: Plan) -> dict:
    text = completion.text
    if plan.chat:
        text = split_answer(text, inside=bool(opens_thinking(one.tokens, engine.tokenizer))).content
    return {
        "task": one.task, "length": one.length, "index": one.index, "score": one.example.score(text),
        "wanted": [*one.example.answers], "answer": text[:SHOWN], "tokens": len(one.tokens),
        "cached": completion.cached, "answered": len(completion.tokens), "time": round(time.time(), 2),
    }  # fmt: skip


def cells_of(rows: Sequence[Mapping], plan: Plan) -> list[Cell]:
    """Every task at every length; below them all tasks together."""
    found = []
    for task in (*plan.tasks, *(("all",) if len(plan.tasks) > 1 else ())):
        for length in sorted(plan.lengths):
            mine = [row["score"] for row in rows if row["length"] == length and task in (row["task"], "all")]
            found.append(share(task, f"{length:,}", mine))
    return found


def example_of(row: Mapping) -> list[str]:
    return [row["task"], f"{row['length']:,}", ", ".join(row["wanted"]), row["answer"]]
