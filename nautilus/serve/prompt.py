"""A prompt as tokens, whether a model can read it, and the request that it becomes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

from nautilus.config import Config
from nautilus.config.keys import short
from nautilus.data.chat import chat_tokens
from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError
from nautilus.serve.budget import thinking_rules
from nautilus.serve.control import StopStrings, opens_thinking
from nautilus.serve.request import Request
from nautilus.serve.rules import Rule, rules_of
from nautilus.serve.sampling import Sampling
from nautilus.serve.scores import PromptScores

Prompt = str | Sequence[int] | Sequence[Mapping]


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The tokens of messages, by the chat template; of text, begun as its tokenizer does; tokens as they are."""
    if isinstance(prompt, str):
        # It begins with a start token in Llama's file, with nothing in Nemotron's.
        return tokenizer.core.encode("").ids + tokenizer.encode(prompt)
    try:
        if isinstance(prompt, Mapping | bytes):
            raise TypeError(f"it is one {type(prompt).__name__}")
        parts = [*prompt]
        if {*map(type, parts)} == {int}:
            return cast(list[int], parts)
        if not any(isinstance(part, Mapping) for part in parts):
            return [operator.index(token) for token in cast(list[int], parts)]
        if strange := [part for part in parts if not isinstance(part, Mapping)]:
            raise TypeError(f"{short(strange[0])} stands among its messages")
    except TypeError as bad:
        raise UserError(
            f"an answer to the prompt {short(prompt)} was asked for, but {bad}; give text, messages or token ids"
        ) from bad
    return chat_tokens(tokenizer, cast(list[Mapping], parts))


def checked_prompt(tokens: Sequence[int], *, vocab: int, positions: int, max_tokens: int) -> None:
    """UserError for one that a model of this vocabulary and an engine of these limits cannot answer."""
    if not tokens:
        raise UserError("an answer to a prompt of 0 tokens was asked for; give at least one")
    strange = [token for token in tokens if not 0 <= token < vocab]
    if strange:
        raise UserError(
            f"the prompt holds token {strange[0]}, the model knows 0 to {vocab - 1}; use the tokenizer that was saved "
            "with the model"
        )
    if len(tokens) >= max_tokens:
        raise UserError(
            f"an answer to a prompt of {len(tokens)} tokens was asked for; prompt and answer together may have "
            f"max_tokens={max_tokens} (the model's positions: {positions}); shorten the prompt"
        )


def new_request(
    tokens: list[int], sampling: Sampling, rules: Sequence[Rule], *, config: Config, tokenizer: Tokenizer,
    max_tokens: int, prompt_logprobs: int | None = None, **more,
) -> Request:  # fmt: skip
    """rules: beside those that the sampling implies, grammars for example; prompt_logprobs: tell those of the prompt's
    tokens too, each with so many alternatives; more: fields of Request. UserError for a prompt that cannot be read."""
    checked_prompt(tokens, vocab=config.vocab, positions=config.positions, max_tokens=max_tokens)
    ends = sampling.ends((*config.eos, *tokenizer.stop))
    inside = sampling.thinking_budget is not None and bool(opens_thinking(tokens, tokenizer))
    return Request(
        prompt=len(tokens),
        tokens=tokens,
        sampling=sampling,
        ends=ends,
        limit=min(len(tokens) + sampling.max_tokens, max_tokens),
        written=tokenizer.stream(skip_special=True),
        stops=StopStrings(sampling.stop),
        rules=[
            *rules_of(sampling, tokens, ends, config.vocab),
            *rules,
            *thinking_rules(sampling, tokenizer, inside=inside),
        ],
        scores=None if prompt_logprobs is None else PromptScores(tokens, prompt_logprobs),
        **more,
    )
