"""A model that is widened for the evaluation of drafts says the same as before."""

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, lay
from nautilus.model.language import Language
from nautilus.model.state import place
from tests.benchmarks.program import program


@pytest.fixture(scope="module")
def speculation():
    with program("speculation") as module:
        yield module


@pytest.mark.parametrize("gated", [False, True])
def test_hidden_units_that_come_many_times_say_the_same(speculation, gated):
    mamba, attention = Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=2, groups=1, head_width=16)
    experts = Experts(experts=4, active=2, hidden=16, shared=16, gated=gated)
    block = () if gated else lay("*E", attention, experts)
    layers = lay("M*E-", mamba, attention, experts, Mlp(hidden=24, gated=gated))
    model = Language(Config(vocab=90, width=32, layers=layers, mtp=block)).initialise(1)
    wide = speculation.widened(model, 12)
    assert [getattr(layer, "hidden", 0) for layer in wide.config.layers] == [0, 0, 192, 288]
    assert [getattr(layer, "hidden", 0) for layer in wide.config.mtp] == ([] if gated else [0, 32])
    tokens_BT = torch.randint(90, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens_BT)[0], model(tokens_BT)[0], atol=1e-4, rtol=1e-4)
        hidden_BTD, _ = model.hidden(tokens_BT)
        if block:
            ahead_BTD = model.embed(tokens_BT)
            span = place(None, None, 2, 30, "cpu")
            torch.testing.assert_close(
                wide.mtp(hidden_BTD, ahead_BTD, span, None), model.mtp(hidden_BTD, ahead_BTD, span, None), atol=1e-4,
                rtol=1e-4,
            )  # fmt: skip


def test_each_target_is_of_its_kind(speculation):
    kinds = {name: {layer.letter for layer in config.layers} for name, config in speculation.targets().items()}
    assert kinds == {"hybrid": set("M*E"), "dense": set("M*-"), "llama": set("*-")}
    assert [bool(config.mtp) for config in speculation.targets().values()] == [True, False, False]
    assert set(speculation.TIMES) == set(kinds)
