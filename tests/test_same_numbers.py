"""The law of the house on the native path: a text gives the same bits however it is cut, and in any batch.

Held here for stacks of every layer that is native throughout, at every instruction level; gated experts are not yet.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, Rotary, lay
from nautilus.model.language import Language

MAMBA = Mamba(heads=4, head_width=12, state=6, groups=2)
EXPERTS = Experts(experts=6, active=2, hidden=10, shared=14, latent=8, scale=2.5)
ATTENTION = Attention(heads=4, groups=2, head_width=10)
RELATIVE = Attention(heads=6, groups=2, head_width=16, window=20, rotary=Rotary(), head_norm=True)
TIME = 75


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    layers = (*lay("MEM*-E", MAMBA, EXPERTS, ATTENTION, Mlp(hidden=22)), RELATIVE)
    model = Language(Config(vocab=50, width=20, layers=layers)).initialise(3).eval()
    for name, weight in model.named_parameters():
        # At first all scores are nearly 0: no query would prefer one key to another.
        weight.data *= 8 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
    model.compute = request.param
    return model


def tokens(rows, seed):
    return torch.randint(0, 50, (rows, TIME), generator=torch.Generator().manual_seed(seed))


def documents(rows, seed):
    """Numbers of documents, about three in a row."""
    begins = torch.rand(rows, TIME, generator=torch.Generator().manual_seed(seed)) < 2 / TIME
    return 1 + begins.long().cumsum(1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, TIME - 1), max_size=6), seed=st.integers(0, 99), packed=st.booleans())
def test_any_cut_and_any_company_give_the_same_bits(level, model, cuts, seed, packed):
    tokens_BT, state, parts = tokens(3, seed), None, []
    document_BT = documents(3, seed) if packed else None
    whole = model.head(model.hidden(tokens_BT, document_BT=document_BT)[0])
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), TIME], strict=True):
        document = None if document_BT is None else document_BT[1:2, begin:end]
        hidden_BTD, state = model.hidden(tokens_BT[1:2, begin:end], state=state, document_BT=document)
        parts.append(model.head(hidden_BTD))
    assert torch.equal(torch.cat(parts, 1)[0], whole[1])


def test_a_text_read_token_by_token_gives_the_same_bits(level, model):
    with torch.no_grad():
        whole, state, parts = model.head(model.hidden(tokens(2, 1))[0]), None, []
        for t in range(TIME):
            hidden_BTD, state = model.hidden(tokens(2, 1)[:, t : t + 1], state=state)
            parts.append(model.head(hidden_BTD))
    assert torch.equal(torch.cat(parts, 1), whole)


def test_training_and_inference_give_the_same_bits(level, model):
    with torch.no_grad():
        want = model.head(model.hidden(tokens(2, 0))[0])
    assert torch.equal(model.train().head(model.hidden(tokens(2, 0))[0]), want)
    model.eval()
