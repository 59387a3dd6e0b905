"""Environments of NeMo Gym as tasks of ours: rows of a file, asked of a resources server at a URL.

An episode begins with `POST /seed_session` of its row, calls are `POST /{tool}` with their arguments, and a reply
without calls ends it; `POST /verify` with all that was said is the verdict. What a tool answers is told to the model
whatever its status is, as it may be the model's mistake. A server that does not answer, or cannot judge, is a broken
grader: it costs the episode and no other.

Source: the public code of NeMo Gym.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nautilus.tasks.items import items_of, told_items
from nautilus.tasks.rows import problem_of
from nautilus.tasks.task import Episode, GraderBroken, Message, Problem, Reply, Task, Verdict, told
from nautilus.tasks.wire import Wire, client


class Gym(Task):
    """The name is what the command line has. A problem's truth is its row."""

    turns = 16

    def __init__(self, name: str, url: str, rows: Sequence[Mapping[str, Any]]):
        client()  # says what is missing before anything is asked
        if not rows:
            raise ValueError(f"the task {name} has no rows")
        self.name, self.url = name, url
        self.rows = [replace(problem_of(row, name), truth=dict(row)) for row in rows]
        self.thinks = any("reasoning_content" in said for one in self.rows for said in one.worked)

    def draw(self, rng: random.Random, level: int) -> Problem:
        return rng.choice(self.rows)

    def episode(self, problem: Problem) -> Episode:
        return Asking(problem, Wire(self.url))


class Asking(Episode):
    def __init__(self, problem: Problem, wire: Wire):
        super().__init__(problem)
        self.wire, self.output = wire, list[dict[str, Any]]()

    def answer(self, reply: Reply) -> Sequence[Message]:
        number = len(self.replies)
        self.output += items_of(reply, number)
        if number == 1:
            self.wire.json("POST", "/seed_session", self.problem.truth)
        answers = [self.wire.ask("POST", f"/{call.name}", dict(call.arguments)).text for call in reply.calls]
        self.output += told_items(number, answers)
        return [told(answer) for answer in answers]

    def judged(self, last: Reply) -> Verdict:
        cut = None if last.ended else {"reason": "max_output_tokens"}
        found = self.wire.json("POST", "/verify", {**self.problem.truth, "response": self.response(cut)})
        if found.get("mask_sample") or not isinstance(reward := found.get("reward"), int | float):
            why = found.get("failure_reason") or found.get("failure_kind") or f"reward {found.get('reward')!r}"
            raise GraderBroken(f"{self.wire.url} could not judge an answer: {why}")
        parts = found.get("reward_components")
        return Verdict(
            reward=float(reward), why=f"judged by {self.wire.url}", parts=parts if isinstance(parts, dict) else {}
        )

    def response(self, cut: Mapping[str, str] | None) -> dict[str, Any]:
        """All that was said, as a response of OpenAI's API."""
        asked = self.problem.truth["responses_create_params"]
        return {
            "id": f"resp_{self.problem.id}", "object": "response", "created_at": 0, "model": "policy",
            "status": "incomplete" if cut else "completed", "incomplete_details": cut, "output": self.output,
            "tools": asked.get("tools") or [], "tool_choice": "auto", "parallel_tool_calls": True,
        }  # fmt: skip
