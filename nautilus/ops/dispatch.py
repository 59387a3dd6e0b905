"""Which implementation of an op runs, and why not the faster one. The only place that decides."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger("nautilus.ops")
_said: set[tuple[str, str, str]] = set()


class Impl(NamedTuple):
    """One way to compute an op. `accepts` gives None, or the reason why these inputs cannot be taken."""

    name: str
    function: Callable
    accepts: Callable[..., str | None] = lambda *args, **named: None


def choose(op: str, impls: tuple[Impl, ...], *args, **named) -> Callable:
    """The first implementation, fastest first, that accepts these inputs; the last one accepts everything.

    NAUTILUS_OPS=reference forces one by name, to bisect a question of numerics. A refusal is logged once; a forced
    implementation that refuses is a RuntimeError.
    """
    forced = os.environ.get("NAUTILUS_OPS")
    for impl in impls:
        if forced and impl.name != forced:
            continue
        reason = impl.accepts(*args, **named)
        if reason is None:
            return impl.function
        if forced:
            raise RuntimeError(f"{op}: '{forced}' was forced but {reason}")
        if (op, impl.name, reason) not in _said:
            _said.add((op, impl.name, reason))
            log.info("%s: not '%s', because %s", op, impl.name, reason)
    raise RuntimeError(f"{op}: no implementation named '{forced}'; have {[impl.name for impl in impls]}")
