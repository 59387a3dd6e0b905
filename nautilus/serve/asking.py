"""Many questions to an engine, whose answers are taken as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from nautilus.serve.engine import Engine
from nautilus.serve.request import Request

Key = TypeVar("Key")


def answered(engine: Engine, questions: Iterable[tuple[Key, Request]]) -> Iterator[tuple[Key, Request]]:
    """Each when it has ended; what it ended with is raised if that was an error. Twice as many as run together are
    there, so that one that ends is followed at once; questions are taken only then. What is left at the end is
    cancelled."""
    running: dict[Request, Key] = {}
    waiting = iter(questions)
    try:
        while True:
            while len(running) < 2 * engine.rows and (one := next(waiting, None)) is not None:
                key, request = one
                engine.submit(request)
                running[request] = key
            if not running:
                return
            engine.step()
            for request in [each for each in running if each.finished]:
                request.raise_error()
                yield running.pop(request), request
    finally:
        for request in running:
            engine.cancel(request)
