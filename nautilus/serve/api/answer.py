"""The pieces of one answer in a chat as what clients read: reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.api import logprobs
from nautilus.serve.request import Piece
from nautilus.serve.sources import Origins, Run, merged
from nautilus.serve.toolcalls import (
    AnswerStream,
    Arguments,
    CallClosed,
    CallOpened,
    Content,
    Delta,
    Reasoning,
    gather,
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is told of an answer. several: of more than one tool call."""

    logprobs: bool = False
    token_ids: bool = False
    sources: bool = False
    reasoning: bool = True
    several: bool = True


@dataclass
class ChatChoice:
    """One answer to a chat."""

    index: int
    wanted: Wanted
    tokenizer: Tokenizer
    parser: AnswerStream
    finish_reason: str | None = None
    generated: int = 0
    reasoned: int = 0
    stop: str | None = None  # the stop string that ended it
    deltas: list[Delta] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # those with a token
    told: int = 0  # of these, how many a stream has told of
    runs: list[Run] = field(default_factory=list)  # of what was told

    def __post_init__(self):
        self.origins = Origins() if self.wanted.sources else None

    def open(self) -> list[dict]:
        return [self.part({"role": "assistant", "content": ""}, [], None)]

    def add(self, pieces: Sequence[Piece]) -> list[dict]:
        deltas = self.take(pieces)
        parts = [
            self.part(shown, self.untold(), None, self.came(shown_in(delta)))
            for delta in deltas
            if (shown := spoken(delta)) is not None
        ]
        if self.finish_reason is not None:
            parts.append(self.part({}, self.untold(), self.finish_reason, self.came(None)))
        return parts

    def take(self, pieces: Sequence[Piece]) -> list[Delta]:
        """What they tell, and whether the answer has ended with them."""
        deltas = [delta for piece in pieces for delta in self.read(piece)]
        reason = pieces[-1].finish_reason if pieces else None
        if reason is not None:
            rest = self.parser.finish()
            deltas += rest
            if self.origins:
                self.origins.finish(filter(self.tells, rest))
        deltas = [delta for delta in joined(deltas) if self.tells(delta)]
        self.deltas += deltas
        if reason is not None:
            called = any(isinstance(delta, CallOpened) for delta in self.deltas)
            self.finish_reason, self.stop = "tool_calls" if called and reason == "stop" else reason, pieces[-1].stop
        return deltas

    def tells(self, delta: Delta) -> bool:
        if isinstance(delta, Reasoning):
            return self.wanted.reasoning
        return isinstance(delta, Content) or delta.index == 0 or self.wanted.several

    def read(self, piece: Piece) -> list[Delta]:
        deltas = self.parser.add(piece.text)
        if self.origins:
            self.origins.read(piece, filter(self.tells, deltas), self.parser.held)
        if piece.token >= 0:
            self.pieces.append(piece)
            self.generated += 1
            self.reasoned += self.parser.inside  # what ends a thinking block is not of the reasoning
        return deltas

    def untold(self) -> list[Piece]:
        pieces, self.told = self.pieces[self.told :], len(self.pieces)
        return pieces

    def came(self, characters: int | None) -> list[Run]:
        """Where the next of the text came from; None: all that is left."""
        runs = self.origins.take(characters) if self.origins else []
        self.runs += runs
        return runs

    def part(self, delta: dict, pieces: Sequence[Piece], reason: str | None, runs: Sequence[Run] = ()) -> dict:
        return {"index": self.index, "delta": delta, **self.details(pieces, runs), "finish_reason": reason}

    def details(self, pieces: Sequence[Piece], runs: Sequence[Run]) -> dict[str, Any]:
        told = logprobs.of_chat(pieces, self.tokenizer) if self.wanted.logprobs and pieces else None
        ids = {"token_ids": [piece.token for piece in pieces]} if self.wanted.token_ids else {}
        return {"logprobs": told, **ids, **({"nautilus": {"sources": runs}} if runs else {})}

    def whole(self) -> dict:
        message = {"refusal": None, **self.message()}
        if "reasoning_content" in message:
            message["reasoning"] = message["reasoning_content"]
        details = self.details(self.pieces, merged(self.runs))
        return {"index": self.index, "message": message, **details, "finish_reason": self.finish_reason}

    def message(self) -> dict[str, Any]:
        """The answer as a message of a conversation."""
        answer = gather(self.deltas)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        return message


def joined(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Neighbours of one kind as one."""
    last: Delta | None = None
    for delta in deltas:
        if isinstance(last, Reasoning | Content | Arguments) and continues(delta, last):
            last = replace(last, text=last.text + delta.text)  # type: ignore[union-attr]
            continue
        if last is not None:
            yield last
        last = delta
    if last is not None:
        yield last


def continues(delta: Delta, last: Delta) -> bool:
    return type(delta) is type(last) and getattr(delta, "index", None) == getattr(last, "index", None)


def shown_in(delta: Delta) -> int:
    """Characters of text."""
    return len(delta.text) if isinstance(delta, Reasoning | Content) else 0


def spoken(delta: Delta) -> dict[str, Any] | None:
    """As the delta of a chunk. Both names that clients have for reasoning are there."""
    match delta:
        case Reasoning(text):
            return {"reasoning_content": text, "reasoning": text}
        case Content(text):
            return {"content": text}
        case CallOpened(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case CallClosed():
            return None
