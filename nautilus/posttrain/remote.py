"""Ray for rollouts: the cluster of RAY_ADDRESS, or one for this run alone, on the loopback."""

from __future__ import annotations

import atexit
import contextlib
from typing import Any

from nautilus.runtime import UserError, installing


def connected(actors: int) -> Any:
    """The library, connected until this process ends; UserError where it is not installed or does not start."""
    try:
        from nautilus.serve.scale.cluster import connected as connect
    except ImportError as bad:
        raise UserError(f"actors={actors} need the library {bad.name!r}; {installing('rl')}") from bad
    ending = contextlib.ExitStack()
    ray = connect(ending, actors)
    atexit.register(ending.close)
    return ray
