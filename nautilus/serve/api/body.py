"""Bodies of requests, read within limits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import orjson
from fastapi import Request

from nautilus.serve.api.errors import ApiError, ClientGone
from nautilus.serve.api.settings import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request. ApiError 413 for one that is too long, 408 for one that comes too slowly, 415 for
    another type: a page in a browser may send forms and plain text anywhere, but not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the content type is {kind[:80]!r}; send JSON with Content-Type: application/json")
    if int(request.headers.get("content-length", "0")) > limits.body:  # h11 has checked that it is a number
        raise too_long(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.sending):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limits.body:
                    raise too_long(limits)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError as bad:
        raise ApiError(408, f"the request did not arrive within {limits.sending:g} seconds", code="timeout") from bad


def too_long(limits: Limits) -> ApiError:
    return ApiError(413, f"the request is longer than {limits.body:,} bytes; send less", code="body_too_long")


def parsed(body: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object of a body. ApiError 400 for anything else, and for one that is too deep or too large."""
    try:
        with uncollected():
            value = orjson.loads(body)
    except orjson.JSONDecodeError as bad:
        raise ApiError(400, f"the request is not valid JSON: {bad}", code="invalid_json") from bad
    if not isinstance(value, dict):
        raise ApiError(400, f"the request is a JSON {type(value).__name__}; send an object", code="invalid_json")
    level, nodes, depth = [value], 1, 0
    while level := [part for part in level if isinstance(part, dict | list) and part]:
        depth += 1
        if depth > limits.depth:
            raise ApiError(400, f"the request has more than {limits.depth} levels; nest less", code="too_deep")
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
        nodes += len(level)
        if nodes > limits.nodes:
            raise ApiError(400, f"the request has more than {limits.nodes:,} values; send less", code="too_many_values")
    return value


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage: in millions of lists it would again and again, and nobody else could do
    anything meanwhile."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def at_most(limit: int, count: int, name: str) -> None:
    if count > limit:
        raise ApiError(400, f"{name}: {count} were sent, at most {limit} are allowed", param=name, code="too_many")
