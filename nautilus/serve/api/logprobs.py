"""Log-probs of an answer in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.request import Piece

LEAST = -9999.0  # JSON has no -infinity


def of_chat(pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
    """One entry for each token, with its bytes, as a token may be a part of a character."""
    return {
        "content": [
            {
                **entry(piece.token, piece.logprob, tokenizer),
                "top_logprobs": [entry(token, logprob, tokenizer) for token, logprob in piece.top],
            }
            for piece in pieces
        ],
        "refusal": None,
    }


def entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes[token]
    text = spelled.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": [*spelled]}


def of_text(pieces: Sequence[Piece], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """Four lists with a place for each token. offset: characters of the text before these tokens. The first token of a
    prompt has no log-prob."""
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    word = lambda token: tokenizer.token_bytes[token].decode(errors="replace")
    return {
        "tokens": [word(piece.token) for piece in pieces],
        "token_logprobs": [None if math.isnan(piece.logprob) else max(piece.logprob, LEAST) for piece in pieces],
        "top_logprobs": [
            {word(token): max(logprob, LEAST) for token, logprob in reversed(piece.top)} if piece.top else None
            for piece in pieces
        ],
        "text_offset": offsets,
    }
