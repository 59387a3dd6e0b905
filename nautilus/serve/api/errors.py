"""What went wrong, as a client of OpenAI's API expects to hear it: {"error": {message, type, param, code}}, or of
Anthropic's: {"type": "error", "error": {type, message}}.

Messages of ours are written for the client. Whatever else goes wrong inside is told as "internal error"; what it was
stands in the server's log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import orjson
import pydantic
from fastapi import Response
from starlette.exceptions import HTTPException

from nautilus.runtime import UserError
from nautilus.serve.job import Busy, Draining, Lost
from nautilus.serve.sample import BrokenLogits

log = logging.getLogger("nautilus.serve.api")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ANTHROPIC = re.compile(r"(/v1)?/messages(/.*)?")  # paths of that API
PLACES = re.compile(r"(?<![\w/])/(?:[\w.@+-]+/)+[\w.@+-]*|\b0x[0-9a-fA-F]{4,}")
LONGEST = 2000  # characters of a message; it may quote what the client sent


class ApiError(Exception):
    """An answer that is an error. retry: seconds after which it is worth asking again."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry: float | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> Response:
        """As the API of this path says it."""
        body = self.anthropic_body if ANTHROPIC.fullmatch(path) else self.body
        headers = {} if self.retry is None else {"Retry-After": str(max(1, math.ceil(self.retry)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(orjson.dumps(body), self.status, headers, "application/json")


class ClientGone(ApiError):
    """Nobody reads the answer any more; 499 is what logs call it."""

    def __init__(self):
        super().__init__(499, "the client has closed the connection")


def described(bad: BaseException) -> ApiError:
    """Any exception as an error for the client."""
    match bad:
        case ApiError():
            return bad
        case Busy():
            return ApiError(429, "the server is busy; try again later", code="busy", retry=bad.retry_after)
        case Draining():
            return ApiError(503, "the server takes nothing new; ask another one", code="draining", retry=5)
        case Lost():
            return ApiError(503, "what worked at this answer has failed; ask again", code="lost", retry=5)
        case BrokenLogits():
            log.error("%s", bad)
            return ApiError(500, "the model could not go on with this answer", code="engine_error")
        case UserError():
            message, named = sanitised(str(bad)), re.match(r"sampling\.(\w+)=", str(bad))
            return ApiError(400, message.removeprefix("sampling."), param=named[1] if named else None)
        case HTTPException(status_code=404):
            return ApiError(404, "nothing is at this path; ask for /v1/models, /v1/chat/completions …", code="404")
        case HTTPException(status_code=405):
            other = (bad.headers or {}).get("Allow", "another one")
            return ApiError(405, f"this path is not asked in this way; use the method {other}", code="405")
        case HTTPException():
            return ApiError(bad.status_code, str(bad.detail), code=str(bad.status_code))
        case asyncio.TimeoutError():
            return ApiError(408, "the request took longer than this server allows", code="timeout")
    log.error("a request failed", exc_info=bad)
    return ApiError(500, "internal error; the server's log says more", code="internal_error")


def misfit(bad: pydantic.ValidationError, asked: Any) -> ApiError:
    """A field that is not as it should be. Where several types were tried, the one that came furthest is told of."""
    faults = [
        (place(fault["loc"], asked), fault["msg"]) for fault in bad.errors(include_url=False, include_input=False)
    ]
    param, why = max(faults, key=lambda fault: fault[0].count("."))
    return ApiError(400, f"{param}: {why}" if param else why, param=param or None, code="wrong_value")


def place(path: Sequence[Any], value: Any) -> str:
    """The path as far as it leads through what was sent: what follows names the types that were tried."""
    names = []
    for part in path:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            names.append(str(part))
            value = value[part]
        elif isinstance(value, dict) and not names:
            return str(part)  # a field that is missing
        elif isinstance(value, dict) and part == path[-1]:
            names.append(str(part))
    return ".".join(names)


def sanitised(text: str) -> str:
    """Without places of this machine: file paths and addresses."""
    return PLACES.sub("…", text)[:LONGEST]
