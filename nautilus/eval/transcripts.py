"""Recorded transcripts of agents as text to be continued: before each turn of the agent everything up to it, and after
it the turn as it was recorded. So a trace can be answered by a model, or replayed without one.

| from | holds |
|--|--|
| SWE-agent, `*.traj.json` or `*.traj` (SWE-agent/SWE-agent, trajectories/demonstrations) | an object with `history` |
| OpenHands as published by SWE-Gym and Nebius | rows with `messages` or `trajectory`, perhaps `tools` |

A history is a list of messages with `role` and `content`, and `tool_calls` in the form of OpenAI's interface. What
OpenHands tells of its events (the `history` of its output.jsonl) is another thing and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nautilus.data.chat import tidy
from nautilus.eval.families import Prompt, said
from nautilus.eval.rows import Row
from nautilus.runtime import UserError

KEPT = "role", "content", "tool_calls"  # of a message; the rest is the recorder's own


def turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(place, message) of all turns that an agent took and that say something; not those shown to it as an example."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and place and not message.get("is_demo") and said(message):
            yield place, message


def recorded(row: Row, history: Sequence[Any], *, set: str, family: str, id: str, tools: Sequence = ()) -> list[Prompt]:
    """A prompt for each turn of the agent, whose reference is that turn."""
    messages = [message_of(row, each, f"message {number}") for number, each in enumerate(history, start=1)]
    kept = [{key: message[key] for key in KEPT if key in message} for message in messages]
    return [
        Prompt(
            id=f"{id}/{number}", family=family, set=set, messages=tuple(kept[:place]), tools=tuple(tools),
            reference=said(message),
        )
        for number, (place, message) in enumerate(turns(messages), start=1)
    ]  # fmt: skip


def message_of(row: Row, value: Any, what: str) -> dict[str, Any]:
    inside = row.inner(value, what)
    for call in inside.fields.get("tool_calls") or ():
        called = inside.inner(call, "a tool call")
        called.inner(called.value("function"), "its function").text("name")
    try:
        message = tidy(inside.fields)
    except UserError as bad:
        inside.refuse(str(bad))
    return message


def swe_agent(row: Row) -> list[Prompt]:
    name = row.file.name.removesuffix(".json").removesuffix(".traj")
    return recorded(row, row.listed("history"), set="swe_agent", family="agentic", id=name)


def swebench_openhands(row: Row) -> list[Prompt]:
    """SWE-Gym/OpenHands-Sampled-Trajectories has messages and run_id, nebius/SWE-rebench-openhands-trajectories has
    trajectory and trajectory_id."""
    run = row.get("run_id", "trajectory_id")
    id = row.text("instance_id") + (f"/{run}" if run is not None else "")
    history, tools = row.listed("messages", "trajectory"), row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as bad:
            row.refuse(f"field 'tools' is not JSON ({bad})")
    return recorded(row, history, set="swebench_openhands", family="code", id=id, tools=tools)
