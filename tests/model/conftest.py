"""Shared by the tests of the model: small models in which no weight has a value that hides a mistake."""

import functools

import pytest
import torch

from nautilus.model.language import Language
from nautilus.presets import PRESETS, preset, shrink


def stirred(config, dtype=torch.float64, seed=0):
    """A model whose norms, skips and load-balancing biases differ from the ones and zeros they start at."""
    model = Language(config, dtype=dtype).initialise(seed).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias") or (tensor.ndim == 1 and not name.endswith("load_E")):
                tensor += 0.2 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
    return model


@functools.cache
def twin_of(name):
    """The shrunken twin of a preset in float64. Shared: tests that change it build their own."""
    return stirred(shrink(preset(name)))


@pytest.fixture(scope="session")
def stir():
    return stirred


@pytest.fixture(scope="session")
def twin():
    return twin_of


SAME_TWIN: dict = {}
for preset_name in PRESETS:
    SAME_TWIN.setdefault(shrink(preset(preset_name)), []).append(preset_name)


@pytest.fixture(
    scope="session", params=[n[0] for n in SAME_TWIN.values()], ids=["+".join(n) for n in SAME_TWIN.values()]
)
def name(request):
    """Every preset. Those that differ in size only have one and the same twin; it is tested once under all names."""
    return request.param
