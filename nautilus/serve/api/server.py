"""An HTTP server around the application: its socket, its connections, its end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from types import FrameType

import orjson
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nautilus.runtime import UserError
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.settings import Limits

log = logging.getLogger("nautilus.serve.api")
HEAD_BYTES = 64 << 10  # of a request line and its headers


class Connection(H11Protocol):
    """One that has a limited time to say what it wants, and of which there are so many only."""

    limits = Limits()
    patience: asyncio.TimerHandle | None = None
    last: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.turn_away(transport)
        self.patience = self.loop.call_later(self.limits.idle, transport.close)
        self.last = self.loop.call_later(self.limits.stalled, self.look, transport)

    def look(self, transport: asyncio.Transport, closing: bool = False) -> None:
        """Who does not take the rest of a connection that is closed is not waited for: it would keep its place."""
        if closing:
            transport.abort()
        else:
            self.last = self.loop.call_later(self.limits.stalled, self.look, transport, transport.is_closing())

    def turn_away(self, transport: asyncio.Transport) -> None:
        body = orjson.dumps(ApiError(503, "too many connections; try again", code="connections").body)
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        transport.write(head.encode() + b"Retry-After: 1\r\nConnection: close\r\n\r\n" + body)
        transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete  # for the rest of the head of a request
        if not waits and self.patience is not None:
            self.patience.cancel()
            self.patience = None
        elif waits and self.patience is None:
            self.patience = self.loop.call_later(self.limits.idle, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.patience, self.last):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """SIGTERM and Ctrl-C let answers finish for up to `grace` seconds, and end the rest; a second one ends them now."""

    def __init__(self, app: FastAPI, *, limits: Limits, grace: float):
        http = type("LimitedConnection", (Connection,), {"limits": limits})
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.idle,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_graceful_shutdown=5,
            )  # fmt: skip
        )
        self.service, self.grace = app.state.context.service, grace
        self.draining: asyncio.Task | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Called by a signal, between any two steps of the program."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.end)
        else:
            self.should_exit = True

    def end(self) -> None:
        grace = self.grace if self.draining is None else 0
        if self.draining is not None:
            self.draining.cancel()
        log.warning("no new requests; those that run have %g seconds, or until the next signal", grace)
        self.draining = asyncio.ensure_future(self.drain(grace))

    async def drain(self, grace: float) -> None:
        await self.service.drain(grace)
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where that cannot be."""
    try:
        if not 0 <= port < 1 << 16:  # the system would take its last 16 bits
            raise OverflowError("a port is 0 to 65535")
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen(512)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError, UnicodeError) as bad:
        taken = isinstance(bad, OSError) and bad.errno == errno.EADDRINUSE
        why = "something else listens there" if taken else getattr(bad, "strerror", None) or str(bad)
        advice = "choose another port, or 0 for any that is free" if taken else "choose another host or port"
        raise UserError(f"cannot listen at host={host} port={port}: {why}; {advice}") from bad
    return listening


def address(host: str, listening: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
