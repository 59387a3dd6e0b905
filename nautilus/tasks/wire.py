"""Requests to environments of others. Whatever keeps one from answering is a broken grader."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from http.cookies import SimpleCookie
from typing import Any

from nautilus.runtime import UserError, installing
from nautilus.tasks.task import GraderBroken

SECONDS = 30.0  # that an answer may take


@functools.cache
def client() -> Any:
    """One for all, with the connections that it keeps; it remembers no cookies. UserError without the library."""
    try:
        import httpx
    except ImportError as bad:
        raise UserError(f"environments of others are asked with the library httpx; {installing('rl')}") from bad
    none = CookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
    found = httpx.Client(timeout=SECONDS, cookies=none, limits=httpx.Limits(max_connections=None))
    atexit.register(found.close)
    return found


class Wire:
    """One conversation with a server: its address, and the cookies that it gave."""

    def __init__(self, url: str):
        self.url, self.cookies = url.rstrip("/"), SimpleCookie()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The response, whatever its status; GraderBroken where there is none."""
        headers = {"Cookie": "; ".join(f"{key}={one.coded_value}" for key, one in self.cookies.items())}
        try:
            answer = client().request(method, self.url + path, json=body, headers=headers if self.cookies else None)
        except Exception as bad:  # of any layer below, and of an address that is none
            raise GraderBroken(f"{method} {self.url}{path} got no answer: {type(bad).__name__} {bad}") from bad
        for cookie in answer.headers.get_list("set-cookie"):
            self.cookies.load(cookie)
        return answer

    def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The object that it answers; GraderBroken for anything else."""
        return self.read(self.ask(method, path, body))

    def read(self, answer: Any) -> dict[str, Any]:
        try:
            found = answer.raise_for_status().json()
        except Exception as bad:
            why = f"status {answer.status_code}, {answer.text[:300]!r}"
            raise GraderBroken(f"{answer.url} was answered with {why}") from bad
        if not isinstance(found, dict):
            raise GraderBroken(f"{answer.url} was answered with no object: {str(found)[:200]}")
        return found
