"""The law of the house on the native path: a text gives the same bits however it is cut, and in any batch.

Held here for stacks of every layer that is native throughout; attention is not yet.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.config import Config, Experts, Mamba, Mlp, lay
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native

MAMBA = Mamba(heads=4, head_width=12, state=6, groups=2)
EXPERTS = Experts(experts=6, active=2, hidden=10, shared=14, latent=8, scale=2.5)
TIME = 75


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    if native().functions is None:
        pytest.skip(native().reason)
    layers = lay("MEM-E", MAMBA, EXPERTS, Mlp(hidden=22))
    model = Language(Config(vocab=50, width=20, layers=layers)).initialise(3).eval()
    model.compute = request.param
    return model


def tokens(rows, seed):
    return torch.randint(0, 50, (rows, TIME), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, TIME - 1), max_size=6), seed=st.integers(0, 99))
def test_any_cut_and_any_company_give_the_same_bits(model, cuts, seed):
    tokens_BT, state, parts = tokens(3, seed), None, []
    whole = model.head(model.hidden(tokens_BT)[0])
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), TIME], strict=True):
        hidden_BTD, state = model.hidden(tokens_BT[1:2, begin:end], state=state)
        parts.append(model.head(hidden_BTD))
    assert torch.equal(torch.cat(parts, 1)[0], whole[1])


def test_training_and_inference_give_the_same_bits(model):
    with torch.no_grad():
        want = model.head(model.hidden(tokens(2, 0))[0])
    assert torch.equal(model.train().head(model.hidden(tokens(2, 0))[0]), want)
    model.eval()
