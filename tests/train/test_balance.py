import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautilus.train.balance import experts_mixers, max_violation, take_loads, update_biases
from nautilus.train.loop import fit
from nautilus.train.objective import next_token, pretrain
from nautilus.train.optim import OptimConfig, adamw
from nautilus.train.ranks import ALONE


def first_mixer(model):
    return model.backbone.layers[1].mixer


def test_the_bias_moves_by_gamma_towards_the_experts_chosen_too_rarely(small_model):
    model = small_model()
    bias = first_mixer(model).gate.bias
    bias.fill_(0.5)
    loads = {name: torch.full((8,), 3.0) for name in experts_mixers(model)}
    loads["backbone.layers.1.mixer"] = torch.tensor([0.0, 1, 2, 3, 3, 4, 5, 6])
    update_biases(model, loads, gamma=1e-3)
    want = 0.5 + 1e-3 * torch.tensor([1.0, 1, 1, 0, 0, -1, -1, -1])
    torch.testing.assert_close(bias, want, rtol=0, atol=1e-7)
    assert not model.mtp.layers[1].mixer.gate.bias.any()


def test_gamma_zero_leaves_the_bias_alone(small_model):
    model = small_model()
    update_biases(model, {name: torch.arange(8.0) for name in experts_mixers(model)}, gamma=0.0)
    assert not any(mixer.gate.bias.any() for mixer in experts_mixers(model).values())


def test_the_bias_is_saved_but_neither_trained_nor_part_of_the_weights_of_experts(small_model, random_rows):
    model, batch = small_model(), random_rows()
    name = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    assert name in model.state_dict() and name not in dict(model.named_parameters())
    optimizer = adamw(model, OptimConfig())
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert first_mixer(model).gate.bias not in trained
    model.eval()
    plain, _ = model.hidden(batch.tokens)
    first_mixer(model).gate.bias.fill_(0.25)  # the same for all: the choice stays, so must everything else
    shifted, _ = model.hidden(batch.tokens)
    assert torch.equal(plain, shifted)


def test_loads_add_up_over_micro_batches_and_ranks_and_start_again_from_zero(small_model, random_rows):
    model, batch = small_model().train(), random_rows(rows=4, time=10)
    for part in (batch.take([0, 1, 2]), batch.take([3])):
        model.hidden(part.tokens)
    loads = take_loads(model, lambda load: 2 * load)
    active = first_mixer(model).layer.active
    assert loads["backbone.layers.1.mixer"].sum() == 2 * 4 * 10 * active
    assert loads["mtp.layers.1.mixer"].sum() == 0
    assert take_loads(model, ALONE.total)["backbone.layers.1.mixer"].sum() == 0


def test_fit_updates_the_bias_once_a_step_even_when_all_router_weights_are_frozen(small_model, random_rows):
    model, batch = small_model(), random_rows()
    for mixer in experts_mixers(model).values():
        mixer.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    micro_batches = [batch.take([0]), batch.take([1, 2, 3])]
    fit(model, [micro_batches], next_token, adamw(model, OptimConfig()), steps=1, balance=0.5)
    bias = first_mixer(model).gate.bias
    assert bias.any() and set(bias.abs().tolist()) <= {0.0, 0.5}, "one move, not one a micro-batch"
    frozen = "backbone.layers.1.mixer.gate.weight"
    assert torch.equal(before[frozen], dict(model.named_parameters())[frozen])
    assert not model.mtp.layers[1].mixer.gate.bias.any(), "a block that saw no token keeps its bias"


def test_the_bias_evens_out_a_lopsided_router(small_model, random_rows):
    model, batch = small_model(), random_rows(rows=8)
    first_mixer(model).gate.bias[0] = 1.0  # everybody goes to expert 0
    optimizer = adamw(model, OptimConfig(lr=0.0, min_lr=0.0))
    seen = []
    fit(
        model,
        [[batch]] * 60,
        next_token,
        optimizer,
        steps=60,
        balance=0.02,
        health_every=1,
        log=lambda metrics: seen.append(metrics["max_vio.1"]),
    )
    assert seen[0] == pytest.approx(8 / 3)
    assert seen[-1] < 1.25


@given(st.integers(1, 6), st.integers(2, 12), st.integers(1, 40), st.integers(0, 999))
def test_max_violation_lies_between_one_and_experts_over_active(active, experts, tokens, seed):
    active = min(active, experts)
    score = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    load = torch.bincount(score.topk(active).indices.flatten(), minlength=experts).float()
    assert 1 - 1e-6 <= max_violation(load) <= experts / active + 1e-5
    assert max_violation(torch.full((experts,), 3.0)) == 1


def test_one_expert_taking_every_token_is_the_largest_violation():
    assert max_violation(torch.tensor([10.0, 10, 0, 0, 0, 0])) == pytest.approx(6 / 2)


def test_the_sequence_loss_reaches_the_router_only_when_asked_for(small_model, random_rows):
    def router_gradient(aux_weight):
        model = small_model().train()
        terms, _ = pretrain(aux_weight=aux_weight)(model, random_rows())
        if "balance" in terms:
            terms["balance"][0].backward()
        assert not model.auxiliary, "a kept loss would keep the whole forward's graph"
        return first_mixer(model).gate.weight.grad

    assert router_gradient(0.1).any()
    assert router_gradient(0.0) is None
