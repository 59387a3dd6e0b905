"""What requests for completions and for chats have in common, and how it becomes `Sampling`.

Types are strict: "1" is no number. Fields that are not known are left out with a debug message, because clients send
new ones; those that are known and cannot be honoured are refused.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve import Sampling
from nautilus.serve.api.body import at_most
from nautilus.serve.api.errors import ApiError, misfit
from nautilus.serve.api.settings import Limits

log = logging.getLogger("nautilus.serve.api")

# Fields of this API or of other servers that would change the answer but are not supported, with what may be sent.
REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "best_of": (None, 1),
    "prompt_logprobs": (None, 0, False),
    "chat_template": (None,),
    "documents": (None, []),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "mm_processor_kwargs": (None, {}),
    "allowed_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "repetition_detection": (None,),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
}
# What other servers call it, and what to send here: left out, such a field would give an answer without its rule.
ELSEWHERE = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar, in lark",
    "grammar": "structured_outputs.grammar, in lark",
    "json_schema": "response_format",
    "n_predict": "max_tokens",
}
SAME_NAMES = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens",
    "ignore_eos",
)  # fmt: skip


def first_fault_only(schema: Any) -> Any:
    if isinstance(schema, dict) and schema.get("type") in ("list", "dict"):
        schema["fail_fast"] = True
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list | tuple) else ():
        first_fault_only(part)
    return schema


class Record(pydantic.BaseModel):
    """Of each list and object the first fault is told, not all: of 250,000 wrong values they would take seconds."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return first_fault_only(handler(source))


Some = TypeVar("Some", bound=Record)


class StreamOptions(Record):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Asked(Record):
    """The fields of both kinds. None is as good as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0)
    thinking_token_grace: int | None = Field(default=None, ge=0)
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_token_sources: bool | None = None
    cache_salt: str | None = Field(default=None, max_length=256)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def read(kind: type[Some], asked: Mapping[str, Any]) -> Some:
    """The record of a request. ApiError 400 for a wrong type or value, or what cannot be honoured, with its field."""
    try:
        record = kind.model_validate(asked)
    except pydantic.ValidationError as bad:
        raise misfit(bad, asked) from bad
    for name, value in (record.model_extra or {}).items():
        if name in REFUSED and value not in REFUSED[name]:
            raise ApiError(400, f"{name} is not supported by this server; leave it out", param=name, code="unsupported")
        if name in ELSEWHERE and value is not None:
            cure = f"send {ELSEWHERE[name]} instead"
            raise ApiError(400, f"{name} is not known by this server; {cure}", param=name, code="unsupported")
    if record.model_extra:
        log.debug("fields left out: %s", ", ".join(sorted(record.model_extra))[:200])
    return record


def check_sizes(asked: Asked, limits: Limits) -> None:
    if asked.priority < limits.priority:
        raise ApiError(
            400, f"priority is {asked.priority}; lower runs first, and this server takes {limits.priority} or more",
            param="priority",
        )  # fmt: skip
    at_most(limits.choices, asked.n or 1, "n")
    at_most(limits.stop, len(asked.stops), "stop")
    for string in asked.stops:
        at_most(limits.stop_chars, len(string), "stop (characters of one)")
    at_most(limits.biases, len(asked.logit_bias or ()), "logit_bias")
    at_most(limits.bad_words, len(asked.bad_words or ()), "bad_words")
    for word in asked.bad_words or ():
        at_most(limits.stop_chars, len(word), "bad_words (characters of one)")


def sampling_of(asked: Asked, defaults: Sampling, tokenizer: Tokenizer, *, longest: int, tops: int) -> Sampling:
    """How the tokens of an answer are chosen; what was not asked for is as the server's defaults say.

    longest: tokens of the answer; tops: alternatives told for each. UserError for values that cannot be.
    """
    given = {name: value for name in SAME_NAMES if (value := getattr(asked, name)) is not None}
    if asked.top_k is not None:
        given["top_k"] = 0 if asked.top_k == -1 else min(asked.top_k, tokenizer.vocab)  # -1: all, as elsewhere
    # Without a seed two requests should not be answered alike.
    given["seed"] = secrets.randbits(63) if asked.seed is None else asked.seed % (1 << 64)
    if asked.thinking_token_budget is not None:
        given["thinking_budget"] = asked.thinking_token_budget
    if asked.thinking_token_grace is not None:
        given["thinking_grace"] = asked.thinking_token_grace
    known = known_tokens(asked.stop_token_ids or (), tokenizer, "stop_token_ids")
    return replace(
        defaults,
        **given,
        max_tokens=longest,
        stop=asked.stops,
        stop_tokens=tuple(known),
        logit_bias=biases(asked.logit_bias or {}, tokenizer),
        bad_tokens=spelled(asked.bad_words or (), tokenizer),
        top_logprobs=tops,
    )


def biases(asked: Mapping[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    strange = next((key for key in asked if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if strange is not None:
        raise ApiError(400, f"logit_bias has the key {strange[:40]!r}; keys are token ids", param="logit_bias")
    known_tokens([int(key) for key in asked], tokenizer, "logit_bias")
    return {int(key): value for key, value in asked.items()}


def spelled(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the beginning of a text and after a blank."""
    if not all(words):
        raise ApiError(400, "bad_words holds an empty string; leave it out", param="bad_words")
    ways = [way for word in words for way in (word, " " + word.lstrip(" "))]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(way)) for way in ways))


def known_tokens(tokens: Sequence[int], tokenizer: Tokenizer, name: str) -> Sequence[int]:
    strange = next((token for token in tokens if not 0 <= token < tokenizer.vocab), None)
    if strange is not None:
        raise ApiError(400, f"{name} holds token {strange}; ids are 0 to {tokenizer.vocab - 1}", param=name)
    return tokens
