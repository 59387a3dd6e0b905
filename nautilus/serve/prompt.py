"""A prompt as tokens, and whether a model can read it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

from nautilus.config.keys import short
from nautilus.data.chat import chat_tokens
from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError

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
