"""Work in threads that may be left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """A thread that does one thing after another; to start one for each takes longer than most things do. One that
    hangs is never idle again."""

    idle: deque[Worker] = deque()

    def __init__(self):
        self.orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self.run, daemon=True, name="worker").start()

    def run(self) -> None:
        while True:
            self.orders.get()()
            self.idle.append(self)


os.register_at_fork(after_in_child=Worker.idle.clear)  # a child has none of its parent's threads


async def in_a_thread(do: Callable[..., T], *given: Any) -> T:
    """What it gives, or raises; RuntimeError where it would have ended the program. Unlike those of `asyncio.to_thread`
    the thread keeps nobody waiting that has given it up, not even the end of the program."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def work() -> None:
        try:
            found, bad = do(*given), None
        except BaseException as raised:  # told to who waits; what would end the program is an error like any other
            own = isinstance(raised, Exception)
            found, bad = None, raised if own else RuntimeError(f"{type(raised).__name__}: {raised}")
        with contextlib.suppress(RuntimeError):  # of a loop that has ended meanwhile
            loop.call_soon_threadsafe(lambda: done.cancelled() or done.set_result((found, bad)))

    try:
        worker = Worker.idle.pop()
    except IndexError:
        worker = Worker()
    worker.orders.put(work)
    found, bad = await done
    if bad is not None:
        raise bad
    return found
