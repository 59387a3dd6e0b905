"""Replicas on Ray Serve: started, and ended with the server.

Without RAY_ADDRESS in the environment Ray is started for this server alone: on the loopback, with a token that only its
processes know, without its dashboard. With it, the replicas run in the cluster that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError, installing
from nautilus.serve.engine import Engine

NAME = "nautilus"
STARTS = 2  # a machine that is busy may not bring it up in time
OBJECT_BYTES = 128 << 20  # shared memory for what processes pass on; prompts are small
# Ray reads these as it is imported. Its name for the second is that of the systems on which it is the default: with it
# every port that can be is bound to the loopback. Workers it would start as background work, at niceness 15.
OWN = {
    "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}  # fmt: skip


def work_with(
    make: Callable[[int], Engine], replicas: int, tokenizer: Tokenizer, work: Callable[[Any], Coroutine]
) -> None:
    """Run the coroutine that is made of a service of so many replicas; they are there as long as it runs.

    make: gives the engine of one, in its process, by its rank. UserError where they do not start.
    """
    if replicas < 1:
        raise UserError(f"replicas={replicas} were asked for; give 1 or more")

    async def connected_work(handle: Any) -> None:
        from nautilus.serve.scale.front import Replicas

        await work(await Replicas.connected(handle, tokenizer))

    with started(make, replicas) as handle:
        asyncio.run(connected_work(handle))


@contextlib.contextmanager
def started(make: Callable[[int], Engine], replicas: int) -> Iterator[Any]:
    """The handle of so many replicas."""
    with contextlib.ExitStack() as ending:
        ray = connected(ending, replicas)
        from ray import serve
        from ray.serve.config import ProxyLocation

        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // replicas)
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config={"log_level": "WARNING"})
        try:
            handle = serve.run(deployment(make, replicas, cpus), name=NAME, route_prefix=None)
        except RuntimeError as bad:
            reason = str(bad).strip().splitlines()[-1]
            raise UserError(f"replicas={replicas} were asked for, but they do not start: {reason}") from bad
        yield handle


def connected(ending: contextlib.ExitStack, replicas: int) -> Any:
    own = "RAY_ADDRESS" not in os.environ
    if own:
        for name, value in {**OWN, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
            os.environ.setdefault(name, value)
    try:
        import ray
        import ray.serve
    except ImportError as bad:
        raise UserError(f"several replicas need the library {bad.name or 'ray'!r}; {installing('scale')}") from bad
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    if not own:
        ray.init(**quiet)
        ending.callback(ray.shutdown)
        ending.callback(ray.serve.delete, NAME)
    else:
        place = tempfile.mkdtemp(prefix="nautilus-")  # which nobody else may enter
        ending.callback(shutil.rmtree, place, ignore_errors=True)
        cores = max(replicas, os.cpu_count() or 1)
        more = {"num_cpus": cores, "object_store_memory": OBJECT_BYTES, "include_dashboard": False, "_temp_dir": place}
        begin(ray, {**more, **quiet})
        ending.callback(ray.shutdown)  # which ends all of it
    return ray


def begin(ray: Any, how: dict[str, Any]) -> None:
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", **how)
            return
        except Exception as bad:  # Ray has no class of its own for processes that do not come up in 30 seconds
            ray.shutdown()
            if not left:
                raise UserError(f"Ray did not start; try again when less runs here ({bad})") from bad


def deployment(make: Callable[[int], Engine], replicas: int, cpus: int) -> Any:
    """cpus: of each; Ray also gives it so many threads."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from nautilus.serve.scale.replica import Replica
    from nautilus.serve.scale.router import PrefixRouter

    placed = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=100_000,  # a service refuses what is too much, and says when to come again
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": cpus},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),  # type: ignore[arg-type]
        logging_config={"log_level": "WARNING"},
    )
    return placed(Replica).bind(make)
