"""The messages, tools and template settings of a chat, as clients send them and as the template reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson
from pydantic import Field

from nautilus.data.chat import ChatSettings
from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.api.body import at_most
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.fields import Record
from nautilus.serve.api.settings import Limits

# What the renderer decides: with these a client could replace the template or what it is given.
FORBIDDEN = {
    "chat_template", "tokenize", "tools", "documents", "conversation", "continue_final_message", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "messages", "add_generation_prompt", "raise_exception",
    "strftime_now",
}  # fmt: skip
EFFORTS = {"low_effort": "low", "medium_effort": "medium"}
SCHEMA_BYTES = 256 << 10
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Part(Record):
    type: str
    text: str | None = None


class CalledFunction(Record):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Record):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Record):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(Record):
    name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Record):
    type: Literal["function"]
    function: Function


class ChatInput(Record):
    """What is rendered; also what /tokenize and /apply-template are given."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: Effort | None = None


def plain_messages(asked: ChatInput, limits: Limits) -> list[dict]:
    """As the template is given them. Media are refused by the renderer, which says what this model reads."""
    at_most(limits.messages, len(asked.messages), "messages")
    known = set(Message.model_fields)
    return [
        {name: plain(value) for name, value in message if name in known and value is not None}
        for message in asked.messages
    ]


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [part.model_dump(exclude_none=True) if isinstance(part, Record) else part for part in value]
    return value


def plain_tools(tools: Sequence[Tool] | None, limits: Limits) -> list[dict] | None:
    at_most(limits.tools, len(tools or ()), "tools")
    plain = [tool.model_dump(exclude_none=True, include={"type", "function"}) for tool in tools or ()]
    for tool in plain:
        size = len(orjson.dumps(tool["function"].get("parameters"), option=orjson.OPT_NON_STR_KEYS))
        at_most(SCHEMA_BYTES, size, "tools (bytes of one schema)")
    return plain or None


def chat_settings(asked: ChatInput, tokenizer: Tokenizer) -> ChatSettings:
    """ApiError for variables that a client may not set."""
    variables: dict[str, Any] = dict(asked.chat_template_kwargs or {})
    if taken := sorted((FORBIDDEN | tokenizer.words.keys()) & variables.keys()):
        raise ApiError(
            400, f"chat_template_kwargs may not set {', '.join(taken)}; leave that out", param="chat_template_kwargs"
        )
    thinking = switch(variables, "enable_thinking", True) and asked.reasoning_effort != "none"
    forget = switch(variables, "truncate_history_thinking", True)
    variables.pop("force_nonempty_content", None)
    efforts = [effort for name, effort in EFFORTS.items() if switch(variables, name, False)]
    if not efforts and asked.reasoning_effort in ("minimal", "low", "medium"):
        # What the template does not know, it does not read; the nearest that it may know is medium.
        little = asked.reasoning_effort != "medium" and "low_effort" in (tokenizer.template or "")
        efforts = ["low" if little else "medium"]
    return ChatSettings(
        enable_thinking=thinking, truncate_history_thinking=forget, effort=efforts[0] if efforts else None,
        variables=variables,
    )  # fmt: skip


def switch(variables: dict[str, Any], name: str, default: bool) -> bool:
    value = variables.pop(name, default)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param="chat_template_kwargs")
    return value


def wants_content(asked: ChatInput) -> bool:
    return bool((asked.chat_template_kwargs or {}).get("force_nonempty_content"))


def without_end(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """A rendered chat whose last message goes on: without what ends a turn."""
    if tokenizer.eos not in tokens:
        return [*tokens]
    return [*tokens[: len(tokens) - 1 - [*reversed(tokens)].index(tokenizer.eos)]]


def check_continued(messages: Sequence[Mapping], asked: ChatInput) -> None:
    if not asked.continue_final_message:
        return
    if asked.add_generation_prompt:
        raise ApiError(
            400, "continue_final_message and add_generation_prompt exclude each other; choose one",
            param="continue_final_message",
        )  # fmt: skip
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise ApiError(
            400, "continue_final_message needs a last message of the assistant without tool calls", param="messages"
        )
