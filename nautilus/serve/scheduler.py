"""Who runs next: requests wait, are read, and grow by a token at a time, until they are finished.

Whoever is behind comes first: by priority, then by how much their key has had, then whoever has least left to read,
less what it has waited already. Memory that runs out is taken from the last in this order; what that one had read it
reads again later. Neither the order nor the sizes of pieces change what is answered.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from nautilus.ops.pages import PAGE
from nautilus.serve.memory import Berths, pages_for
from nautilus.serve.request import Request

LEAST = PAGE  # tokens of a prompt that are read at a time, when others wait for theirs
TENANTS = 4096  # of which it is known what they have had; clients may name as many as they like
AGEING = 1000  # tokens of a prompt that a request may have more than another for every second it has waited longer


def payer(tenant: str) -> str:
    """Who has what a tenant has: a key, without the salt that stands behind it. Clients name salts as they like, and
    would else be new with every request."""
    return tenant.partition(":")[0]


class Served(Counter[str]):
    """Tokens that tenants have had, counted by who pays."""

    def __getitem__(self, tenant: str) -> int:
        return super().__getitem__(payer(tenant))

    def __setitem__(self, tenant: str, tokens: int) -> None:
        super().__setitem__(payer(tenant), tokens)


class Scheduler:
    """`waiting` have no memory yet; `active` have. grow: pages are taken as requests need them, not all at first."""

    def __init__(self, berths: Berths, *, chunk: int, step_seconds: float, grow: bool = True):
        self.berths, self.chunk, self.step_seconds, self.grow = berths, chunk, step_seconds, grow
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self.served = Served()
        self.seconds_per_token = 0.0  # of reading, as measured lately
        self.preempted = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.active

    def add(self, request: Request) -> None:
        """A tenant that comes back after a while has no claim to what it did not ask for meanwhile."""
        present = {payer(tenant) for tenant in {other.tenant for other in (*self.waiting, *self.active)}}
        if len(self.served) >= TENANTS:
            self.served = Served({tenant: self.served[tenant] for tenant in present})
        if payer(request.tenant) not in present and present:
            self.served[request.tenant] = max(
                self.served[request.tenant], min(self.served[tenant] for tenant in present)
            )
        self.waiting.append(request)

    def order(self, request: Request) -> tuple[float, ...]:
        left = request.unread - AGEING * (time.monotonic() - request.arrived)
        return request.priority, self.served[request.tenant], left

    def leave(self, request: Request) -> None:
        """It has no memory any more, and is not waited for."""
        (self.active if request in self.active else self.waiting).remove(request)
        if request.berth is not None:
            self.berths.give_back(request.berth)
            request.berth = None

    def in_order(self) -> list[Request]:
        """Those that wait."""
        return sorted(self.waiting, key=self.order)

    def pages_needed(self, request: Request) -> int:
        """To begin: those of its tokens and the next one, or, where requests cannot be put off, all it may come to."""
        return pages_for(len(request.tokens) + 1 if self.grow else request.limit)

    def begin(self, request: Request) -> None:
        """It has its berth."""
        self.waiting.remove(request)
        self.active.append(request)

    def put_off(self, request: Request) -> None:
        """It goes back to those who wait; its tokens stay."""
        self.leave(request)
        self.waiting.append(request)
        self.preempted += 1

    def last(self) -> Request:
        return max(self.active, key=self.order)

    def running(self) -> list[Request]:
        """Those that grow by a token now, in the order of their slots: the same ones stay in the same rows."""
        found = [request for request in self.active if not request.reading]
        return sorted(found, key=lambda request: request.berth.slot if request.berth else 0)

    def readings(self) -> Iterator[list[tuple[Request, int]]]:
        """Whose prompts are read next, in one call, and how many tokens of each, while the time of a step lasts. The
        caller reads. What is left of several is read together where that is little, but not of requests that are to be
        apart, nor where states are rounded when prompts end."""
        begin = time.monotonic()
        while reading := [request for request in self.active if request.reading]:
            first, *others = sorted(reading, key=self.order)
            room = self.room(self.step_seconds - (time.monotonic() - begin))
            batch = [(first, self.size(first, room))]
            for other in others if self.grow and not first.lonely else ():
                room -= batch[-1][1]
                size = self.size(other, self.chunk)
                if size > room or other.lonely:
                    break
                batch.append((other, size))
            yield batch
            if time.monotonic() - begin >= self.step_seconds:
                return

    def room(self, seconds: float) -> int:
        """Tokens that can be read in this time, at least a few, and not more than `chunk`."""
        if self.seconds_per_token and self.chunk * self.seconds_per_token > seconds:
            return min(self.chunk, max(LEAST, int(seconds / self.seconds_per_token) // PAGE * PAGE))
        return self.chunk

    def size(self, request: Request, room: int) -> int:
        """What is read of it at a time: not beyond a mark."""
        assert request.berth is not None
        at = request.berth.length
        return min([request.unread, room, *(mark - at for mark in request.marks if mark > at)])

    def measured(self, batch: Sequence[tuple[Request, int]], seconds: float) -> None:
        """So long it took to read these. Short pieces take longer for each token, so they say only that it takes less
        than thought: enough to come back from one long pause, after which all pieces would else stay short."""
        for request, size in batch:
            self.served[request.tenant] += size
        tokens = sum(size for _, size in batch)
        now = seconds / tokens
        if tokens >= 4 * LEAST or now < self.seconds_per_token:
            self.seconds_per_token = now if not self.seconds_per_token else 0.7 * self.seconds_per_token + 0.3 * now
