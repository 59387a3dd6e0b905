"""How often a model solves problems: before training, for the curriculum, and after it, for the report."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from nautilus.data.mix import number_of
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.blend import Domain
from nautilus.posttrain.crew import MUCH, engine_of
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.rollout import Dropped, Player, Playing, Rollout
from nautilus.posttrain.stream import parts_seen
from nautilus.runtime import Progress, Run, UserError, read_metrics, write_atomic
from nautilus.serve.prefixes import fingerprint
from nautilus.serve.turns import Turns
from nautilus.tasks import Problem, Task, distinct
from nautilus.tasks.asked import Asked

Told = Callable[[Problem, int, Rollout | Dropped], None]


class Answered(NamedTuple):
    """What an answer earned; its tokens of thinking, and those of the turn with most; parts of its verdict."""

    reward: float
    thought: int = 0
    longest: int = 0
    parts: Mapping[str, float] = {}


Solved = Answered | None  # None for one that was lost


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of a task: rewards of its answers, less those that were lost; thought, longest, parts: of each, as in `Answered`,
    and what each part was; most: tokens of thinking that a turn might have, None: any number."""

    rewards: Sequence[float]
    lost: int = 0
    thought: Sequence[int] = ()
    longest: Sequence[int] = ()
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    most: int | None = None

    @property
    def mean(self) -> float:
        return sum(self.rewards) / len(self.rewards) if self.rewards else float("nan")

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        count = len(self.rewards)
        if count < 2:
            return float("nan")
        return (sum((one - self.mean) ** 2 for one in self.rewards) / (count - 1) / count) ** 0.5


def filed(name: str) -> str:
    """A name as that of a file or a folder."""
    return name.replace(" ", "_").replace("/", "_")


def exam(task: Task, count: int, *, levels: Sequence[int] = (), split: str = "test") -> list[Problem]:
    """So many different problems that nobody trains on, or as many as there are."""
    return distinct(task, split, count, levels=levels)


def examined(
    run: Run, name: str, model: Language, *, tasks: Sequence[Asked], count: int, settings: Practice,
    tokenizer: Tokenizer, playing: Playing | None = None, split: str = "test",
) -> dict[str, Score]:  # fmt: skip
    """By task, on problems that nobody trains on. UserError where all answers to a task are lost."""
    how = {"count": count, "split": split}
    questions = [(one.task, problem) for one in tasks for problem in exam(one.task, levels=one.levels, **how)]
    path = run.state / f"{filed(name)}.jsonl"
    found = solved(path, model, tokenizer, questions, playing or settings.playing, together=settings.together)
    by_task: dict[str, list[Solved]] = {}
    for (task, _), answers in zip(questions, found, strict=True):
        by_task.setdefault(task.name, []).extend(answers)
    for task, all_of in by_task.items():
        if not any(all_of):
            own = {problem.id for one, problem in questions if one.name == task}
            why = next((row["why"] for row in read_metrics(path) if row["problem"] in own), "")
            raise UserError(f"all {len(all_of)} answers to {task} that were to be measured were lost; the first: {why}")
    return {task: score_of(all_of) for task, all_of in by_task.items()}


def score_of(answers: Sequence[Solved]) -> Score:
    known = [one for one in answers if one is not None]
    parts: dict[str, list[float]] = {}
    for name, value in ((name, value) for one in known for name, value in one.parts.items()):
        parts.setdefault(name, []).append(value)
    return Score(
        rewards=[one.reward for one in known], lost=len(answers) - len(known), thought=[one.thought for one in known],
        longest=[one.longest for one in known], parts=parts,
    )  # fmt: skip


def curve(
    run: Run, model: Language, budgets: Sequence[int], *, tasks: Sequence[Asked], count: int, settings: Practice,
    tokenizer: Tokenizer,
) -> dict[int, dict[str, Score]]:  # fmt: skip
    """By thinking budget, then by task: what thinking longer brings. Tasks that are answered at once have no part."""
    found, thinking = {}, [one for one in tasks if settings.playing.chatting(one.task).enable_thinking]
    for budget in budgets if thinking else ():
        playing = replace(settings.playing, thinking_budget=budget)
        scores = examined(
            run, f"budget_{budget}", model, tasks=thinking, count=count, settings=settings, tokenizer=tokenizer,
            playing=playing,
        )  # fmt: skip
        most = budget + playing.thinking_grace
        found[budget] = {task: replace(one, most=most) for task, one in scores.items()}
    return found


def with_rates(
    run: Run, found: Sequence[Domain], settings: Practice, model: Language, tokenizer: Tokenizer, *, times: int
) -> list[Domain]:
    """Domains with the pass rates of their problems, of so many answers to each; as they are where none are asked."""
    if not times:
        return [*found]
    questions = [(one.task, problem) for one in found for problem in one.problems]
    all_of = solved(
        run.state / "profile.jsonl", model, tokenizer, questions, settings.playing, times=times,
        together=settings.together, seed=settings.seed + 1, once=True,
    )  # fmt: skip
    rates = {
        problem.id: mean([one[0] for one in answers if one is not None])
        for (_, problem), answers in zip(questions, all_of, strict=True)
        if any(answers)
    }
    return [of_known(one, rates) for one in found]


def of_known(one: Domain, rates: Mapping[str, float]) -> Domain:
    """Without the problems whose answers were all lost: nothing is known of them, and no model can learn from them."""
    known = [problem for problem in one.problems if problem.id in rates]
    if not known:
        raise UserError(f"all answers to the problems of {one.task.name} that were to be profiled were lost")
    return replace(one, problems=known, rates=rates)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def solved_of(row: Mapping[str, Any]) -> Solved:
    if row["reward"] is None:
        return None
    return Answered(row["reward"], row["thought"], row.get("longest", row["thought"]), row.get("parts", {}))


def solved(
    path: Path, model: Language, tokenizer: Tokenizer, questions: Sequence[tuple[Task, Problem]], playing: Playing,
    *, times: int = 1, together: int = 64, seed: int = 0, once: bool = False,
) -> list[list[Solved]]:  # fmt: skip
    """`times` answers to each problem; what the file has of this model is not asked again, less what was lost, which
    stays so with `once`."""
    by = fingerprint(model)[:16]
    rows = kept(path, by, "thought", lost=once)
    known = {key: solved_of(row) for key, row in rows.items()}
    asked = [(task, problem, time) for task, problem in questions for time in range(times)]
    left = [one for one in asked if (one[1].id, one[2]) not in known]
    with Progress(path, len(known) + len(left), len(known), shown=("reward",), unit="answer") as progress:

        def told(problem: Problem, time: int, found: Rollout | Dropped) -> None:
            row = {"step": len(known), "model": by, "problem": problem.id, "time": time, "reward": None, "thought": 0}
            if isinstance(found, Rollout):
                thought, parts = [turn.thought for turn in found.turns], parts_seen(found.verdict.parts)
                row |= {"reward": found.verdict.reward, "thought": sum(thought)}
                row |= {"longest": max(thought, default=0), "parts": parts}
            else:
                row |= {"lost": found.kind, "why": str(found)[:300]}
            known[problem.id, time] = solved_of(row)
            progress(row)

        asyncio.run(asking(model, tokenizer, left, playing, together, seed, told))
    return [[known[problem.id, time] for time in range(times)] for _, problem in questions]


def kept(path: Path, by: str, *needs: str, lost: bool = False) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of the model in the file, which are all that stays in it; lost: also those of lost answers. needs: what
    a row has beside the reward."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(path)
    whole = [row for row in rows if row.get("model") == by and {"problem", "time", "reward", *needs} <= row.keys()]
    kinds = (int, float, NoneType) if lost else (int, float)
    good = [row for row in whole if isinstance(row["reward"], kinds)]
    if len(good) < len(rows):
        write_atomic(path, "".join(json.dumps({**row, "step": at}) + "\n" for at, row in enumerate(good)))
    return {(row["problem"], row["time"]): row for row in good}


async def asking(
    model: Language, tokenizer: Tokenizer, left: Sequence[tuple[Task, Problem, int]], playing: Playing, together: int,
    seed: int, told: Told,
) -> None:  # fmt: skip
    service = Turns(engine_of(model, tokenizer, playing, together), **MUCH)
    player, times = Player(service, tokenizer, playing), Counter(problem.id for _, problem, _ in left)

    async def one(task: Task, problem: Problem, time: int) -> None:
        try:
            own = number_of(seed, int(problem.id[:8], 16) + time)
            found = await player.play(task, problem, own, alone=times[problem.id] < 2)
        except Dropped as lost:
            found = lost
        told(problem, time, found)

    try:
        await asyncio.gather(*(one(*each) for each in left))
    finally:
        await service.close()
