"""What a model says as items of OpenAI's responses, both ways, and the verdict on a whole response.

A verdict needs nothing but the problem and the response: the episode is played once more with what the response says,
and its tools must answer as it says they did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nautilus.tasks.task import Call, Problem, Reply, Task, Verdict


class Misfit(ValueError):
    """A response that cannot be one to this problem. The message says what clashes."""


@dataclass
class Turn:
    """What a model said until it was answered, and the answers of tools."""

    content: str = ""
    thinking: str | None = None
    calls: list[Call] = field(default_factory=list)
    fault: str = ""
    told: list[str] = field(default_factory=list)

    @property
    def reply(self) -> Reply:
        calls = () if self.fault else tuple(self.calls)
        return Reply(content=self.content, thinking=self.thinking, calls=calls, fault=self.fault)


def items_of(reply: Reply, number: int) -> list[dict[str, Any]]:
    """Of the turn of this number. What is wrong with its form is told by its text alone."""
    items: list[dict[str, Any]] = []
    if reply.thinking is not None:
        summary = [{"type": "summary_text", "text": reply.thinking}]
        items.append({"type": "reasoning", "id": f"rs_{number}", "summary": summary})
    if reply.content or not reply.calls:
        text = {"type": "output_text", "text": reply.content, "annotations": []}
        message = {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed"}
        items.append({**message, "content": [text]})
    for at, call in enumerate(reply.calls):
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        items.append(
            {"type": "function_call", "call_id": f"call_{number}_{at}", "name": call.name, "arguments": arguments}
        )
    return items


def told_items(number: int, answers: Sequence[str]) -> list[dict[str, Any]]:
    """What tools answered to the calls of such a turn."""
    return [
        {"type": "function_call_output", "call_id": f"call_{number}_{at}", "output": answer}
        for at, answer in enumerate(answers)
    ]


def turns_of(output: Any) -> Iterator[Turn]:
    """Items between two answers of tools are a turn. Misfit for what is no item of an answer."""
    if not isinstance(output, list):
        raise Misfit("response.output must be a list of items")
    turn: Turn | None = None
    for item in output:
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "function_call_output":
            if turn is None:
                raise Misfit("response.output begins with what a tool answered")
            turn.told.append(text_of(item.get("output")))
            continue
        if turn is None or turn.told:
            if turn is not None:
                yield turn
            turn = Turn()
        add(turn, kind, item)
    if turn is not None:
        yield turn


def add(turn: Turn, kind: Any, item: Any) -> None:
    match kind:
        case "message":
            turn.content += text_of(item.get("content"))
        case "reasoning":
            turn.thinking = (turn.thinking or "") + text_of(item.get("content") or item.get("summary"))
        case "function_call":
            try:
                arguments = json.loads(item["arguments"])
            except (KeyError, TypeError, ValueError):
                arguments = None
            if isinstance(arguments, dict) and isinstance(item.get("name"), str):
                turn.calls.append(Call(name=item["name"], arguments=arguments))
            else:
                turn.fault = f"a call of {item.get('name')!r} cannot be read"
        case _:
            raise Misfit(f"response.output has an item of type {str(kind)[:40]!r}, which no answer here has")


def text_of(content: Any) -> str:
    """Of a text, or of parts that have one; Misfit for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise Misfit(f"an item of response.output has no text: {str(content)[:200]}")
    return "".join(part["text"] for part in parts)


def verified(task: Task, problem: Problem, response: Mapping[str, Any]) -> Verdict:
    """Misfit for a response that was not given here; whatever the grader raises passes through."""
    turns = [*turns_of(response.get("output"))]
    if not turns:
        raise Misfit("response.output has nothing that a model said")
    episode = task.episode(problem)
    for turn in turns:
        cut = turn is turns[-1] and bool(response.get("incomplete_details"))
        told = [message["content"] for message in episode.hear(replace(turn.reply, ended=not cut))]
        if turn.told and told != turn.told:
            raise Misfit(f"the response says that tools answered {str(turn.told)[:200]}; here it is {str(told)[:200]}")
        if not told:
            break
    return episode.verdict()
