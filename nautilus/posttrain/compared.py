"""Answers that are better or worse than others, and not right or wrong: rewards from a judge that compares them.

Of the answers to one prompt each is compared with the next (`tasks/judge.py`). A judge is a task's own oracle, or a
model that reads the conversation and two answers, thinks, and says which is better as JSON. A comparison that fails or
takes too long counts as undecided: it holds nobody up.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nautilus.config import setting
from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.data.mix import number_of
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.crew import MUCH
from nautilus.posttrain.practice import Practice, routes
from nautilus.posttrain.rollout import Answers, Dropped, Rollout, drawn
from nautilus.posttrain.stream import Group
from nautilus.runtime import UserError
from nautilus.serve import Engine
from nautilus.serve.control import opens_thinking
from nautilus.serve.sampling import Sampling
from nautilus.serve.service import Service
from nautilus.serve.toolcalls import split_answer
from nautilus.tasks import Problem, Reply, Task, Verdict
from nautilus.tasks.judge import (
    UNREADABLE,
    Judgement,
    LengthControl,
    asked_to_judge,
    circular,
    judgement_of,
    rewards,
)
from nautilus.tasks.style import Style


@dataclass(frozen=True, kw_only=True)
class Judged(Practice):
    """Settings of training on answers of which some have to be compared."""

    judges: tuple[str, ...] = setting(
        (), "who compares answers to a task: style=oracle, its own, or style=RUN, of the task judge"
    )
    control: LengthControl = LengthControl()


Load = Callable[[str], tuple[Language, Tokenizer]]
Judge = Callable[[Problem, Reply, Reply, int], Awaitable[Judgement]]


async def compared(group: Group, judge: Judge, control: LengthControl, *, seconds: float, seed: int) -> Group:
    """The group with rewards in place of its verdicts. One answer alone has none to be compared with: it is lost."""
    count = len(group.rollouts)
    if count < 2:
        return replace(group, rollouts=[], lost=group.lost + Counter({"alone": count} if count else {}))
    last = [one.turns[-1].reply for one in group.rollouts]

    async def one(number: int, first: int, second: int) -> Judgement:
        try:
            said = judge(group.problem, last[first], last[second], number_of(seed, number))
            return await asyncio.wait_for(said, seconds)
        except (TimeoutError, Dropped):
            return UNREADABLE

    found = await asyncio.gather(*(one(number, *pair) for number, pair in enumerate(circular(count))))
    scores = rewards(found, last, control)
    unread = sum(not judgement.readable for judgement in found) / count
    return replace(group, rollouts=[scored(*pair, unread) for pair in zip(group.rollouts, scores, strict=True)])


def scored(one: Rollout, reward: float, unread: float) -> Rollout:
    parts = {**one.verdict.parts, "unread": unread}
    return replace(one, verdict=Verdict(reward=reward, why=f"compared: {reward:.2f}", parts=parts))


def oracle(task: Style) -> Judge:
    async def judge(problem: Problem, first: Reply, second: Reply, seed: int) -> Judgement:
        return task.compare(problem, first, second)

    return judge


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A model that compares. tokens: most of what it says."""

    answers: Answers
    tokenizer: Tokenizer
    tokens: int = 512
    thinking: bool = True

    async def __call__(self, problem: Problem, first: Reply, second: Reply, seed: int) -> Judgement:
        asked = asked_to_judge(problem.messages, first.content, second.content)
        tokens = chat_tokens(self.tokenizer, asked, settings=ChatSettings(enable_thinking=self.thinking))
        said, _ = await drawn(self.answers, tokens, Sampling(max_tokens=self.tokens, seed=seed), kept=False)
        inside = opens_thinking(tokens, self.tokenizer)
        return judgement_of(split_answer(said.text, inside=inside).content)


class Judges:
    """Finishes groups: those of a task with a judge get rewards from it, others stay. judges: task → "oracle", its own,
    or the place of a reward model."""

    def __init__(
        self, judges: Mapping[str, str], tasks: Sequence[Task], control: LengthControl, load: Load, *, seconds: float,
        tokens: int = 512,
    ):  # fmt: skip
        self.judges, self.control, self.seconds, self.tokens = dict(judges), control, seconds, tokens
        self.oracles = {task.name: oracle(task) for task in tasks if isinstance(task, Style)}
        self.models, self.loaded = dict[str, RewardModel](), dict[str, tuple[Language, Tokenizer]]()
        names = [task.name for task in tasks]
        if strange := sorted(set(judges) - set(names)):
            raise UserError(
                f"a judge of {', '.join(strange)} was named, which is not trained on; there is {', '.join(names)}"
            )
        if lacking := sorted(name for name, who in judges.items() if who == "oracle" and name not in self.oracles):
            raise UserError(f"{', '.join(lacking)} has no oracle; name a reward model, such as {lacking[0]}=runs/judge")
        for place in dict.fromkeys(who for who in judges.values() if who != "oracle"):
            self.loaded[place] = load(place)
            if self.loaded[place][1].template is None:
                raise UserError(f"the judge {place} has no chat template, in which it is asked; train it as one first")

    async def __call__(self, group: Group, seed: int) -> Group:
        who = self.judges.get(group.problem.task)
        if who is None:
            return group
        judge = self.oracles[group.problem.task] if who == "oracle" else self.model(who)
        return await compared(group, judge, self.control, seconds=self.seconds, seed=seed)

    def model(self, place: str) -> RewardModel:
        """Its engine begins with the first comparison, in the loop that asks for it."""
        if place not in self.models:
            model, tokenizer = self.loaded[place]
            service = Service(Engine(model.requires_grad_(False).eval(), tokenizer), **MUCH)
            self.models[place] = RewardModel(answers=service, tokenizer=tokenizer, tokens=self.tokens)
        return self.models[place]


def judges_of(settings: Judged, tasks: Sequence[Task], load: Load) -> Judges | None:
    if not settings.judges:
        return None
    return Judges(routes(settings.judges, "judge"), tasks, settings.control, load, seconds=settings.seconds)
