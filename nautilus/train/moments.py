"""The optimiser's moments and the random generators' states as named tensors, to be saved and put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.runtime import UserError


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if value is not None
    }


def restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        kind, _, rest = path.partition(".")
        if kind == "optimizer":
            name, _, key = rest.rpartition(".")
            if name not in order:
                raise UserError(f"cannot resume: {name} was trained before and is not now; train the same parameters")
            state.setdefault(order.index(name), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states() -> dict[str, Tensor]:
    """The global generators. Nothing of ours draws from them, but a model or objective of the user's may."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda.")))
