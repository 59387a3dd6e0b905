"""Answers as OpenAI's completions and chats tell them: one object with choices, or chunks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.exchange import Exchange
from nautilus.serve.api.fields import Asked
from nautilus.serve.request import Piece

DONE = b"data: [DONE]\n\n"


@dataclass
class Chunks:
    """opening stands in the first chunk or in the whole, besides the rest."""

    asked: Asked
    name: str = field(kw_only=True)  # of the whole, such as "chat.completion"
    chunk_name: str = field(kw_only=True)  # of its parts
    prefix: str = field(kw_only=True)
    opening: dict[str, Any] = field(default_factory=dict, kw_only=True)
    ping: bytes = field(default=b": ping\n\n", init=False)

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        choices = [choice.whole() for choice in exchange.choices]
        return {**self.frame(exchange, self.name), "choices": choices, "usage": exchange.usage(), **self.opening}

    def open(self, exchange: Exchange) -> list[bytes]:
        return [self.event(exchange, [part], **self.opening) for choice in exchange.choices for part in choice.open()]

    def add(self, exchange: Exchange, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        return [self.event(exchange, [part]) for part in exchange.choices[index].add(pieces)]

    def close(self, exchange: Exchange) -> list[bytes]:
        return [*([self.event(exchange, [], usage=exchange.usage())] if self.asked.wants_usage else []), DONE]

    def fail(self, exchange: Exchange, error: ApiError) -> list[bytes]:
        return [b"event: error\ndata: " + orjson.dumps(error.body) + b"\n\n"]

    def event(self, exchange: Exchange, choices: list[dict], **more: Any) -> bytes:
        usage, options = {}, self.asked.stream_options
        if options and options.include_usage:
            usage = {"usage": exchange.usage() if options.continuous_usage_stats else None}
        frame = self.frame(exchange, self.chunk_name)
        return b"data: " + orjson.dumps({**frame, "choices": choices, **usage, **more}) + b"\n\n"

    def frame(self, exchange: Exchange, name: str) -> dict[str, Any]:
        return {"id": exchange.id, "object": name, "created": exchange.created, "model": exchange.model}
