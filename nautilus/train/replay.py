"""Router replay: the experts that wrote a token are those that learn from it.

Between an answer and the update that learns from it a router may change its mind, as weights move or as another engine
rounds otherwise; then other experts than those at work would be blamed or praised. So what was chosen is kept beside
the tokens, and chosen again in the trainer's forward (arXiv 2510.11370; Nemotron 3, where it may be switched on).

Letters: B rows, T time, L layers of experts of the trunk, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nautilus.model.language import Language
from nautilus.model.moe import ExpertsMixer

NONE = -1  # an expert that the trainer's own router chooses


def trunk(model: Language) -> list[ExpertsMixer]:
    """In the order of the layers, those of the prediction block left out."""
    return [mixer for name, mixer in model.experts_mixers().items() if not name.startswith("mtp.")]


@contextmanager
def replaying(model: Language, routes_BTLK: Tensor | None) -> Iterator[None]:
    """Forwards over whole rows inside take these experts; None: their own."""
    mixers = trunk(model) if routes_BTLK is not None else []
    try:
        for number, mixer in enumerate(mixers):
            assert routes_BTLK is not None
            mixer.given_RK = routes_BTLK[:, :, number].flatten(0, 1).long()
        yield
    finally:
        for mixer in mixers:
            mixer.given_RK = None


@torch.no_grad()
def routes_of(model: Language, tokens_BT: Tensor) -> Tensor:
    """The experts that the model has for these tokens, as it is now: (B, T, L, K) of int16."""
    mixers, was = trunk(model), model.training
    for mixer in mixers:
        mixer.chosen = []
    try:
        model.eval().hidden(tokens_BT)
        found = [mixer.chosen[0].unflatten(0, tokens_BT.shape) for mixer in mixers if mixer.chosen]
    finally:
        model.train(was)
        for mixer in mixers:
            mixer.chosen = None
    if not found:
        return torch.zeros(*tokens_BT.shape, 0, 0, dtype=torch.int16)
    return torch.stack(found, 2).to(torch.int16)
