"""One turn in the middle of a task of several: what would be done next, judged by what it does.

A pivot is a problem with the first turns of its worked course before it. One reply is heard; it is right if it has the
effect of the worked one: the same state afterwards, and the same answers of the tools. How it is written does not
matter. So an agent learns from single turns, without playing whole episodes (PivotRL, arXiv 2603.21383).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nautilus.tasks.task import Call, Episode, Message, Problem, Reply, Task, Verdict


class Pivot(Task):
    """Of a task whose episodes have turns and a state. Levels are those of the task."""

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

    def effect(self, reply: Reply) -> tuple[Any, list[Message]]:
        """The state after this reply in place of the worked one, and what the tools answer."""
        known = self.problem.truth
        base = replace(self.problem, truth=known["truth"], messages=tuple(known["asked"]))
        episode = self.of.episode(base)
        for message in known["before"]:
            if message["role"] == "assistant":
                episode.hear(reply_of(message))
        told = [*episode.hear(reply)]
        return episode.state(), told

    def judged(self, last: Reply) -> Verdict:
        if last.fault:
            return Verdict(reward=0.0, why=last.fault)
        right, said = (self.effect(reply) for reply in (reply_of(self.problem.truth["right"]), last))
        ends = bool(right[1]) == bool(said[1])  # of turns without calls both end the episode
        same = right == said and ends
        return Verdict(reward=float(same), why="the same effect" if same else "another effect")


def reply_of(message: Message) -> Reply:
    """What a worked turn says."""
    calls = tuple(
        Call(name=one["function"]["name"], arguments=one["function"]["arguments"])
        for one in message.get("tool_calls", ())
    )
    return Reply(content=message["content"], thinking=message.get("reasoning_content"), calls=calls)
