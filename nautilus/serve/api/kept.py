"""Responses that a client may ask for again or go on from: the last ones of each key, in memory only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import orjson

from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.settings import Limits


class Running(Protocol):
    """A response that is being written, unless it is over."""

    @property
    def over(self) -> bool: ...
    def snapshot(self) -> dict[str, Any]: ...
    def cancel(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Kept:
    """As JSON, so that what it takes is known: the response, and the messages of the conversation with its answer."""

    response: bytes
    talk: bytes

    @property
    def size(self) -> int:
        return len(self.response) + len(self.talk)


class KeptResponses:
    """Changed in the event loop only; other threads may read."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.owners: defaultdict[str, dict[str, Kept]] = defaultdict(dict)
        self.running: WeakValueDictionary[tuple[str, str], Running] = WeakValueDictionary()

    def keep(self, owner: str, response: dict[str, Any], talk: list[dict]) -> None:
        """The oldest ones give way. What is too large alone is not kept."""
        kept, mine = Kept(orjson.dumps(response), orjson.dumps(talk)), self.owners[owner]
        mine[response["id"]] = kept
        size = sum(one.size for one in mine.values())
        while len(mine) > self.limits.responses or size > self.limits.response_bytes:
            size -= mine.pop(next(iter(mine))).size

    def talk(self, owner: str, id: str) -> list[dict]:
        """ApiError 404 for a response that is not kept."""
        return orjson.loads(self.one(owner, id, "previous_response_id").talk)

    def response(self, owner: str, id: str) -> dict[str, Any]:
        running = self.now(owner, id)
        return running.snapshot() if running else orjson.loads(self.one(owner, id, "response_id").response)

    def cancel(self, owner: str, id: str) -> dict[str, Any]:
        """What has ended already stays as it is."""
        running = self.now(owner, id)
        return running.cancel() if running else self.response(owner, id)

    def now(self, owner: str, id: str) -> Running | None:
        running = self.running.get((owner, id))
        return None if running is None or running.over else running

    def one(self, owner: str, id: str, param: str) -> Kept:
        kept = self.owners[owner].get(id)
        if kept is None:
            raise ApiError(
                404, f"no response {id[:80]!r} is kept here: only the last ones of a key are, unless store=false",
                param=param, code="not_found",
            )  # fmt: skip
        return kept
