"""Ray for rollouts: the cluster of RAY_ADDRESS, or one for this run alone, on the loopback."""

from __future__ import annotations

import atexit
import contextlib
from typing import Any

from nautilus.serve.scale.cluster import connected as connect


def connected(actors: int) -> Any:
    """The library, connected until this process ends; UserError where it is not installed or does not start."""
    ending = contextlib.ExitStack()
    ray = connect(ending, actors)
    atexit.register(ending.close)
    return ray
