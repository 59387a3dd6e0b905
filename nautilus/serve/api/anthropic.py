"""POST /v1/messages and /v1/messages/count_tokens: chats in Anthropic's format.

A request is translated into one for a chat, and the answer back. As in that API the model thinks only if asked to, and
a last message of the assistant is continued. Signatures of thinking blocks are made but not checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import orjson
from pydantic import Field

from nautilus.serve.api import chat
from nautilus.serve.api.answer import ChatChoice
from nautilus.serve.api.blocks import Block, Blocks, Step
from nautilus.serve.api.context import Context, Prepared
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.exchange import Exchange
from nautilus.serve.api.fields import Record, read
from nautilus.serve.api.messages import Effort, Part, plain
from nautilus.serve.request import Piece

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Text(Record):
    type: Literal["text"]
    text: str


class Thinking(Record):
    type: Literal["thinking"]
    thinking: str


class RedactedThinking(Record):
    type: Literal["redacted_thinking"]


class ToolUse(Record):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Record):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Part] | None = None


Content = Annotated[Text | Thinking | RedactedThinking | ToolUse | ToolResult, Field(discriminator="type")]


class Turn(Record):
    role: Literal["user", "assistant"]
    content: str | list[Content]


class Tool(Record):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Record):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Record):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=0)


class OutputFormat(Record):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Record):
    effort: Effort | None = None
    format: OutputFormat | None = None


class Prompt(Record):
    """What is counted."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(Prompt):
    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


def prepare(context: Context, body: Mapping[str, Any], owner: str) -> Prepared:
    """The job of a request. ApiError and UserError for what cannot be done."""
    asked = read(MessagesRequest, body)
    how = {
        "max_tokens": asked.max_tokens, "stop": asked.stop_sequences, "temperature": asked.temperature,
        "top_p": asked.top_p, "top_k": asked.top_k, "stream": asked.stream, **thinking(asked), **format_of(asked),
    }  # fmt: skip
    prepared = chat.prepare(context, chat.as_chat(asked, {**prompt(asked), **choice_of(asked), **how}), owner)
    return dataclasses.replace(prepared, form=MessageForm(cast(ChatChoice, prepared.choices[0])))


def count_tokens(context: Context, body: Mapping[str, Any]) -> dict[str, Any]:
    asked = read(Prompt, body)
    context.check_model(asked.model)
    chatted = read(chat.ChatRequest, chat.as_chat(asked, {**prompt(asked), **thinking(asked)}))
    return {"input_tokens": len(chat.render(context, chatted).tokens)}


def prompt(asked: Prompt) -> dict[str, Any]:
    """What the model reads, as the fields of a chat."""
    messages = [part for turn in asked.messages for part in said(turn)]
    if asked.system:
        text = asked.system if isinstance(asked.system, str) else "\n".join(part.text for part in asked.system)
        messages.insert(0, {"role": "system", "content": text})
    if not messages:
        raise ApiError(400, "messages have no content; send some", param="messages")
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
        }
        for tool in asked.tools or ()
    ]
    continued = messages[-1]["role"] == "assistant" or None
    return {"model": asked.model, "messages": messages, "tools": tools, "continue_final_message": continued}


def said(turn: Turn) -> Iterator[dict[str, Any]]:
    """One turn as messages of a chat: results of tools are messages of their own there."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
    elif turn.role == "assistant":
        yield written(turn.content)
    else:
        texts: list[dict] = []
        for part in turn.content:
            match part:
                case Text():
                    texts.append({"type": "text", "text": part.text})
                case ToolResult():
                    if texts:
                        yield {"role": "user", "content": texts}
                        texts = []
                    yield {"role": "tool", "tool_call_id": part.tool_use_id, "content": plain(part.content)}
                case _:
                    raise misplaced(part.type, "user")
        if texts:
            yield {"role": "user", "content": texts}


def written(parts: Sequence[Content]) -> dict[str, Any]:
    """A turn of the assistant as a message of a chat."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        match part:
            case Text():
                texts.append(part.text)
            case Thinking():
                thoughts.append(part.thinking)
            case ToolUse():
                calls.append({"id": part.id, "function": {"name": part.name, "arguments": part.input}})
            case ToolResult():
                raise misplaced(part.type, "assistant")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return {**message, "tool_calls": calls} if calls else message


def misplaced(kind: str, role: str) -> ApiError:
    return ApiError(400, f"a message of role {role} has a block of type {kind}; that is the other role's")


def choice_of(asked: Prompt) -> dict[str, Any]:
    choice = asked.tool_choice
    if choice is None:
        return {}
    if choice.type == "tool":
        if choice.name is None:
            raise ApiError(400, "tool_choice of type tool needs a name", param="tool_choice.name")
        named: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        named = {"any": "required"}.get(choice.type, choice.type)
    return {"tool_choice": named, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def thinking(asked: Prompt) -> dict[str, Any]:
    wanted, effort = asked.thinking, asked.output_config.effort if asked.output_config else None
    if wanted is None or wanted.type == "disabled":
        return {"reasoning_effort": "none"}
    if wanted.type == "enabled" and wanted.budget_tokens is None:
        raise ApiError(400, "thinking of type enabled needs budget_tokens", param="thinking.budget_tokens")
    return {"thinking_token_budget": wanted.budget_tokens, "reasoning_effort": effort}


def format_of(asked: Prompt) -> dict[str, Any]:
    shape = asked.output_config.format if asked.output_config else None
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": shape.schema_}}} if shape else {}


@dataclass
class MessageForm:
    """The answer as a message with blocks, or as events that build one."""

    choice: ChatChoice
    blocks: Blocks = field(default_factory=Blocks)
    prefix: ClassVar[str] = "msg_"
    ping: ClassVar[bytes] = b'event: ping\ndata: {"type":"ping"}\n\n'

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        list(self.blocks.add(self.choice.deltas))
        return {**self.message(exchange), "content": [shown(block) for block in self.blocks.all], **self.ending()}

    def open(self, exchange: Exchange) -> list[bytes]:
        return [event("message_start", message=self.message(exchange)), self.ping]

    def add(self, exchange: Exchange, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        steps = [*self.blocks.add(self.choice.take(pieces))]
        if self.choice.finish_reason:
            steps += self.blocks.end()
        return [one for step in steps for one in told(step)]

    def close(self, exchange: Exchange) -> list[bytes]:
        return [event("message_delta", delta=self.ending(), usage=usage(exchange)), event("message_stop")]

    def fail(self, exchange: Exchange, error: ApiError) -> list[bytes]:
        return [event(**error.anthropic_body)]

    def message(self, exchange: Exchange) -> dict[str, Any]:
        return {
            "id": exchange.id, "type": "message", "role": "assistant", "model": exchange.model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": usage(exchange),
        }  # fmt: skip

    def ending(self) -> dict[str, Any]:
        reason = REASONS[self.choice.finish_reason or "stop"]
        if reason == "end_turn" and self.choice.stop is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": self.choice.stop}


def usage(exchange: Exchange) -> dict[str, Any]:
    told = exchange.usage()
    cached = told["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": told["prompt_tokens"] - cached, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached, "output_tokens": told["completion_tokens"],
    }  # fmt: skip


def shown(block: Block) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": signature(block)}
        case "text":
            return {"type": "text", "text": block.text}
        case "call":  # numbers that are too large for this server may still be none for the client
            return {
                "type": "tool_use", "id": block.id, "name": block.name, "input": orjson.Fragment(block.text or "{}"),
            }  # fmt: skip


def told(step: Step) -> Iterator[bytes]:
    block, index = step.block, step.block.index
    if step.what == "begin":
        empty = shown(Block(block.kind, index, block.id, block.name))
        if block.kind == "reasoning":
            empty["signature"] = ""
        yield event("content_block_start", index=index, content_block=empty)
    elif step.what == "grow":
        kind, name = {
            "reasoning": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]  # fmt: skip
        yield event("content_block_delta", index=index, delta={"type": kind, name: step.text})
    else:
        if block.kind == "reasoning":
            delta = {"type": "signature_delta", "signature": signature(block)}
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)


def signature(block: Block) -> str:
    """Clients keep blocks with one only; this server does not ask for it back."""
    return hashlib.sha256(block.text.encode()).hexdigest()


def event(type: str, **more: Any) -> bytes:
    return b"event: " + type.encode() + b"\ndata: " + orjson.dumps({"type": type, **more}) + b"\n\n"
