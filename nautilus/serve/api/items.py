"""The items of OpenAI's responses: what a conversation is given as, and its messages as a chat has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from nautilus.serve.api.blocks import Block
from nautilus.serve.api.fields import Record
from nautilus.serve.api.messages import Part

TEXTS = ("input_text", "output_text", "text")


class MessageItem(Record):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class CallItem(Record):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Record):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ReasoningText(Record):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Record):
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None


def kind(item: Any) -> str:
    named = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if named is None else named if isinstance(named, str) else ""


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(kind),
]


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Reasoning, text and calls that follow each other are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case ReasoningItem():
                thought = "".join(part.text for part in item.content or ())
                turn(messages, "reasoning_content", "content", "tool_calls")["reasoning_content"] = thought
            case MessageItem(role="assistant"):
                turn(messages, "content", "tool_calls")["content"] = plain(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": plain(item.content)})
            case CallItem():
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                turn(messages).setdefault("tool_calls", []).append(call)
            case OutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": plain(item.output)})
    return messages


def turn(messages: list[dict[str, Any]], *taken: str) -> dict[str, Any]:
    """The last message if it is the assistant's and has none of these yet, else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in taken):
        messages.append({"role": "assistant"})
    return messages[-1]


def plain(content: str | Sequence[Part]) -> str | list[dict]:
    """Texts under the name that a chat has for them. Other parts are left to the renderer, which refuses them."""
    if isinstance(content, str):
        return content
    return [
        {"type": "text" if part.type in TEXTS else part.type} | ({} if part.text is None else {"text": part.text})
        for part in content
    ]


def item_of(block: Block, id: str, status: str) -> dict[str, Any]:
    """A block of an answer as an item of its output."""
    same = {"id": id, "type": block.kind, "status": status}
    match block.kind:
        case "reasoning":
            return {**same, "summary": [], "content": [part_of(block)] if block.text else []}
        case "text":
            parts = [part_of(block)] if block.text else []
            return {**same, "type": "message", "role": "assistant", "content": parts}
        case "call":
            return {
                **same, "type": "function_call", "call_id": block.id, "name": block.name, "arguments": block.text,
            }  # fmt: skip


def part_of(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
