"""One turn in the middle of a task of several: what would be done next, judged by what it does.

A pivot is a problem with the first turns of its worked course before it. One reply is heard; it is right if it has the
effect of the worked one: the same state afterwards, the same answers of the tools, and at the end the same reward. How
it is written does not matter. Pivots of recorded conversations, whose tools are not there, are right if they call the
same with the same arguments. So an agent learns from single turns, without playing whole episodes (PivotRL, arXiv
2603.21383).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nautilus.tasks.rows import Rows, arguments_of
from nautilus.tasks.task import Call, Episode, Message, Problem, Reply, Task, Verdict


class Pivot(Task):
    """Of a task whose episodes have turns and a state. Levels are those of the task."""

    pivotal = True

    def __init__(self, of: Task):
        self.of, self.name, self.levels, self.thinks = of, f"pivot/{of.name}", of.levels, of.thinks

    def draw(self, rng: random.Random, level: int) -> Problem:
        whole = self.of.draw(rng, level)
        turns = [at for at, message in enumerate(whole.worked) if message["role"] == "assistant"]
        at = rng.choice(turns)
        before = whole.worked[:at]
        return replace(
            whole, task=self.name, messages=(*whole.messages, *before), worked=(whole.worked[at],),
            truth={"truth": whole.truth, "before": [*before], "right": whole.worked[at], "asked": [*whole.messages]},
        )  # fmt: skip

    def episode(self, problem: Problem) -> Episode:
        return OneTurn(self.of, problem)


class OneTurn(Episode):
    def __init__(self, of: Task, problem: Problem):
        super().__init__(problem)
        self.of = of

    def answer(self, reply: Reply) -> Sequence[Message]:
        return ()

    def effect(self, reply: Reply) -> tuple[Any, list[Message], float | None]:
        """The state after this reply in place of the worked one, what the tools answer, and the reward where none do:
        the episode is over then."""
        known = self.problem.truth
        base = replace(self.problem, truth=known["truth"], messages=tuple(known["asked"]))
        episode = self.of.episode(base)
        for message in known["before"]:
            if message["role"] == "assistant":
                episode.hear(reply_of(message))
        told = [*episode.hear(reply)]
        return episode.state(), told, None if told else episode.verdict().reward

    def judged(self, last: Reply) -> Verdict:
        if last.fault:
            return Verdict(reward=0.0, why=last.fault)
        right, said = (self.effect(reply) for reply in (reply_of(self.problem.truth["right"]), last))
        same = right == said
        return Verdict(reward=float(same), why="the same effect" if same else "another effect")


def reply_of(message: Message) -> Reply:
    """What a worked turn says."""
    calls = tuple(
        Call(name=one["function"]["name"], arguments=one["function"]["arguments"])
        for one in message.get("tool_calls", ())
    )
    return Reply(content=message["content"], thinking=message.get("reasoning_content"), calls=calls)


class Recorded(Rows):
    """The turns of conversations, {"messages": [...], "tools": [...]}, that call tools."""

    pivotal = True

    def __init__(self, conversations: Sequence[Mapping[str, Any]]):
        turns = [turn for one in conversations for turn in turns_in(one)]
        if not turns:
            raise ValueError(f"no turn of {len(conversations)} conversations calls a tool; give some in which one does")
        super().__init__("pivot", turns)
        self.thinks = any("reasoning_content" in turn["worked"][0] for turn in turns)


def turns_in(conversation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each turn with calls as a row: what was said before it is asked. ValueError for what is no conversation."""
    messages, tools = conversation.get("messages"), conversation.get("tools")
    if not isinstance(messages, list):
        raise ValueError(f"the row has no messages; it must have a list of them: {str(conversation)[:200]}")
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("tool_calls"):
            continue
        if not tools:
            raise ValueError("the row has calls and no tools; those that can be called must stand there")
        calls = [one.get("function", one) for one in message["tool_calls"]]
        yield {
            "responses_create_params": {"input": messages[:at], "tools": tools}, "worked": [message],
            "expected_calls": [{"name": one["name"], "arguments": arguments_of(one)} for one in calls],
        }  # fmt: skip
