"""One request of a client on its way: its jobs submitted together, their replies read as they come, and told in
the form of one API, as a JSON object or as a stream of events; measured, logged, and cancelled as soon as nobody waits
any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from nautilus.serve.api.errors import ApiError, ClientGone, described
from nautilus.serve.api.metrics import Meters
from nautilus.serve.api.settings import Limits
from nautilus.serve.job import Job
from nautilus.serve.request import Piece
from nautilus.serve.service import Reply, Service
from nautilus.serve.sources import PLAIN

log = logging.getLogger("nautilus.serve.api")


class Choice(Protocol):
    """One of the answers: what is made of its pieces."""

    finish_reason: str | None
    generated: int  # tokens
    reasoned: int  # of these, tokens of reasoning

    def open(self) -> list[dict]: ...  # what a stream begins with
    def add(self, pieces: Sequence[Piece]) -> list[dict]: ...  # what a stream goes on with
    def whole(self) -> dict: ...  # all of it, once it is finished


class Form(Protocol):
    """How one API tells of an answer: as one object, or as server-sent events."""

    @property
    def prefix(self) -> str: ...  # of ids
    @property
    def ping(self) -> bytes: ...  # what keeps a silent stream open
    def whole(self, exchange: Exchange) -> dict[str, Any]: ...
    def open(self, exchange: Exchange) -> list[bytes]: ...  # what a stream begins with
    def add(self, exchange: Exchange, index: int, pieces: Sequence[Piece]) -> list[bytes]: ...
    def close(self, exchange: Exchange) -> list[bytes]: ...
    def fail(self, exchange: Exchange, error: ApiError) -> list[bytes]: ...  # instead of close


class Stopped(ApiError):
    """A client asked for an end of this answer."""

    def __init__(self):
        super().__init__(409, "this answer was cancelled by a request of its client", code="cancelled")


@dataclass(kw_only=True)
class Exchange:
    """jobs and choices belong to each other one by one. finished is called when all has gone well."""

    service: Service
    limits: Limits
    meters: Meters
    form: Form
    id: str
    model: str
    jobs: Sequence[Job]
    choices: Sequence[Choice]
    finished: Callable[[], None] = lambda: None
    replies: list[Reply] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    accepted: int = 0  # tokens that a draft had foretold
    first: float | None = None  # when the first token came
    latest: float = 0.0
    stop: asyncio.Event = field(default_factory=asyncio.Event)  # set: the answer is to end now
    ended: bool = False

    async def submit(self) -> None:
        """All jobs or none; the errors of the service pass through."""
        try:
            for job in self.jobs:
                self.replies.append(self.service.submit(job))
        except BaseException:
            await self.aclose()
            raise
        self.meters.observe("request_params_n", len(self.jobs))
        self.meters.observe("request_params_max_tokens", self.jobs[0].sampling.max_tokens)

    async def aclose(self) -> None:
        """None of its jobs runs afterwards."""
        self.ended = True
        for reply in self.replies:
            await reply.aclose()

    @property
    def engine(self) -> str:
        """The replica that works at it, of several answers at the first."""
        return self.replies[0].replica if self.replies else "0"

    async def answer(self) -> dict[str, Any]:
        async with self.measured():
            async for index, pieces in self.pieces():
                self.choices[index].add(pieces)
            self.finished()
        return self.form.whole(self)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events. An error is the last of them."""
        try:
            async with self.measured():
                for event in self.form.open(self):
                    yield event
                async for index, pieces in self.pieces():
                    for event in self.form.add(self, index, pieces):
                        yield event
                last = self.form.close(self)
                self.finished()
        except Exception as bad:
            last = self.form.fail(self, described(bad))
        for event in last:
            yield event

    def usage(self) -> dict[str, Any]:
        # Answers to one prompt count it once.
        prompts = {id(job.tokens): reply for job, reply in zip(self.jobs, self.replies, strict=True)}.values()
        prompt, generated = sum(reply.prompt_tokens for reply in prompts), sum(c.generated for c in self.choices)
        details = {"reasoning_tokens": sum(c.reasoned for c in self.choices)}
        drafted = [reply.drafted_tokens for reply in self.replies if reply.drafted_tokens is not None]
        if drafted:
            wrong = max(0, sum(drafted) - self.accepted)
            details |= {"accepted_prediction_tokens": self.accepted, "rejected_prediction_tokens": wrong}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in prompts)},
            "completion_tokens_details": details,
        }

    async def pieces(self) -> AsyncGenerator[tuple[int, list[Piece]], None]:
        """Those of all replies as they come, until each has told its finish_reason. For one that fails, the exception
        that its reply raises next, else an ApiError."""
        async with contextlib.aclosing(merged(self.replies, self.left, self.stop)) as arriving:
            async for index, pieces in arriving:
                self.time(pieces)
                self.accepted += sum(piece.source != PLAIN for piece in pieces)
                reason = pieces[-1].finish_reason if pieces else None
                if reason == "cancelled":
                    raise ApiError(503, "the server ended this answer; ask again", code="cancelled", retry=5)
                if reason != "error":
                    yield index, pieces
        if not all(choice.finish_reason for choice in self.choices):
            raise ApiError(500, "the model could not go on with this answer", code="engine_error")

    def left(self) -> float:
        """Seconds that this request has now."""
        limit = self.limits.first if self.first is None and self.limits.first else self.limits.seconds
        return max(0.0, self.began + limit - time.monotonic())

    def time(self, pieces: Sequence[Piece]) -> None:
        now, count = time.monotonic(), sum(piece.token >= 0 for piece in pieces)
        if self.first is None and count:
            self.first = now
            self.meters.observe("time_to_first_token_seconds", now - self.began, self.engine)
        elif count:
            for _ in range(count):
                self.meters.observe("inter_token_latency_seconds", (now - self.latest) / count, self.engine)
        self.latest = now

    @contextlib.asynccontextmanager
    async def measured(self):
        """Inside, the replies are read. Afterwards none of them runs any more, and it is known how it went."""
        ended = "error"
        try:
            yield
            ended = self.choices[0].finish_reason or "error"
        except (asyncio.CancelledError, GeneratorExit, ClientGone):
            ended = "abort"
            raise
        finally:
            await self.aclose()
            self.record(ended)

    def record(self, ended: str) -> None:
        usage, now, meters = self.usage(), time.monotonic(), self.meters
        prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        generated, engine = usage["completion_tokens"], self.engine
        for name, amount in {
            "prompt_tokens": prompt, "prompt_tokens_cached": cached, "prefix_cache_queries": prompt,
            "prefix_cache_hits": cached, "generation_tokens": generated,
        }.items():  # fmt: skip
            meters.count(name, amount, engine)
        meters.observe("request_prompt_tokens", prompt, engine)
        meters.observe("request_generation_tokens", generated, engine)
        meters.observe("e2e_request_latency_seconds", now - self.began, engine)
        if self.first is not None:
            meters.observe("request_decode_time_seconds", self.latest - self.first, engine)
            each = max(1, generated - len(self.choices))
            meters.observe("request_time_per_output_token_seconds", (self.latest - self.first) / each, engine)
        meters.ended(ended, engine)
        waited = None if self.first is None else round(self.first - self.began, 4)
        line = {"id": self.id, "ended": ended, "prompt": prompt, "cached": cached, "generated": generated}
        log.info("%s", orjson.dumps({**line, "first": waited, "seconds": round(now - self.began, 4)}).decode())


async def merged(
    replies: Sequence[Reply], left: Callable[[], float], stop: asyncio.Event
) -> AsyncGenerator[tuple[int, list[Piece]], None]:
    """(number of the reply, its next pieces) as they come. TimeoutError where nothing came in the seconds left, Stopped
    where the event is set."""
    waiting = {asyncio.ensure_future(following(reply)): index for index, reply in enumerate(replies)}
    waiting[asyncio.ensure_future(stopped(stop))] = -1
    try:
        while len(waiting) > 1:
            done, _ = await asyncio.wait(waiting, timeout=left(), return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError
            for task in done:
                index = waiting.pop(task)
                if (pieces := task.result()) is not None:
                    waiting[asyncio.ensure_future(following(replies[index]))] = index
                    yield index, pieces
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def stopped(stop: asyncio.Event) -> None:
    await stop.wait()
    raise Stopped


async def following(reply: Reply) -> list[Piece] | None:
    """The next pieces, None after the last."""
    try:
        return await anext(reply)
    except StopAsyncIteration:
        return None
