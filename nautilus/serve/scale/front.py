"""Several replicas as one service: what an application asks of a Service, passed on to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve.job import Busy, Draining, Job, Lost
from nautilus.serve.load import Load, together
from nautilus.serve.prompt import Prompt, checked_prompt, prompt_tokens
from nautilus.serve.request import Piece
from nautilus.serve.scale.replica import State

WATCH = 1.0  # seconds between two looks at the replicas
PATIENCE = 10.0  # seconds for their answers


class Front:
    """What is asked of an engine without its model: the replicas hold that."""

    def __init__(self, tokenizer: Tokenizer, state: State):
        self.tokenizer, self.max_tokens, self.state = tokenizer, state.max_tokens, state

    def tokens(self, prompt: Prompt) -> list[int]:
        return prompt_tokens(prompt, self.tokenizer)


class RemoteReply:
    """A Reply from another process. Lost where that one ends before the answer does."""

    def __init__(self, front: Replicas, job: Job):
        self.front, self.over, self.begun = front, False, False
        self.prompt_tokens, self.cached_tokens, self.replica = len(job.tokens), 0, "0"
        self.drafted_tokens: int | None = None
        grammars = [rule.source for rule in job.rules]  # type: ignore[attr-defined]
        bare = dataclasses.replace(job, tokens=[*job.tokens], rules=())
        self.stream = front.answering.remote(bare, grammars)

    def __aiter__(self) -> RemoteReply:
        return self

    async def __anext__(self) -> list[Piece]:
        if self.over:
            raise StopAsyncIteration
        try:
            part = await anext(self.stream)
        except RayTaskError as bad:  # raised in the replica, where its own words are
            self.leave()
            raise bad.cause from None
        except (RayError, RayServeException) as bad:
            self.leave()
            raise Lost("the process that worked at this answer has ended") from bad
        except StopAsyncIteration:
            self.leave()
            raise
        self.begun, self.replica = True, str(part.rank)
        self.cached_tokens, self.drafted_tokens = part.cached, part.drafted
        return part.pieces

    def leave(self) -> None:
        self.over = True
        self.front.replies.discard(self)

    async def aclose(self) -> None:
        if not self.over:
            self.leave()
            self.stream.cancel()


class Replicas:
    """A Service of which the work is done elsewhere. Make it with `connected` in a running event loop."""

    broken = None  # a replica may be, and is replaced

    def __init__(self, handle: Any, tokenizer: Tokenizer, states: Mapping[str, State]):
        self.handle, self.states, self.draining = handle, states, False
        self.answering, self.warming = handle.options(stream=True).answer, handle.warm
        self.engine = Front(tokenizer, next(iter(states.values())))
        self.replies: set[RemoteReply] = set()
        self.watching = asyncio.ensure_future(self.watch())

    @classmethod
    async def connected(cls, handle: Any, tokenizer: Tokenizer) -> Replicas:
        return cls(handle, tokenizer, await states_of(handle))

    @property
    def ready(self) -> bool:
        return not self.draining and bool(self.states)

    def submit(self, job: Job) -> RemoteReply:
        """As a Service's. What only a replica can say against it, such as that it is busy, is raised by the reply."""
        if self.draining:
            raise Draining("the server is stopping; ask another one")
        if not self.states:
            raise Lost("no replica is up")
        state = self.engine.state
        checked_prompt(job.tokens, vocab=state.vocab, positions=state.positions, max_tokens=state.max_tokens)
        waiting, most = sum(not reply.begun for reply in self.replies), state.most_waiting * len(self.states)
        if waiting >= most:
            raise Busy(f"{waiting} requests wait already, and at most {most} may", retry_after=5)
        reply = RemoteReply(self, job)
        self.replies.add(reply)
        return reply

    def warm(self, job: Job) -> None:
        self.warming.remote(job)

    def load(self) -> Load:
        """Of all replicas together."""
        return together([*self.loads().values()])

    def loads(self) -> dict[str, Load]:
        return {rank: state.load for rank, state in self.states.items()}

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            with contextlib.suppress(TimeoutError):  # one hangs; Ray Serve ends those that do for long
                self.states = await states_of(self.handle)

    async def drain(self, seconds: float) -> bool:
        """Takes nothing new, and waits so long for what is under way; then the replicas end the rest. Whether nothing
        was left. They learn of it last: what was taken here may not have reached one yet, and it would refuse it."""
        self.draining, until = True, time.monotonic() + seconds
        while self.replies and time.monotonic() < until:
            await asyncio.sleep(0.01)
        done, asked = not self.replies, self.handle.broadcast("drain", 0.0)
        with contextlib.suppress(TimeoutError, RayServeException):
            await asked.results_async(timeout_s=PATIENCE, return_exceptions=True)
        return done

    async def close(self) -> None:
        self.draining = True
        self.watching.cancel()
        for reply in [*self.replies]:
            await reply.aclose()


async def states_of(handle: Any) -> dict[str, State]:
    """Of those that are up, by their ranks. TimeoutError where one of them does not say."""
    try:
        told = await handle.broadcast("state").results_async(timeout_s=PATIENCE, return_exceptions=True)
    except RayServeException:
        return {}
    states = sorted((one for one in told if isinstance(one, State)), key=lambda state: state.rank)
    return {str(state.rank): state for state in states}
