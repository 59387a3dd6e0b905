"""Answers over a connection that may be slow or go away at any time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response

from nautilus.serve.api.errors import ClientGone
from nautilus.serve.api.exchange import Exchange
from nautilus.serve.api.metrics import Meters
from nautilus.serve.api.settings import Limits

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Result = TypeVar("Result")


async def gone(receive: Callable) -> None:
    """Waits until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Coroutine[Any, Any, Result], request: Request) -> Result:
    """The result of the work, which is cancelled, and ClientGone raised, when the client leaves before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await stop(working, leaving)


async def stop(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Events on their way to one client.

    They are taken from the exchange as they come, whatever the client does: a slow one pauses only itself, and what it
    has not read waits here. Beyond a limit, and when it leaves, the exchange is closed, which cancels the answer. When
    nothing came for a while, a ping keeps proxies from closing the connection.
    """

    def __init__(self, exchange: Exchange, limits: Limits, meters: Meters):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.exchange, self.source, self.limits, self.meters = exchange, exchange.events(), limits, meters
        self.waiting: list[bytes] = []
        self.more, self.ended, self.too_slow = asyncio.Event(), False, False

    async def __call__(self, scope, receive: Callable, send: Callable) -> None:
        # The exchange itself too: a source that was never asked for an event closes nothing.
        async with contextlib.aclosing(self.exchange), contextlib.aclosing(self.source):
            filling = asyncio.ensure_future(self.fill())
            leaving, sending = asyncio.ensure_future(gone(receive)), asyncio.ensure_future(self.deliver(send))
            try:
                await asyncio.wait({leaving, sending, filling}, return_when=asyncio.FIRST_COMPLETED)
                if not self.too_slow:
                    await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await stop(filling, leaving, sending)
        if self.too_slow:
            self.meters.slow.inc()
        elif not sending.cancelled() and (bad := sending.exception()):
            raise bad
        elif sending.cancelled():
            self.meters.gone.inc()

    async def fill(self) -> None:
        size = 0
        try:
            async for event in self.source:
                size = size + len(event) if self.waiting else len(event)
                self.waiting.append(event)
                self.more.set()
                if len(self.waiting) > self.limits.chunks or size > self.limits.chunk_bytes:
                    self.too_slow = True
                    return
        finally:
            self.ended = True
            self.more.set()

    async def deliver(self, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while self.waiting or not self.ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.ping):
                    await self.more.wait()
            self.more.clear()
            events, self.waiting = self.waiting, []
            if not events and self.ended:
                break
            try:
                async with asyncio.timeout(self.limits.stalled):
                    await send(
                        {
                            "type": "http.response.body",
                            "body": b"".join(events) or self.exchange.form.ping,
                            "more_body": True,
                        }
                    )
            except TimeoutError:
                self.too_slow = True
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
