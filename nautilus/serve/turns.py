"""An engine that works in the event loop itself, a step a turn: for whoever waits for its answers and does little else.

Two threads that hand over to each other, and that compete for the cores with those a model computes on, take as long as
a small model does. Rollouts between two updates of a trainer need none: while a step runs the loop stands still, and
between two steps it does what is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nautilus.serve.request import Piece, Request
from nautilus.serve.service import Service


class Turns(Service):
    """As Service, to be asked from its event loop only. An answer is told of when it is whole."""

    def start(self) -> None:
        self.news = asyncio.Event()
        self.working = self.loop.create_task(self.work())

    def order(self, order: Callable[[], None]) -> None:
        self.orders.append(order)
        self.news.set()

    async def work(self) -> None:
        while not self.closing:
            try:
                self.turn()
            except Exception as bad:
                self.give_up(bad)
            if self.engine.scheduler.idle and not self.orders:
                self.news.clear()
                await self.news.wait()
            else:
                await asyncio.sleep(0)
        self.finish()

    def rest(self) -> None:
        """`work` waits, not the turn."""

    def send(self, told: list[tuple[Request, Piece]], begun: list[Request]) -> None:
        whole = {request: None for request, piece in told if piece.finish_reason is not None}
        for request in begun:
            self.queued.pop(request, None)
        self.deliver([(request, piece) for request in whole for piece in request.pieces], [])

    async def close(self, seconds: float = 30.0) -> None:
        self.draining = self.closing = True
        self.news.set()
        await self.working
        self.looking.cancel()
