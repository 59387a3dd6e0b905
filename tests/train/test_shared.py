"""Rows that begin alike are computed as whole rows are."""

import dataclasses
import math

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.train.policy import Correction, Surrogate, drawn_logprob, policy
from nautilus.train.replay import routes_of
from nautilus.train.shared import hidden_of

COMMON, OWN = 7, 5


def hybrid(dtype=torch.float32):
    mamba = Mamba(heads=4, head_width=8, groups=2, state=16, taps=4)
    attention = Attention(heads=4, groups=2, head_width=8)
    layers = lay("ME*M", mamba, attention, Experts(experts=6, active=2, hidden=16))
    return Language(Config(vocab=50, width=32, positions=64, layers=layers), dtype=dtype).initialise(3)


def batch(kind="several") -> Batch:
    """Two prompts of different lengths, five answers of different lengths."""
    rng = torch.Generator().manual_seed(5)
    alike, lengths, own = torch.tensor([4, 9, 4, 9, 9]), {4: 7, 9: 3 if kind == "several" else 7}, [5, 2, 3, 4, 1]
    prompts = {number: torch.randint(1, 50, (size,), generator=rng) for number, size in lengths.items()}
    tokens, document, weight = (torch.zeros(5, COMMON + OWN, dtype=torch.int64) for _ in range(3))
    for row, (number, count) in enumerate(zip(alike.tolist(), own, strict=True)):
        begin, end = COMMON - lengths[number], COMMON + count
        tokens[row, begin:COMMON] = prompts[number]
        tokens[row, COMMON:end] = torch.randint(1, 50, (count,), generator=rng)
        document[row, begin:end], weight[row, COMMON:end] = 1, 1
    draw = torch.randn(2, 5, COMMON + OWN, generator=rng)
    return Batch(
        tokens, {"policy": weight.float()}, document=document, advantage=draw[0], sampled_logprob=-draw[1].abs(),
        alike=alike, common=COMMON,
    )  # fmt: skip


def gradients(model, given):
    model.zero_grad()
    terms, _ = policy(Surrogate(correction=Correction(apart=math.inf)))(model, given)
    terms["policy"][0].backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["several", "equal lengths"])
def test_the_numbers_are_those_of_whole_rows(dtype, kind):
    model, given = hybrid(dtype), batch(kind)
    whole = dataclasses.replace(given, alike=None)
    own = given.document > 0
    torch.testing.assert_close(hidden_of(model, given)[own], hidden_of(model, whole)[own])
    mine, theirs = gradients(model, given), gradients(model, whole)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_same_bits(compute):
    """The engine's, which read the prompt once, are the trainer's; see also `mismatch` of every step."""
    pytest.importorskip("nautilus.ops.cpu.library").native().functions or pytest.skip("needs the native kernels")
    model, given = hybrid(), batch()
    model.compute = compute
    whole = drawn_logprob(model, dataclasses.replace(given, alike=None), "policy")
    assert torch.equal(drawn_logprob(model, given, "policy"), whole) and whole.abs().sum() > 1


def test_shared_tokens_pass_once():
    model, given, seen = hybrid(), batch(), []
    model.backbone.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[:2]))
    hidden_of(model, given)
    assert seen == [(2, COMMON), (5, OWN)]


def test_experts_are_replayed_in_both_parts_and_rows_can_be_picked():
    model, given = hybrid(), batch("equal lengths")
    routes = routes_of(model, given.tokens).flip(-1)
    given = dataclasses.replace(given, routes=routes)
    for mixer in model.experts_mixers().values():
        mixer.gate.e_score_correction_bias += 3 * torch.randn(6, generator=torch.Generator().manual_seed(3))
    own = given.document > 0
    whole = hidden_of(model, dataclasses.replace(given, alike=None))
    torch.testing.assert_close(hidden_of(model, given)[own], whole[own])
    assert not torch.allclose(hidden_of(model, dataclasses.replace(given, routes=None))[own], whole[own])
    some = given.take([3, 0])
    torch.testing.assert_close(hidden_of(model, some)[own[[3, 0]]], whole[[3, 0]][own[[3, 0]]])


@pytest.mark.parametrize("setting", ["checkpointing", "chunk"])
def test_models_that_keep_no_state_compute_whole_rows(setting):
    model, given = hybrid().train(), batch()
    want = gradients(model, dataclasses.replace(given, alike=None))
    setattr(model, setting, 4)
    for name, gradient in gradients(model, given).items():
        torch.testing.assert_close(gradient, want[name])


def test_what_cannot_be_shared_is_refused():
    given = batch()
    with pytest.raises(ValueError, match="common=12 columns cannot be shared by rows of 12"):
        dataclasses.replace(given, common=COMMON + OWN)
    with pytest.raises(ValueError, match="alike has shape"):
        dataclasses.replace(given, alike=given.alike[:3])
