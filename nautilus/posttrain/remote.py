"""Ray for training: the cluster of RAY_ADDRESS, or one for this run alone, on the loopback; models on the way there."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from nautilus.model.language import Language
from nautilus.serve.scale.cluster import connected as connect


def connected(actors: int) -> Any:
    """The library, connected until this process ends; UserError where it is not installed or does not start."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return sys.modules["ray"]
    ending = contextlib.ExitStack()
    ray = connect(ending, actors)
    atexit.register(ending.close)
    return ray


def parts_of(model: Language) -> dict[str, Any]:
    """What makes it in another process."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return {"config": model.config, "compute": model.compute, "weights": weights}


def model_of(parts: Mapping[str, Any]) -> Language:
    """Not to be trained."""
    model = Language(parts["config"], device="meta").to_empty(device="cpu")
    model.load_state_dict(parts["weights"])
    model.compute = parts["compute"]
    return model.requires_grad_(False).eval()
