"""What an answer must look like: response formats, structured outputs and tool choices as rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import orjson
from pydantic import Field

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.fields import Record
from nautilus.serve.grammar import Grammar, compile_grammar


class Named(Record):
    name: str


class NamedChoice(Record):
    type: Literal["function"]
    function: Named


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def called(choice: ToolChoice | None, tools: Sequence[Mapping] | None) -> list[Mapping] | None:
    """The tools of which one must be called; None: the model decides."""
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools; send some", param="tool_choice")
    if choice == "required":
        return [*tools]
    found = [tool for tool in tools if tool["function"]["name"] == choice.function.name]  # type: ignore[union-attr]
    if not found:
        name = choice.function.name  # type: ignore[union-attr]
        raise ApiError(400, f"tool_choice names {name[:80]!r}, which is none of the tools", param="tool_choice")
    return found


class JsonSchema(Record):
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Record):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Record):
    """vLLM's fields, of which one may be given."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: None = None  # not supported


def rules_of(
    tokenizer: Tokenizer,
    shape: ResponseFormat | None,
    outputs: StructuredOutputs | None,
    *,
    inside: bool = False,
    calls: Sequence[Mapping] | None = None,
    offered: bool = False,
    parallel: bool = True,
) -> list[Grammar]:
    """The rule for what was asked, or none. inside: the answer begins within a thinking block, which stays free.

    calls: tools of which one must be called; offered: the model may call some. ApiError for what excludes each other,
    UserError for a grammar that cannot be.
    """
    wanted = [*of_format(shape), *of_outputs(outputs)]
    if calls is not None:
        wanted.append(("tools", json_text(calls), "tool_choice"))
    if len(wanted) > 1:
        names = " and ".join(f"{name} ({kind})" for kind, _, name in wanted)
        raise ApiError(400, f"{names} exclude each other; ask for one of them", param=wanted[1][2])
    if wanted and offered and calls is None:
        raise ApiError(
            400, f"{wanted[0][2]} holds for the whole answer, in which no tool could be called; leave it or the tools"
            " out, or send tool_choice=none", param=wanted[0][2],
        )  # fmt: skip
    return [compile_grammar(kind, text, tokenizer, thinking=inside, parallel=parallel) for kind, text, _ in wanted]


def of_format(shape: ResponseFormat | None) -> Iterator[tuple[str, str, str]]:
    """(kind, text, name of the field) of what is asked for."""
    if shape is not None and shape.type == "json_object":
        yield "json_object", "", "response_format"
    elif shape is not None and shape.type == "json_schema":
        if shape.json_schema is None:
            raise ApiError(400, "response_format has no json_schema; send {name, schema}", param="response_format")
        yield "json_schema", json_text(shape.json_schema.schema_), "response_format"


def of_outputs(outputs: StructuredOutputs | None) -> Iterator[tuple[str, str, str]]:
    name = "structured_outputs"
    if outputs is None:
        return
    if outputs.json_ is not None:
        yield "json_schema", outputs.json_ if isinstance(outputs.json_, str) else json_text(outputs.json_), name
    if outputs.json_object:
        yield "json_object", "", name
    if outputs.choice is not None:
        yield "choice", json_text(outputs.choice), name
    for kind, text in {"regex": outputs.regex, "lark": outputs.grammar}.items():
        if text is not None:
            yield kind, text, name


def json_text(value: Any) -> str:
    return orjson.dumps(value).decode()
