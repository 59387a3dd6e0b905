"""A model whose recurrent state is stored in fewer bits between calls."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.config import Config, Experts, Mamba, lay
from nautilus.model.language import Language
from nautilus.model.state import MambaState, StoredMamba
from nautilus.ops.cpu.library import native
from nautilus.ops.state_format import KINDS, StateFormat, decode, encode
from nautilus.presets import preset, shrink

TIME, LOSSY = 12, [name for name in KINDS if name != "fp32"]
FP16_SR = StateFormat(name="fp16_sr", seed=4)
few = settings(max_examples=12, deadline=None)
# Torch adds in another order in another batch.
on_native = pytest.mark.skipif(native().functions is None, reason=native().reason)


def tokens(rows, time=TIME, seed=0):
    return torch.randint(0, 97, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """Layers whose rows have the same bits alone and in any batch: Mamba and experts."""
    mamba = Mamba(heads=4, head_width=12, state=6, groups=2)
    experts = Experts(experts=6, active=2, hidden=10, shared=14, latent=8, scale=2.5)
    config = Config(vocab=97, width=20, layers=lay("MEM", mamba, experts))
    return Language(config).initialise(3).eval()


def step_by_step(model, tokens_BT, format, document_BT=None):
    """Logits of tokens fed one at a time, and the state after the last."""
    state, out = None, []
    for t in range(tokens_BT.shape[1]):
        document = None if document_BT is None else document_BT[:, t : t + 1]
        hidden_BTD, state = model.hidden(
            tokens_BT[:, t : t + 1], state=state, document_BT=document, state_format=format
        )
        out.append(model.head(hidden_BTD))
    return torch.cat(out, 1), state


@torch.no_grad()
def test_without_a_format_nothing_is_stored_otherwise_than_before(model):
    _, plain = model.hidden(tokens(2))
    _, named = model.hidden(tokens(2), state_format=StateFormat(name="fp32"))
    for state in (plain, named):
        assert [type(part) for part in state.layers] == [MambaState, type(None), MambaState]
        assert state.layers[0].ssm_BHPN.dtype == torch.float32
    assert torch.equal(plain.layers[2].ssm_BHPN, named.layers[2].ssm_BHPN)
    assert model.hidden(tokens(2))[1].layers[0].ssm_BHPN.requires_grad is False
    with torch.enable_grad():
        assert model.hidden(tokens(2))[1].layers[0].ssm_BHPN.requires_grad, "gradients flow through it as before"


@torch.no_grad()
@pytest.mark.parametrize("name", LOSSY)
def test_a_call_rounds_the_state_once_after_its_last_token(model, name):
    format = StateFormat(name=name, seed=4)
    want_BTD, exact = model.hidden(tokens(2))
    got_BTD, state = model.hidden(tokens(2), state_format=format)
    assert torch.equal(got_BTD, want_BTD)
    for layer in (0, 2):
        assert isinstance(state.layers[layer], StoredMamba)
        stored = encode(exact.layers[layer].ssm_BHPN, format, layer=layer, position_B=torch.tensor([TIME - 1]))
        assert torch.equal(decode(state.layers[layer].ssm), decode(stored))
        assert torch.equal(state.layers[layer].tail_BRC, exact.layers[layer].tail_BRC)
    after_BTD, _ = model.hidden(tokens(2, 3, seed=1), state=state)
    by_hand = [s if s is None else s.opened(torch.float32) for s in state.layers]
    exact = dataclasses.replace(exact, layers=tuple(by_hand))
    assert torch.equal(after_BTD, model.hidden(tokens(2, 3, seed=1), state=exact)[0])


@on_native
@torch.no_grad()
@pytest.mark.parametrize("name", ["fp16_sr", "int8_sr", "int8_ef"])
def test_a_row_gets_the_same_bits_alone_and_in_a_padded_batch(model, name):
    """Left padding moves a row to the right; what counts is the position in its own document."""
    format, pads = StateFormat(name=name, seed=4), [0, 3, 7]
    tokens_BT = tokens(3)
    document_BT = torch.tensor([[0] * pad + [1] * (TIME - pad) for pad in pads])
    together, state = step_by_step(model, tokens_BT, format, document_BT)
    for row, pad in enumerate(pads):
        alone, alone_state = step_by_step(model, tokens_BT[row : row + 1, pad:], format)
        assert torch.equal(together[row : row + 1, pad:], alone)
        for layer in (0, 2):
            picked = state.rows(torch.tensor([row])).layers[layer].ssm
            for got, want in zip(picked.tensors, alone_state.layers[layer].ssm.tensors, strict=True):
                assert torch.equal(got, want)


@on_native
@few
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=4), cut=st.integers(1, TIME - 1))
@torch.no_grad()
def test_rows_of_a_stored_state_go_on_as_they_would_have(model, rows, cut):
    index, tokens_BT = torch.tensor(rows), tokens(3)
    _, state = model.hidden(tokens_BT[:, :cut], state_format=FP16_SR)
    rest = tokens_BT[:, cut:]
    want, _ = model.hidden(rest, state=state, state_format=FP16_SR)
    got, later = model.hidden(rest[index], state=state.rows(index), state_format=FP16_SR)
    assert torch.equal(got, want[index]) and later.length == TIME
    again, _ = model.hidden(rest, state=state, state_format=FP16_SR)
    assert torch.equal(again, want), "the state passed in stays valid"


@torch.no_grad()
def test_two_layers_never_share_random_bits_and_a_seed_repeats_them(model):
    first, _ = step_by_step(model, tokens(1), FP16_SR)
    again, _ = step_by_step(model, tokens(1), FP16_SR)
    other, _ = step_by_step(model, tokens(1), StateFormat(name="fp16_sr", seed=5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    _, exact = model.hidden(tokens(1))
    alike = exact.layers[0].ssm_BHPN
    one, two = (encode(alike, FP16_SR, layer=layer, position_B=torch.tensor([TIME - 1])).codes_BHPN for layer in (0, 2))
    _, state = model.hidden(tokens(1), state_format=FP16_SR)
    assert torch.equal(state.layers[0].ssm.codes_BHPN, one) and not torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("name", LOSSY)
def test_every_format_stays_near_the_exact_model_and_saves_memory(name):
    """A hybrid with attention, in float64, so that all that differs is the state."""
    model = Language(shrink(preset("super")), dtype=torch.float64).initialise(0).eval()
    want, exact = step_by_step(model, tokens(2), StateFormat())
    got, state = step_by_step(model, tokens(2), StateFormat(name=name))
    far = {"fp16": 1e-3, "bf16": 1e-2, "int8": 2e-2, "fp8": 1e-1}[name.partition("_")[0]]
    error = (got - want).norm() / want.norm()
    assert 0 < error < far
    stored = [part.ssm.bytes for part in state.layers if isinstance(part, StoredMamba)]
    whole = [4 * part.ssm_BHPN.numel() for part in exact.layers if isinstance(part, MambaState)]
    assert len(stored) == len(whole) > 0 and sum(stored) < 0.7 * sum(whole)


def test_a_gradient_through_a_stored_state_is_refused(model):
    with pytest.raises(ValueError, match=r"state in fp16_sr: it has a gradient, .* torch.no_grad\(\)"):
        model.hidden(tokens(1), state_format=FP16_SR)
