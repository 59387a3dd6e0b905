"""POST /v1/responses: OpenAI's newer form of a chat. A request is translated into one for a chat, and the answer back.

An answer is kept for a while, so that it can be asked for and the next request can go on from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field

from nautilus.serve.api import chat
from nautilus.serve.api.answer import ChatChoice
from nautilus.serve.api.context import Context, Prepared
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.fields import Record, read
from nautilus.serve.api.items import Item, messages_of
from nautilus.serve.api.messages import Effort
from nautilus.serve.api.outputs import ResponseForm

NOT_HERE = ("background", "conversation", "prompt", "top_logprobs", "context_management")


class FunctionTool(Record):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Record):
    type: Literal["function"]
    name: str


class Reasoning(Record):
    effort: Effort | None = None


class Format(Record):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextConfig(Record):
    format: Format | None = None


class ResponsesRequest(Record):
    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream: bool | None = None
    return_token_ids: bool | None = None


def prepare(context: Context, body: Mapping[str, Any], owner: str) -> Prepared:
    """The job of a request. ApiError and UserError for what cannot be done."""
    asked = read(ResponsesRequest, body)
    for name in NOT_HERE:
        if (asked.model_extra or {}).get(name):
            raise ApiError(400, f"{name} is not supported by this server; leave it out", param=name, code="unsupported")
    talk = context.kept.talk(owner, asked.previous_response_id) if asked.previous_response_id is not None else []
    talk += [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else messages_of(asked.input)
    if not talk:
        raise ApiError(400, "input is an empty list; send at least one item", param="input")
    prepared = chat.prepare(context, chat.as_chat(asked, fields_of(asked, talk)), owner)
    form = ResponseForm(
        choice=cast(ChatChoice, prepared.choices[0]), kept=context.kept, owner=owner, talk=talk,
        store=asked.store is not False, echo=echo(asked, prepared), prompt=prepared.jobs[0].tokens,
    )  # fmt: skip
    return dataclasses.replace(prepared, form=form)


def fields_of(asked: ResponsesRequest, talk: list[dict]) -> dict[str, Any]:
    """Those of a chat."""
    system = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in asked.tools or ()]
    choice: Any = asked.tool_choice
    if isinstance(choice, NamedTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    return {
        "model": asked.model, "messages": [*system, *talk], "tools": tools, "tool_choice": choice,
        "parallel_tool_calls": asked.parallel_tool_calls, "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature, "top_p": asked.top_p, "stream": asked.stream,
        "reasoning_effort": asked.reasoning.effort if asked.reasoning else None, "response_format": shape_of(asked),
        "truncate_prompt_tokens": -1 if asked.truncation == "auto" else None,
        "return_token_ids": asked.return_token_ids,
    }  # fmt: skip


def shape_of(asked: ResponsesRequest) -> dict[str, Any] | None:
    shape = asked.text.format if asked.text else None
    if shape is None or shape.type != "json_schema":
        return shape and {"type": shape.type}
    if shape.schema_ is None:
        raise ApiError(400, "text.format of type json_schema needs a schema", param="text.format.schema")
    return {"type": shape.type, "json_schema": {"name": shape.name, "schema": shape.schema_}}


def echo(asked: ResponsesRequest, prepared: Prepared) -> dict[str, Any]:
    """What a response repeats of its request."""
    sampling, given = prepared.jobs[0].sampling, asked.model_dump(by_alias=True)
    return {
        "instructions": asked.instructions, "previous_response_id": asked.previous_response_id,
        "tools": given["tools"] or [], "tool_choice": given["tool_choice"] or "auto",
        "parallel_tool_calls": asked.parallel_tool_calls is not False, "max_output_tokens": asked.max_output_tokens,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "truncation": asked.truncation or "disabled",
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "text": {"format": (given["text"] or {}).get("format") or {"type": "text"}}, "metadata": asked.metadata or {},
        "store": asked.store is not False, "background": False,
    }  # fmt: skip
