"""A model's way through a problem: tokens in, tokens out, and what came of it.

What the model drew is kept as tokens with the log-probs that they had when they were drawn, and never encoded again:
the next turn's prompt is all tokens so far and what the task tells it. Text is only what the task reads.

A problem whose environment hangs, whose grader breaks, or whose engine is lost costs its own rollout and no other:
`play` raises `Dropped` for it.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from nautilus.data.chat import EFFORTS, ChatSettings, chat_tokens, following_tokens
from nautilus.data.mix import number_of
from nautilus.data.tokenizer import Tokenizer
from nautilus.posttrain.credit import form_fault
from nautilus.runtime import UserError
from nautilus.runtime.threads import in_a_thread
from nautilus.serve.budget import thinking_rules
from nautilus.serve.control import opens_thinking
from nautilus.serve.job import Busy, Job, Lost
from nautilus.serve.markers import CLOSE, OPEN, THOUGHT
from nautilus.serve.request import Completion, Piece
from nautilus.serve.sampling import Sampling
from nautilus.serve.toolcalls import split_answer
from nautilus.tasks import Call, Episode, GraderBroken, Problem, Reply, Task, Verdict
from nautilus.tasks.task import Message

T = TypeVar("T")
TASKS = min(32, (os.cpu_count() or 1) + 4)  # that hear or judge at a time: some wait for others, some compute


class Dropped(Exception):
    """A rollout that was lost through no fault of the model. kind: of what, to be counted by."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Answers(Protocol):
    """Who answers jobs: an engine in a thread (`Service`), or several in other processes."""

    def submit(self, job: Job) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Playing:
    """How episodes are played. tokens: most of a conversation; turn_tokens: of one turn; thinking: whether a model is
    asked to think first, None: as the task's worked answers do; seconds: that a task may take for a turn, for the last
    one with its verdict; routes: experts are kept for replay; drafts: most tokens that the engine tries at once, which
    changes no answer; chat: what else the template is told; budgeted: share of the groups in training whose thinking
    budget is one of `budgets`, all of a group the same; less_effort: share of those that are asked for the least."""

    tokens: int = 1024
    turn_tokens: int = 256
    temperature: float = 1.0
    thinking: bool | None = True
    thinking_budget: int | None = None
    thinking_grace: int = 0
    seconds: float = 60.0
    routes: bool = False
    drafts: int = 0
    chat: ChatSettings = dataclasses.field(default_factory=lambda: ChatSettings(truncate_history_thinking=False))
    budgeted: float = 0.0
    budgets: tuple[int, ...] = ()
    less_effort: float = 0.0

    def chatting(self, task: Task) -> ChatSettings:
        thinks = task.thinks if self.thinking is None else self.thinking
        return dataclasses.replace(self.chat, enable_thinking=thinks)

    def sampling(self, seed: int, room: int) -> Sampling:
        budget = {"thinking_budget": self.thinking_budget, "thinking_grace": self.thinking_grace}
        return Sampling(temperature=self.temperature, max_tokens=min(self.turn_tokens, room), seed=seed, **budget)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the model drew: tokens begin..end of a rollout. forced: those of them that a budget wrote; thought: tokens
    before thinking was closed, all of them where it never was; told: what the task said then."""

    begin: int
    end: int
    reply: Reply
    forced: frozenset[int] = frozenset()
    thought: int = 0
    told: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """tokens: all of the conversation; logprobs: of each, 0.0 for what the model did not draw; versions: of the weights
    that drew it, -1 for what the model did not draw; routes: the experts that read each token, (T, L, K), where asked
    for."""

    problem: Problem
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    turns: tuple[Turn, ...]
    verdict: Verdict
    versions: tuple[int, ...] = ()
    routes: Tensor | None = None

    @property
    def version(self) -> int:
        """Of the oldest weights that drew a token."""
        return min((one for one in self.versions if one >= 0), default=0)

    @property
    def newest(self) -> int:
        return max(self.versions, default=0)

    @property
    def prompt(self) -> tuple[int, ...]:
        """All before the first token that the model drew."""
        return self.tokens[: self.turns[0].begin] if self.turns else self.tokens

    @property
    def drawn(self) -> list[bool]:
        """Which tokens the model chose."""
        chosen = [False] * len(self.tokens)
        for turn in self.turns:
            for at in range(turn.begin, turn.end):
                chosen[at] = at not in turn.forced
        return chosen

    @property
    def ended(self) -> bool:
        """Not by a limit."""
        return bool(self.turns) and self.turns[-1].reply.ended

    @property
    def length(self) -> int:
        """Tokens of the last turn."""
        return self.turns[-1].end - self.turns[-1].begin if self.turns else 0


def least_effort(tokenizer: Tokenizer) -> str | None:
    """That its chat template has words for; None where it has none."""
    return next((effort for effort, word in EFFORTS.items() if word in (tokenizer.template or "")), None)


class Player:
    """Plays episodes with whoever answers; many at once, each a coroutine. version: of weights, by how often those of
    the engine had changed."""

    def __init__(self, answers: Answers, tokenizer: Tokenizer, playing: Playing, version: Callable[[int], int] = int):
        self.answers, self.tokenizer, self.playing, self.version = answers, tokenizer, playing, version
        self.slots = asyncio.Semaphore(TASKS)
        self.opened: tuple[Problem, ChatSettings, list[int]] | None = None

    def within(self, seed: int) -> Player:
        """Who plays a group in training, with the thinking budget and the effort that are drawn for it."""
        found, playing = copy.copy(self), self.playing
        rng = random.Random(f"{seed} budget")
        if rng.random() < playing.budgeted:
            playing = dataclasses.replace(playing, thinking_budget=rng.choice(playing.budgets))
        if random.Random(f"{seed} effort").random() < playing.less_effort:
            chat = dataclasses.replace(playing.chat, effort=least_effort(self.tokenizer))
            playing = dataclasses.replace(playing, chat=chat)
        found.playing = playing
        return found

    async def play(self, task: Task, problem: Problem, seed: int, *, alone: bool = False) -> Rollout:
        """Dropped where nothing can be said of it. alone: there are no other answers to the same problem."""
        told_how = {"tools": [*problem.tools] or None, "settings": self.playing.chatting(task)}
        episode, tokens = self.begun(task, problem, told_how)
        messages, turns, verdicts = [*problem.messages], list[Turn](), list[Verdict]()
        logprobs, versions = [0.0] * len(tokens), [-1] * len(tokens)
        for number in range(task.turns):
            if (room := self.playing.tokens - len(tokens)) < 1:
                break
            sampling = self.playing.sampling(number_of(seed, number), room)
            how = {"shared": not (alone or number), "kept": number + 1 < task.turns}
            answer, changes = await drawn(self.answers, tokens, sampling, **how)
            turn = self.turn(tokens, answer, problem, sampling)
            tokens, logprobs = [*tokens, *answer.tokens], [*logprobs, *answer.logprobs]
            versions += map(self.version, changes)
            turns.append(turn)
            told, verdicts = await self.in_time(episode, heard, episode, turn.reply, number + 1 == task.turns)
            if verdicts:
                break
            turns[-1] = dataclasses.replace(turn, told=tuple(told))
            more = self.following(messages, told, told_how, task.name)
            messages += [{"role": "assistant", "content": "."}, *told]
            tokens, logprobs = [*tokens, *more], [*logprobs, *[0.0] * len(more)]
            versions += [-1] * len(more)
        if not turns:
            raise Dropped("no room", f"tokens={self.playing.tokens} are too few for a prompt of {len(tokens)}")
        (found,) = verdicts or [await self.in_time(episode, episode.verdict)]
        verdict = checked_verdict(found, episode, turns, thinks=told_how["settings"].enable_thinking)
        drew = {"logprobs": tuple(logprobs), "versions": tuple(versions)}
        return Rollout(problem=problem, tokens=tuple(tokens), turns=tuple(turns), verdict=verdict, **drew)

    def begun(self, task: Task, problem: Problem, told_how: dict[str, Any]) -> tuple[Episode, list[int]]:
        """Dropped for a problem that no model can be asked: a poisoned row is no fault of the others."""
        try:
            return task.episode(problem), self.opening(problem, told_how)
        except Exception as bad:
            raise Dropped("problem", f"{task.name} cannot ask {problem.id}: {type(bad).__name__}: {bad}") from bad

    def following(self, messages: Sequence[Message], told: Sequence[Message], told_how: Any, name: str) -> list[int]:
        try:
            return following_tokens(self.tokenizer, [*messages], [*told], **told_how)
        except Exception as bad:
            raise Dropped("task", f"{name} said what no chat can hold: {bad}") from bad

    def opening(self, problem: Problem, told_how: dict[str, Any]) -> list[int]:
        """Its prompt. All answers of a group begin with the same one, one after another."""
        settings = told_how["settings"]
        if self.opened is None or self.opened[0] is not problem or self.opened[1] != settings:
            self.opened = problem, settings, chat_tokens(self.tokenizer, [*problem.messages], **told_how)
        return self.opened[2]

    def turn(self, tokens: Sequence[int], answer: Completion, problem: Problem, sampling: Sampling) -> Turn:
        inside = opens_thinking(tokens, self.tokenizer)
        begin = len(tokens)
        rules = thinking_rules(sampling, self.tokenizer, inside=bool(inside))
        forced = set()
        for at, token in enumerate(answer.tokens, begin):
            if any(rule.forced() is not None for rule in rules):
                forced.add(at)
            for rule in rules:
                rule.add(token)
        reply = reply_of(answer, inside=inside, tools=problem.tools)
        close = self.tokenizer.control.get(THOUGHT)
        thought = answer.tokens.index(close) if close in answer.tokens else len(answer.tokens)
        return Turn(
            begin=begin, end=begin + len(answer.tokens), reply=reply, forced=frozenset(forced),
            thought=thought if inside else 0,
        )  # fmt: skip

    async def in_time(self, episode: Episode, do: Callable[..., T], *given: Any) -> T:
        """In a thread, of which some work at a time: one that hangs is left behind, and keeps nobody waiting."""
        name = episode.problem.task
        try:
            async with self.slots:
                return await asyncio.wait_for(in_a_thread(do, *given), self.playing.seconds)
        except TimeoutError as bad:
            raise Dropped("time", f"{name} took more than {self.playing.seconds:g} seconds for a turn") from bad
        except GraderBroken as bad:
            raise Dropped("grader", str(bad)) from bad
        except Exception as bad:
            raise Dropped("task", f"{name} failed with {type(bad).__name__}: {bad}") from bad


def heard(episode: Episode, reply: Reply, last: bool) -> tuple[Sequence[Message], list[Verdict]]:
    """What the model is told next, and the verdict where it can say nothing more."""
    told = episode.hear(reply)
    return told, [episode.verdict()] if last or not told or not reply.ended else []


def checked_verdict(found: Verdict, episode: Episode, turns: Sequence[Turn], *, thinks: bool) -> Verdict:
    """What is wrong with the form of the last turn leaves nothing of the reward. Dropped for what is no verdict."""
    try:
        found = dataclasses.replace(found, reward=float(found.reward))
    except (AttributeError, TypeError, ValueError) as bad:
        raise Dropped("grader", f"{episode.problem.task} gave the verdict {found!r}"[:200]) from bad
    if not math.isfinite(found.reward):
        raise Dropped("grader", f"{episode.problem.task} gave the reward {found.reward}, which is no number")
    last = form_fault(turns[-1].reply, thinks=thinks)
    fault = next((turn.reply.stray for turn in turns if turn.reply.stray), last)
    return dataclasses.replace(found, reward=0.0, why=fault) if fault and found.reward > 0 else found


async def drawn(
    answers: Answers, tokens: Sequence[int], sampling: Sampling, *, shared: bool = False, kept: bool
) -> tuple[Completion, list[int]]:  # fmt: skip
    """One answer, and how often the weights had changed before each of its tokens; Dropped where there can be none.
    shared: others to the same prompt go on from its state, whoever reads it first; kept: another turn may follow."""
    job = Job(tokens=tokens, sampling=sampling, marks=(len(tokens) - 1,) if shared else (), kept=kept)
    try:
        pieces: list[Piece] = [piece async for some in answers.submit(job) for piece in some]
    except (Lost, Busy, UserError, RuntimeError) as bad:
        raise Dropped("engine", str(bad)) from bad
    own = [piece for piece in pieces if piece.token >= 0]
    completion = Completion(
        prompt=tuple(tokens), text="".join(piece.text for piece in pieces), tokens=tuple(piece.token for piece in own),
        logprobs=tuple(piece.logprob for piece in own), finish_reason=pieces[-1].finish_reason or "",
    )  # fmt: skip
    return completion, [piece.version for piece in own]


def reply_of(answer: Completion, *, inside: bool | None, tools: Sequence[Mapping]) -> Reply:
    """What was said, as a task reads it, and what is wrong with its form."""
    said = split_answer(answer.text, inside=inside, tools=[*tools] or None)
    calls, fault = list[Call](), ""
    for one in said.calls:
        arguments = json.loads(one.arguments)
        calls.append(Call(name=one.name, arguments=arguments))
    behind = [part for part in answer.text.split(THOUGHT)[1:-1] if part.strip()]
    known = {tool["function"]["name"] for tool in tools}
    if tools:
        opened, closed = answer.text.count(OPEN), answer.text.count(CLOSE)
        strange = sorted({call.name for call in calls} - known)
        if strange:
            fault = f"there is no function {', '.join(strange)}; there are {', '.join(sorted(known))}"
        elif not opened == closed == len(calls):
            fault = f"{opened} calls were opened, {closed} closed and {len(calls)} could be read"
    return Reply(
        content=said.content, thinking=said.reasoning if inside or said.reasoning else None,
        calls=() if fault else tuple(calls), fault=fault, ended=answer.finish_reason == "stop",
        stray="thinking went on behind its end, and was ended again" if behind else "",
    )  # fmt: skip
