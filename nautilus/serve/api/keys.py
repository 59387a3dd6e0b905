"""Who may ask: keys, of which only hashes are held and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from nautilus.runtime import UserError, read_text
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.settings import Limits

SHORTEST = 16  # characters of a key
HASHED = re.compile(r"sha256:([0-9a-f]{64})")
OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH


class Keys:
    """With no keys at all, everybody may ask. A key's owner is known by the beginning of its hash."""

    def __init__(self, keys: Iterable[str] = ()):
        self.digests = [digest(key) for key in keys]

    def owner(self, key: str | None) -> str | None:
        """The name of whoever holds this key, "" where no key is needed, None for nobody. The time it takes depends
        neither on which key is like it nor on how far."""
        if not self.digests:
            return ""
        given, found = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).hexdigest(), None
        for known in self.digests:
            if hmac.compare_digest(given, known):
                found = known[:16]
        return found if key else None


def digest(key: str) -> str:
    hashed = HASHED.fullmatch(key)
    if not hashed and (len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError(
            f"an API key of {len(key)} characters was given; use at least {SHORTEST} printable ASCII characters without"
            " blanks, such as from `openssl rand -hex 32`, or its hash as sha256:HEX"
        )
    return hashed[1] if hashed else hashlib.sha256(key.encode()).hexdigest()


def keys_from(file: str) -> Keys:
    """One key, or sha256: and its hash, a line; empty lines and those that begin with # are left out."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"keys={file!r} was given, but there is no such file; write one key a line into it")
    lines = [line.strip() for line in read_text(path).splitlines()]
    keys = Keys(line for line in lines if line and not line.startswith("#"))
    if not keys.digests:
        raise UserError(f"keys={file!r} was given, but the file holds no key; write one a line")
    return keys


def others_may_read(file: str) -> bool:
    return bool(Path(file).stat().st_mode & OTHERS_MAY_READ)


class Quota:
    """What one key may do at a time and in a minute."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.running: defaultdict[str, int] = defaultdict(int)
        self.begun: defaultdict[str, deque[float]] = defaultdict(deque)

    @contextmanager
    def use(self, owner: str):
        """Inside, a request of this owner runs. ApiError 429 where that is one too many."""
        limits, now, begun = self.limits, time.monotonic(), self.begun[owner]
        while begun and begun[0] <= now - 60:
            begun.popleft()
        if limits.key_requests and self.running[owner] >= limits.key_requests:
            raise ApiError(429, f"{limits.key_requests} requests of this key run already", code="concurrency", retry=1)
        if limits.key_rate and len(begun) >= limits.key_rate:
            wait = begun[0] + 60 - now
            raise ApiError(429, f"this key may ask {limits.key_rate} times a minute", code="rate", retry=wait)
        if limits.key_rate:
            begun.append(now)
        self.running[owner] += 1
        try:
            yield
        finally:
            self.running[owner] -= 1
