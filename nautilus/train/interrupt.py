"""Stopping on request. The first SIGINT or SIGTERM asks for a stop, the second has its usual effect at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether, and by which signal, a stop was asked for; empty: not yet."""

    asked: str = ""


def leave(stop: Stop, step: int, where: object) -> NoReturn:
    saved = f"saved in {where}; the same command again goes on from there"
    raise SystemExit(f"stopped by {stop.asked} after step {step}; {saved}")


@contextlib.contextmanager
def stop_signals(listen: bool) -> Iterator[Stop]:
    """While inside and in the main thread, the first signal only sets `asked`. Without `listen` nothing changes."""
    stop = Stop()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = {number: signal.getsignal(number) for number in SIGNALS}

    def give_back():
        for number, handler in usual.items():
            signal.signal(number, handler)

    def ask(number, frame):
        stop.asked = signal.Signals(number).name
        give_back()
        # A handler may run inside a buffered write to stderr, where another one would raise. Ctrl-C may have ended who
        # reads it, such as `tee`.
        with contextlib.suppress(OSError):
            said = f"\n{stop.asked}: finishing this micro-batch, then saving; once more to exit at once\n"
            os.write(2, said.encode())

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        give_back()
