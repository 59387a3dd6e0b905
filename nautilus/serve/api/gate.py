"""What every request passes first: the host it asks for, its key, and how often that key may ask."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.keys import Keys, Quota
from nautilus.serve.api.page import PAGE

OPEN = {"/health", "/health/ready", "/v1/health", "/v1/health/ready", "/ping"}
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable, Callable], Awaitable[None]]


class Gate:
    """An ASGI application around another one. `state.owner` of a request says whose it is.

    local_only: refuse requests for hosts of other names. Without keys a page in a browser could otherwise reach a
    server on the loopback through a name of its own that leads there.
    """

    def __init__(self, app: App, *, keys: Keys, quota: Quota, local_only: bool, rejected: Callable[[str], None]):
        self.app, self.keys, self.quota, self.local_only, self.rejected = app, keys, quota, local_only, rejected

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.check_host(headers)
            if scope["path"] in PAGE:  # it holds nothing of anybody, and asks for the key itself
                return await self.app(scope, receive, send)
            owner = self.owner(headers)
            scope.setdefault("state", {})["owner"] = owner
            with self.quota.use(owner):
                await self.app(scope, receive, send)
        except ApiError as bad:  # only of the gate: the application answers for its own
            self.rejected(bad.code or "")
            await bad.response(scope["path"])(scope, receive, send)

    def check_host(self, headers: dict[bytes, str]) -> None:
        if self.local_only and not LOCAL.fullmatch(host := headers.get(b"host", "")):
            raise ApiError(403, f"the host {host[:80]!r} is not this server's; ask for localhost", code="host")

    def owner(self, headers: dict[bytes, str]) -> str:
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        owner = self.keys.owner(key.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key"))
        if owner is None:
            raise ApiError(
                401, "no valid API key; send Authorization: Bearer KEY or x-api-key: KEY", code="invalid_api_key"
            )
        return owner
