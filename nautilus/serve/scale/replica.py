"""One replica: an engine with its service, in a process that Ray Serve starts, watches and starts again."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from ray import serve

from nautilus.serve.engine import Engine
from nautilus.serve.grammar import Source, compile_grammar
from nautilus.serve.job import Job
from nautilus.serve.load import Load
from nautilus.serve.request import Piece
from nautilus.serve.service import Service


@dataclass(frozen=True, kw_only=True)
class State:
    """Of one replica. rank: from 0, and again that of the one whose place it takes. The others: of its engine."""

    rank: int
    load: Load
    max_tokens: int
    vocab: int
    positions: int
    most_waiting: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """What came of an answer since the part before. cached: tokens of the prompt that were not read again. drafted:
    tokens that drafts have tried so far; None where there are no drafts."""

    rank: int
    cached: int
    drafted: int | None = None
    pieces: Sequence[Piece]


class Replica:
    """make: gives the engine of a rank; it is called in the replica's process, inside its event loop."""

    def __init__(self, make: Callable[[int], Engine]):
        self.rank = serve.get_replica_context().rank.rank
        self.service = Service(make(self.rank))

    async def answer(self, job: Job, grammars: Sequence[Source]) -> AsyncIterator[Part]:
        """The job's reply; when nobody reads it any more, it is cancelled. grammars: those of its rules."""
        tokenizer = self.service.engine.tokenizer
        rules = [await asyncio.to_thread(compile_grammar, tokenizer=tokenizer, **source) for source in grammars]
        reply = self.service.submit(dataclasses.replace(job, rules=rules))
        try:
            async for pieces in reply:
                told = {"cached": reply.cached_tokens, "drafted": reply.drafted_tokens}
                yield Part(rank=self.rank, pieces=pieces, **told)
        finally:
            await reply.aclose()

    async def warm(self, job: Job) -> None:
        self.service.warm(job)

    async def state(self) -> State:
        engine, config = self.service.engine, self.service.engine.model.config
        return State(
            rank=self.rank, load=self.service.load(), max_tokens=engine.max_tokens, vocab=config.vocab,
            positions=config.positions, most_waiting=self.service.most_waiting + engine.rows,
        )  # fmt: skip

    async def drain(self, seconds: float) -> bool:
        return await self.service.drain(seconds)

    def check_health(self) -> None:
        """Called by Ray Serve, which ends a replica that raises here and starts another in its place."""
        if self.service.broken is not None:
            raise RuntimeError("the engine has stopped") from self.service.broken
