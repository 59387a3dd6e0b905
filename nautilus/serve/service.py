"""An engine in a thread of its own, asked from an event loop.

The event loop never waits for the model, and the model never for a reader: orders go over in a queue, and what a step
gave comes back in one call. An answer that nobody waits for any more is cancelled at the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor

from nautilus.ops.cpu.library import leave_computing
from nautilus.runtime import UserError
from nautilus.serve.engine import Engine
from nautilus.serve.job import Busy, Draining, Job
from nautilus.serve.limits import engine_failed
from nautilus.serve.load import Load, arms_of
from nautilus.serve.request import Piece, Request
from nautilus.serve.watchdog import Watchdog

T = TypeVar("T")
log = logging.getLogger("nautilus.serve")
# Seconds for which pieces are collected before the event loop hears of them. A small model makes thousands of tokens a
# second, and to wake the loop for each takes longer than the token. First and last pieces are told at once.
TELL_EVERY = 0.002


class Reply:
    """The pieces of an answer, as they come: each turn of the iteration gives all that came since the one before.

    It ends after a piece with a finish_reason. An answer that ended in an error raises it after its last piece.
    """

    replica = "0"  # whose reply it is, where there are several

    def __init__(self, service: Service, request: Request):
        self.service, self.request = service, request
        self.arrived: list[Piece] = []
        self.news = asyncio.Event()
        self.over = False

    @property
    def prompt_tokens(self) -> int:
        return self.request.prompt

    @property
    def cached_tokens(self) -> int:
        return self.request.cached

    @property
    def drafted_tokens(self) -> int | None:
        """Tokens that drafts tried for it; None where the engine makes none."""
        return self.request.drafted if self.service.engine.speculation else None

    def deliver(self, piece: Piece) -> None:
        self.arrived.append(piece)
        self.news.set()

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> list[Piece]:
        if self.over:
            self.request.raise_error()
            raise StopAsyncIteration
        await self.news.wait()
        self.news.clear()
        pieces, self.arrived = self.arrived, []
        self.over = pieces[-1].finish_reason is not None
        return pieces

    async def aclose(self) -> None:
        """Cancels what has not ended."""
        if not self.over:
            self.over = True
            self.service.cancel(self.request)


class Service:
    """Replies of one engine to jobs of many. Make it inside a running event loop, and `close` it there.

    most_waiting, most_waiting_tokens: of prompts that have not begun; beyond them a job is refused (Busy).
    step_limit: seconds after which a step counts as hanging: until it ends after all, nothing new is taken.
    """

    def __init__(
        self, engine: Engine, *, most_waiting: int = 256, most_waiting_tokens: int = 1 << 20, step_limit: float = 300.0
    ):
        self.engine, self.most_waiting, self.most_waiting_tokens = engine, most_waiting, most_waiting_tokens
        self.loop = asyncio.get_running_loop()
        self.orders: deque[Callable[[], None]] = deque()
        self.wake = threading.Event()
        self.replies: dict[Request, Reply] = {}  # of the event loop
        self.queued: dict[Request, int] = {}  # tokens of prompts that have not begun, as far as the loop knows
        self.untold: list[tuple[Request, Piece]] = []
        self.told_at = 0.0
        self.warming: deque[Request] = deque(maxlen=64)
        self.steps, self.draining, self.closing = 0, False, False
        self.broken: BaseException | None = None
        self.watchdog = Watchdog(step_limit)
        self.looking = self.loop.create_task(self.watchdog.look())
        self.start()

    def start(self) -> None:
        leave_computing()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    # ----- in the event loop ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return not self.draining and self.broken is None and not self.watchdog.overdue

    def submit(self, job: Job) -> Reply:
        """UserError for a job that cannot be; Busy where too much waits; Draining at the end."""
        if not self.ready:
            raise Draining(f"the {'server is stopping' if self.draining else 'engine has stopped'}; ask another one")
        more = {
            name: getattr(job, name) for name in ("tenant", "priority", "marks", "kept", "prompt_logprobs", "answer")
        }
        request = self.engine.request(list(job.tokens), job.sampling, job.rules, **more)
        self.refuse_too_many(request)
        reply = self.replies[request] = Reply(self, request)
        self.queued[request] = request.prompt
        self.order(lambda: self.begin(request))
        return reply

    def warm(self, job: Job) -> None:
        """Read a prompt when there is nothing else to do, and keep its state after its marks, for requests to come.
        One that cannot be is dropped, as are the oldest of very many, and what is under way when a request comes that
        does not go on from it."""
        if self.engine.prefixes.saved is None:
            return
        with contextlib.suppress(UserError):
            fields = {"tenant": job.tenant, "marks": tuple(job.marks), "warm": True}
            request = self.engine.request(list(job.tokens), job.sampling, **fields)
            self.order(lambda: self.warming.append(request))

    def refuse_too_many(self, request: Request) -> None:
        waiting, tokens = len(self.queued), sum(self.queued.values())
        rows = self.engine.rows
        if waiting >= self.most_waiting + rows or (waiting and tokens + request.prompt > self.most_waiting_tokens):
            pace = self.engine.scheduler.seconds_per_token or 1e-3
            raise Busy(
                f"{waiting} requests of {tokens} tokens wait already, and at most {self.most_waiting} of "
                f"{self.most_waiting_tokens} may",
                retry_after=min(60.0, max(1.0, tokens * pace)),
            )

    def cancel(self, request: Request) -> None:
        self.replies.pop(request, None)
        self.queued.pop(request, None)
        self.order(lambda: self.engine.cancel(request))

    async def update(self, weights: Mapping[str, Tensor]) -> None:
        """As `Engine.update`, when the step under way has ended; answers under way go on. Back when it is done."""
        await self.between(lambda: self.engine.update(weights))

    async def between(self, do: Callable[[], T]) -> T:
        """What comes of it, done in the engine's thread between two steps."""
        if self.closing:
            raise Draining("something was to be done between two steps, but the engine has stopped")
        done: Future[T] = Future()

        def now() -> None:
            try:
                done.set_result(do())
            except Exception as bad:
                done.set_exception(bad)

        self.order(now)
        return await asyncio.wrap_future(done)

    def load(self) -> Load:
        scheduler, berths = self.engine.scheduler, self.engine.berths
        waiting, pages = [*scheduler.waiting], len(berths.pool.references)
        return Load(
            running=len(scheduler.active),
            waiting=len(waiting),
            waiting_tokens=sum(len(request.tokens) for request in waiting),
            slots=self.engine.rows - len(berths.slots),
            pages=1 - berths.pool.free() / max(1, pages),
            preempted=scheduler.preempted,
            steps=self.steps,
            arms=arms_of(self.engine),
        )

    def loads(self) -> dict[str, Load]:
        """By replica."""
        return {"0": self.load()}

    async def drain(self, seconds: float) -> bool:
        """Takes nothing new, and waits so long for what is under way. Whether all of it ended by itself."""
        self.draining, until = True, time.monotonic() + seconds
        while self.replies and time.monotonic() < until and self.broken is None:
            await asyncio.sleep(0.01)
        done = not self.replies
        for request in [*self.replies]:
            self.order(lambda request=request: self.end(request))
        return done

    async def close(self, seconds: float = 30.0) -> None:
        """Ends the thread; what is under way is cancelled. One that hangs is left to itself after so long."""
        self.draining = self.closing = True
        self.wake.set()
        await asyncio.to_thread(self.thread.join, seconds)
        self.looking.cancel()
        if self.thread.is_alive():
            log.error("the engine did not end within %g seconds; its thread is left behind", seconds)

    def deliver(self, told: list[tuple[Request, Piece]], begun: list[Request]) -> None:
        for request in begun:
            self.queued.pop(request, None)
        for request, piece in told:
            reply = self.replies.get(request)
            if reply is not None:
                reply.deliver(piece)
                if piece.finish_reason is not None:
                    del self.replies[request]
                    self.queued.pop(request, None)

    def abandon(self, bad: Exception) -> None:
        """Every reply ends with an error."""
        for request, reply in [*self.replies.items()]:
            request.error = request.error or engine_failed(bad)
            reply.deliver(Piece(text="", token=-1, logprob=0.0, finish_reason="error"))
        self.replies.clear()
        self.queued.clear()

    # ----- in the engine's thread -------------------------------------------------------------------------------------

    def order(self, order: Callable[[], None]) -> None:
        """Something to do between two steps; from any thread."""
        self.orders.append(order)
        self.wake.set()

    def run(self) -> None:
        while not self.closing:
            try:
                self.turn()
            except Exception as bad:
                self.give_up(bad)
        self.finish()

    def finish(self) -> None:
        while self.orders:
            with contextlib.suppress(Exception):  # of an engine that has failed, which has been told
                self.take_orders()
        for request in (*self.engine.scheduler.active, *self.engine.scheduler.waiting):
            self.end(request)

    def turn(self) -> None:
        self.wake.clear()
        self.take_orders()
        if self.engine.scheduler.idle:
            if not self.idle_work() and not self.orders:
                self.rest()
            return
        self.steps += 1
        with self.watchdog.step():
            told = self.engine.step()
        self.send(told, [*self.engine.scheduler.active])

    def rest(self) -> None:
        self.wake.wait()

    def give_up(self, bad: Exception) -> None:
        """What goes wrong at a request ends that request. This is something else, and would go wrong again."""
        log.error("the engine has failed and takes nothing new", exc_info=bad)
        self.broken = bad
        self.warming.clear()
        for request in (*self.engine.scheduler.active, *self.engine.scheduler.waiting):
            request.error = engine_failed(bad)
            self.send([(request, self.engine.end(request, "error"))], [])
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.abandon, bad)

    def begin(self, request: Request) -> None:
        scheduler, prefixes = self.engine.scheduler, self.engine.prefixes
        # What is being read for this one, or for one that waits, goes on: they begin where it ends.
        if warm := [one for one in (*scheduler.active, *scheduler.waiting) if one.warm]:
            asking = [request, *(one for one in scheduler.waiting if not one.warm)]
        for other in warm:
            coming = {*prefixes.ahead(other)}
            if not any(prefixes.comes(one, coming) for one in asking):
                self.engine.cancel(other)
        self.engine.submit(request)

    def idle_work(self) -> bool:
        """Something that is only done when nobody waits; False where there is nothing."""
        if self.broken is not None:
            return False
        if self.warming:
            self.engine.submit(self.warming.popleft())
            return True
        return self.engine.prefixes.spill()

    def take_orders(self) -> None:
        while self.orders:
            self.orders.popleft()()

    def end(self, request: Request) -> None:
        if not request.finished:
            self.send([(request, self.engine.end(request, "cancelled"))], [])

    def send(self, told: list[tuple[Request, Piece]], begun: list[Request]) -> None:
        self.untold += told
        urgent = any(piece.finish_reason or len(request.pieces) == 1 for request, piece in told)
        now = time.monotonic()
        if not urgent and now < self.told_at + TELL_EVERY:
            return
        told, self.untold, self.told_at = self.untold, [], now
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self.loop.call_soon_threadsafe(self.deliver, told, begun)
