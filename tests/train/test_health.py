import math

import pytest
import torch

from nautilus.train.balance import experts_mixers
from nautilus.train.health import gradient_health, load_health, residual_rms, role
from nautilus.train.loop import fit
from nautilus.train.objective import next_token, pretrain
from nautilus.train.optim import OptimConfig, adamw


def test_roles_name_the_layer_kind_and_the_weight(small_model):
    config = small_model().config  # MEM*
    assert role("backbone.embeddings.weight", config) == "embeddings"
    assert role("backbone.layers.0.mixer.in_proj.weight", config) == "mamba.in_proj"
    assert role("backbone.layers.2.mixer.A_log", config) == "mamba.A_log"
    assert role("backbone.layers.1.mixer.experts.up_proj", config) == "experts.up_proj"
    assert role("backbone.layers.1.mixer.shared_experts.up_proj.weight", config) == "experts.shared_experts.up_proj"
    assert role("backbone.layers.3.norm.weight", config) == "norm"
    assert role("mtp.layers.0.mixer.q_proj.weight", config) == "mtp.attention.q_proj"
    assert role("mtp.layers.0.eh_proj.weight", config) == "mtp.join"
    assert role("mtp.layers.1.norm.weight", config) == "norm"
    assert role("lm_head.weight", config) == "lm_head"


def test_gradient_norms_by_role_add_up_to_the_whole_and_zeros_are_counted(small_model, random_rows):
    model = small_model().train()
    batch = random_rows()
    terms, _ = pretrain(mtp_depths=1)(model, batch)
    sum(total for total, _ in terms.values()).backward()
    health = gradient_health(model, model.config)
    norms = [value for name, value in health.items() if name.startswith("grad_norm.")]
    whole = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert math.sqrt(sum(n * n for n in norms)) == pytest.approx(whole, rel=1e-5)
    unseen = 97 - len(batch.tokens.unique())
    assert health["zero_grad.embeddings"] == pytest.approx(unseen / 97)
    model.backbone.layers[0].mixer.in_proj.weight.grad.zero_()
    model.backbone.layers[2].mixer.in_proj.weight.grad[0] = 0
    rows = model.backbone.layers[0].mixer.in_proj.weight.shape[0]
    again = gradient_health(model, model.config)
    assert again["zero_grad.mamba.in_proj"] == pytest.approx((1 + 1 / rows) / 2)


def test_residual_sizes_are_those_of_a_forward_by_hand_and_leave_no_trace(small_model, random_rows):
    model, batch = small_model().train(), random_rows(documents=True)
    loads = [mixer.load_E.clone() for mixer in experts_mixers(model).values()]
    seen = residual_rms(model, batch)
    assert seen.keys() == {f"residual_rms.{i}" for i in range(4)}
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(a, m.load_E) for a, m in zip(loads, experts_mixers(model).values(), strict=True))
    last = []
    hidden, _ = model.hidden(batch.tokens, document_BT=batch.document, taps=[lambda i, x: last.append(x)])
    for i, residual in enumerate(last):
        assert seen[f"residual_rms.{i}"] == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-6)


def test_load_health_names_layers_counts_the_dead_and_skips_what_was_not_used():
    loads = {
        "backbone.layers.1.mixer": torch.tensor([6.0, 2, 0, 0]),
        "backbone.layers.4.mixer": torch.tensor([2.0, 2, 2, 2]),
        "mtp.layers.1.mixer": torch.zeros(4),
    }
    assert load_health(loads) == {"max_vio.1": 3.0, "max_vio.4": 1.0, "dead_experts": 2}
    assert load_health({}) == {}


def test_watching_health_changes_nothing_and_comes_every_so_many_steps(small_model, random_rows):
    def trained(every):
        model, lines = small_model(), []
        data = [[random_rows(seed=i)] for i in range(4)]
        fit(model, data, next_token, adamw(model, OptimConfig()), steps=4, health_every=every, log=lines.append)
        return model.state_dict(), lines

    plain, _ = trained(0)
    watched, lines = trained(3)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert ["residual_rms.0" in line for line in lines] == [True, False, False, True]
    assert all(isinstance(value, int | float) for line in lines for value in line.values())
