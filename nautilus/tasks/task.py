"""What a task is: problems by level, an episode of turns for each, a verdict at its end.

A `Task` draws problems; the same seed draws the same ones. A `Problem` is plain data: the messages that a model is
shown, the truth that its answer is held against, and a course that would be right. An `Episode` takes what the model
says turn by turn and gives back what it is told next. At its end it gives a `Verdict`.

    episode = task.episode(problem)
    while told := episode.hear(reply):        # nothing comes back when it is over
        ...
    episode.verdict().reward                  # 0 to 1

A wrong answer is a verdict. A grader that fails raises `GraderBroken`: nothing is known of the answer then, and who
trains on it leaves it out and counts it.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Message = Mapping[str, Any]

SPLITS = {"test": 1, "valid": 1, "train": 8}  # shares of all problems, by a hash of what is asked
TRIES = 10_000  # draws for one problem of a split
FEW = 1000  # problems: among fewer, new ones are looked for as long as among so many


class GraderBroken(Exception):
    """The grader failed, not the answer."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """reward: 0 to 1 where a grader says it, of comparisons any; why: for people; parts: what it was made of, and what
    else was seen, by name."""

    reward: float
    why: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said in a turn. thinking: None where it did not think; fault: what is wrong with its form, a call
    that cannot be read for one; stray: of its thinking, which nobody is told of and which earns nothing: a budget would
    hold back nothing otherwise; ended: not by a limit."""

    content: str = ""
    thinking: str | None = None
    calls: tuple[Call, ...] = ()
    fault: str = ""
    stray: str = ""
    ended: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """messages: what the model is shown first; truth: JSON that the grader needs; worked: how it could go on, an answer
    of the assistant or several with those of tools between them; tools: as a chat template is told of them."""

    task: str
    level: int
    messages: tuple[Message, ...]
    truth: Any = None
    worked: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()

    @property
    def id(self) -> str:
        """Of what is asked: the same problem drawn twice has the same."""
        asked = json.dumps([self.task, self.messages, self.tools], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """Which part of all problems it belongs to, whoever draws it."""
        at = int(self.id, 16) % sum(SPLITS.values())
        for name, share in SPLITS.items():
            at -= share
            if at < 0:
                return name
        raise AssertionError(at)


class Episode(ABC):
    """One model's way through a problem."""

    def __init__(self, problem: Problem):
        self.problem, self.replies = problem, list[Reply]()

    def hear(self, reply: Reply) -> Sequence[Message]:
        """What the model is told next; nothing when it is over."""
        self.replies.append(reply)
        return self.answer(reply)

    @abstractmethod
    def answer(self, reply: Reply) -> Sequence[Message]: ...

    def verdict(self) -> Verdict:
        """GraderBroken where there can be none."""
        if not self.replies:
            raise GraderBroken(f"a verdict on {self.problem.task} was asked for before the model said anything")
        return self.judged(self.replies[-1])

    @abstractmethod
    def judged(self, last: Reply) -> Verdict: ...

    def state(self) -> Any:
        """What its turns have changed so far: two ways that leave the same state have done the same."""
        return None


class Task(ABC):
    """levels: how hard problems can be, 1 the easiest; turns: most replies of an episode; thinks: whether worked
    answers think first; pivotal: whether problems are single turns of a longer way, of which those count that are
    solved now and then."""

    name: str
    levels: range = range(1, 2)
    turns: int = 1
    thinks: bool = True
    pivotal: bool = False

    @abstractmethod
    def draw(self, rng: random.Random, level: int) -> Problem:
        """A problem of this level."""

    @abstractmethod
    def episode(self, problem: Problem) -> Episode:
        """A new way through it."""

    def problems(self, split: str, *, level: int | None = None, seed: int = 0) -> Iterator[Problem]:
        """Without end, of one level or of all in turn; ValueError for a split or level that is none, or has none."""
        if split not in SPLITS:
            raise ValueError(f"problems of the split {split!r} were asked for; there are {', '.join(SPLITS)}")
        if level is not None and level not in self.levels:
            raise ValueError(
                f"{self.name} of level {level} was asked for; it has levels {self.levels[0]} to {self.levels[-1]}"
            )
        rng, number = random.Random(f"{self.name} {split} {level} {seed}"), 0
        while True:
            here = self.levels[number % len(self.levels)] if level is None else level
            yield self.of_split(rng, here, split)
            number += 1

    def of_split(self, rng: random.Random, level: int, split: str) -> Problem:
        for _ in range(TRIES):
            if (found := self.draw(rng, level)).split == split:
                return found
        share = f"{SPLITS[split]} in {sum(SPLITS.values())}"
        raise ValueError(
            f"{TRIES:,} draws of {self.name}, level {level}, gave no problem of the split {split!r}, into which"
            f" {share} come by what is asked; give more different problems"
        )


def distinct(task: Task, split: str, count: int, *, levels: Sequence[int] = (), seed: int = 0) -> list[Problem]:
    """So many different problems of a split, of these levels in turn, or as many as are found by 20 draws for each that
    is asked for, or until ten times as many draws as were found have brought nothing new."""
    sources = [task.problems(split, level=level, seed=seed) for level in levels or task.levels]
    found, vain = dict[str, Problem](), 0
    for number in range(20 * count):
        one = next(sources[number % len(sources)])
        vain = vain + 1 if (name := one.id) in found else 0
        found.setdefault(name, one)
        if len(found) == count or vain > 10 * max(FEW, len(found)):
            break
    return [*found.values()]


class Question(Task):
    """One reply, and it is over."""

    @abstractmethod
    def grade(self, problem: Problem, reply: Reply) -> Verdict: ...

    def episode(self, problem: Problem) -> Episode:
        return Asked(self, problem)


class Asked(Episode):
    def __init__(self, question: Question, problem: Problem):
        super().__init__(problem)
        self.question = question

    def answer(self, reply: Reply) -> Sequence[Message]:
        return ()

    def judged(self, last: Reply) -> Verdict:
        return self.question.grade(self.problem, last)


def user(text: str, *, system: str = "") -> tuple[Message, ...]:
    """A question, under a system message if there is one."""
    before = ({"role": "system", "content": system},) if system else ()
    return (*before, {"role": "user", "content": text})


def assistant(content: str, thinking: str = "", calls: Sequence[Call] = ()) -> Message:
    """A turn of the model, as a chat template takes it."""
    said: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        said["reasoning_content"] = thinking
    if calls:
        said["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls
        ]
    return said


def told(content: str) -> Message:
    """What a tool answers."""
    return {"role": "tool", "content": content}


def tool(name: str, description: str, **parameters: Mapping[str, Any] | str) -> Message:
    """A function as models are told of it; all its parameters are required. Each is a schema, or words on a string."""
    schemas = {
        key: {"type": "string", "description": value} if isinstance(value, str) else dict(value)
        for key, value in parameters.items()
    }
    schema = {"type": "object", "properties": schemas, "required": [*schemas]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def without_thinking(problem: Problem) -> Problem:
    """The same, answered at once."""
    shown = tuple(
        {key: value for key, value in message.items() if key != "reasoning_content"} for message in problem.worked
    )
    return replace(problem, worked=shown)
