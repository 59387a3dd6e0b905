"""An answer as a response of OpenAI's newer API: an object with items, or numbered events that build one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import orjson

from nautilus.serve.api.answer import ChatChoice
from nautilus.serve.api.blocks import Block, Blocks, Step
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.exchange import Exchange, Stopped
from nautilus.serve.api.items import item_of, part_of
from nautilus.serve.api.kept import KeptResponses
from nautilus.serve.api.logprobs import LEAST
from nautilus.serve.request import Piece

IDS = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}
# How the events of a block's part, and of its text, are called.
PARTS = {"reasoning": "response.reasoning_part", "text": "response.content_part"}
TEXTS = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "call": "response.function_call_arguments",
}
STATES = {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}


@dataclass(kw_only=True, eq=False)
class ResponseForm:
    """talk: the messages so far, without instructions. echo: what the response repeats of its request. prompt: its
    tokens."""

    choice: ChatChoice
    kept: KeptResponses
    owner: str
    talk: list[dict]
    store: bool
    echo: dict[str, Any]
    prompt: Sequence[int]
    blocks: Blocks = field(default_factory=Blocks)
    number: int = 0  # of the next event
    exchange: Exchange | None = None  # where it is told as a stream
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    prefix: ClassVar[str] = "resp_"
    ping: ClassVar[bytes] = b": ping\n\n"

    # ----- as a form --------------------------------------------------------------------------------------------------

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        list(self.blocks.add(self.choice.deltas))
        return self.keep(self.response(exchange, STATES[self.choice.finish_reason or "stop"]))

    def open(self, exchange: Exchange) -> list[bytes]:
        self.exchange = exchange
        if self.store:
            self.kept.running[self.owner, exchange.id] = self
        begun = self.response(exchange, "in_progress")
        return [self.event(f"response.{name}", response=begun) for name in ("created", "in_progress")]

    def add(self, exchange: Exchange, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        steps = [*self.blocks.add(self.choice.take(pieces))]
        if self.choice.finish_reason:
            steps += self.blocks.end()
        return [one for step in steps for one in self.told(step)]

    def close(self, exchange: Exchange) -> list[bytes]:
        state = STATES[self.choice.finish_reason or "stop"]
        return [self.event(f"response.{state}", response=self.keep(self.response(exchange, state)))]

    def fail(self, exchange: Exchange, error: ApiError) -> list[bytes]:
        state = "cancelled" if isinstance(error, Stopped) else "failed"
        failed = self.response(exchange, state)
        if state == "failed":
            failed["error"] = {"code": error.code or "server_error", "message": error.message}
        return [self.event("response.failed", response=self.keep(failed))]

    # ----- while it runs ----------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self.exchange is None or self.exchange.ended

    def snapshot(self) -> dict[str, Any]:
        assert self.exchange is not None
        return self.response(self.exchange, "in_progress")

    def cancel(self) -> dict[str, Any]:
        assert self.exchange is not None
        self.exchange.stop.set()
        return self.response(self.exchange, "cancelled")

    # ----- what is told -----------------------------------------------------------------------------------------------

    def keep(self, response: dict[str, Any]) -> dict[str, Any]:
        if self.store:
            self.kept.keep(self.owner, response, [*self.talk, self.choice.message()])
        return response

    def response(self, exchange: Exchange, state: str) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if state == "incomplete" else None
        return {
            "id": exchange.id, "object": "response", "created_at": exchange.created, "status": state, "error": None,
            "incomplete_details": cut, "model": exchange.model,
            "output": [self.item(block) for block in self.blocks.all],
            "usage": None if state == "in_progress" else usage(exchange), "user": None, **self.echo,
        }  # fmt: skip

    def item(self, block: Block) -> dict[str, Any]:
        last = block is self.blocks.all[-1]
        cut = last and self.choice.finish_reason == "length"
        status = "incomplete" if cut else "completed" if block.done or self.choice.finish_reason else "in_progress"
        told = self.tokens() if last and self.choice.wanted.token_ids and self.choice.finish_reason else {}
        return {**item_of(block, self.id_of(block), status), **told}

    def tokens(self) -> dict[str, Any]:
        """Of the whole answer, on its last item: what it was drawn after, what was drawn, and each one's log-prob."""
        drawn = self.choice.pieces
        return {
            "prompt_token_ids": [*self.prompt], "generation_token_ids": [piece.token for piece in drawn],
            "generation_log_probs": [max(piece.logprob, LEAST) for piece in drawn],
        }  # fmt: skip

    def id_of(self, block: Block) -> str:
        return f"{IDS[block.kind]}{self.id}{block.index:04x}"

    def told(self, step: Step) -> Iterator[bytes]:
        block = step.block
        at = {"item_id": self.id_of(block), "output_index": block.index}
        inside = at if block.kind == "call" else {**at, "content_index": 0}
        if step.what == "grow":
            more = {"logprobs": []} if block.kind == "text" else {}
            yield self.event(f"{TEXTS[block.kind]}.delta", **inside, delta=step.text, **more)
        elif step.what == "begin":
            yield from self.begun(block, inside)
        else:
            yield from self.ended(block, inside)

    def begun(self, block: Block, inside: dict[str, Any]) -> Iterator[bytes]:
        empty = Block(block.kind, block.index, block.id, block.name)
        item = item_of(empty, self.id_of(block), "in_progress")
        yield self.event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            yield self.event(f"{PARTS[block.kind]}.added", **inside, part=part_of(empty))

    def ended(self, block: Block, inside: dict[str, Any]) -> Iterator[bytes]:
        if block.kind == "call":
            yield self.event(f"{TEXTS['call']}.done", **inside, name=block.name, arguments=block.text)
        else:
            more = {"logprobs": []} if block.kind == "text" else {}
            yield self.event(f"{TEXTS[block.kind]}.done", **inside, text=block.text, **more)
            yield self.event(f"{PARTS[block.kind]}.done", **inside, part=part_of(block))
        yield self.event("response.output_item.done", output_index=block.index, item=self.item(block))

    def event(self, kind: str, **more: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.number, **more}
        self.number += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def usage(exchange: Exchange) -> dict[str, Any]:
    told = exchange.usage()
    cached = told["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": told["prompt_tokens"], "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": told["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": told["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": told["total_tokens"],
    }  # fmt: skip
