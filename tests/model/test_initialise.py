import dataclasses
import math

import pytest
import torch

from nautilus.config import Attention, Experts, Mamba, Mlp, lay
from nautilus.model.language import Language
from nautilus.presets import preset, shrink

STD = 0.02
KINDS = (
    Mamba(heads=32, head_width=8, state=32, groups=2),
    Attention(heads=4, groups=2, head_width=24, head_norm=True),
    Experts(experts=8, active=2, hidden=48, shared=64, latent=40),
    Mlp(hidden=128, gated=True),
)
CONFIG = dataclasses.replace(
    shrink(preset("toy"), width=96), layers=lay("ME*-L_", *KINDS), mtp=lay("*E", *KINDS), vocab=300, init_std=STD
)
DEPTH = 6


@pytest.fixture(scope="module")
def weights():
    return Language(CONFIG).initialise(7).state_dict()


def ends(weights, *names):
    found = {name: w for name, w in weights.items() if name.endswith(names)}
    assert found
    return found


def assert_normal(name, weight, std):
    """Mean and spread within five standard errors, and no more of a tail than a normal has."""
    count = weight.numel()
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * count), f"{name}: {weight.std():.4f}, not {std:.4f}"
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(count), name
    assert abs((weight.abs() < std).double().mean().item() - 0.6827) < 5 * math.sqrt(0.2166 / count), name


def test_matrices_are_normal_and_residual_outputs_narrower_by_the_root_of_the_depth(weights):
    outputs = ends(
        weights, "o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj", "linear.weight"
    )
    matrices = {n: w for n, w in weights.items() if w.ndim > 1 and "conv1d" not in n and n not in outputs}
    assert {"lm_head.weight", "backbone.embeddings.weight", "mtp.layers.0.eh_proj.weight"} < set(matrices)
    assert "backbone.layers.1.mixer.fc2_latent_proj.weight" in matrices and len(outputs) == 9
    for name, weight in matrices.items():
        assert_normal(name, weight, STD)
    for name, weight in outputs.items():
        assert_normal(name, weight, STD / math.sqrt(DEPTH))


def test_the_spread_is_the_configs_own_or_nine_tenths_over_the_root_of_the_width():
    for config, std in ((CONFIG, STD), (dataclasses.replace(CONFIG, init_std=0.0), 0.9 / math.sqrt(96))):
        assert_normal("embeddings", Language(config).initialise(0).backbone.embeddings.weight, std)


def test_norms_and_skips_are_one_and_load_balancing_biases_zero(weights):
    ones = ends(weights, "norm.weight", "norm_f.weight", "final_layernorm.weight", ".D")
    assert all(torch.equal(w, torch.ones_like(w)) for w in ones.values())
    assert not any(w.any() for w in ends(weights, "e_score_correction_bias").values())
    model = Language(CONFIG)
    for mixer in model.experts_mixers().values():
        mixer.load_E.fill_(3)
    assert not any(mixer.load_E.any() for mixer in model.initialise(0).experts_mixers().values())


def test_decay_rates_are_between_one_and_sixteen():
    values = torch.cat(
        [Language(CONFIG).initialise(s).state_dict()["backbone.layers.0.mixer.A_log"] for s in range(20)]
    )
    assert values.min() >= 0 and values.max() <= math.log(16)
    rates = values.exp()
    assert abs(rates.mean().item() - 8.5) < 5 * 15 / math.sqrt(12 * len(rates))  # uniform on [1, 16]
    assert rates.min() < 2 and rates.max() > 15


def test_steps_are_log_uniform_between_a_thousandth_and_a_tenth():
    name = "backbone.layers.0.mixer.dt_bias"
    values = torch.cat([Language(CONFIG).initialise(seed).state_dict()[name].double() for seed in range(20)])
    steps = torch.nn.functional.softplus(values)
    assert steps.min() >= 1e-3 * (1 - 1e-4) and steps.max() <= 0.1 * (1 + 1e-4)
    place = (steps / 1e-3).log() / math.log(100)
    assert abs(place.mean().item() - 0.5) < 5 / math.sqrt(12 * len(place))
    assert abs(place.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(place))


def bound_and_spread(weight, taps):
    bound = 1 / math.sqrt(taps)
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() - bound / math.sqrt(3)) < 5 * bound / math.sqrt(15 * weight.numel() / 2)


def test_convolutions_are_uniform_within_one_over_the_root_of_the_taps(weights):
    for name in ("weight", "bias"):
        bound_and_spread(weights[f"backbone.layers.0.mixer.conv1d.{name}"], 4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_convolutions_of_other_taps_are_uniform_within_their_own_bound(name):
    config = dataclasses.replace(CONFIG, layers=lay("M", dataclasses.replace(KINDS[0], taps=9)), mtp=())
    bound_and_spread(Language(config).initialise(0).state_dict()[f"backbone.layers.0.mixer.conv1d.{name}"], 9)


def test_one_seed_gives_the_same_bits_and_another_seed_others(weights):
    again, other = (Language(CONFIG).initialise(seed).state_dict() for seed in (7, 8))
    for name, weight in weights.items():
        assert torch.equal(again[name], weight), name
        assert torch.equal(other[name], weight) == bool(weight.std() == 0), name


def test_no_two_tensors_hold_the_same_numbers(weights):
    drawn = [w.flatten()[:8].tolist() for w in weights.values() if w.std() > 0]
    assert len({tuple(row) for row in drawn}) == len(drawn)


def test_a_tensor_depends_on_its_name_and_not_on_what_stands_around_it(weights):
    """Other layers before it, another vocabulary, no multi-token prediction: same bits."""
    layers = (KINDS[1], KINDS[2], KINDS[3], KINDS[3], KINDS[0], KINDS[1])
    other = dataclasses.replace(CONFIG, layers=layers, mtp=(), vocab=50)
    found = Language(other).initialise(7).state_dict()
    kept = [name for name in found if name in weights and found[name].shape == weights[name].shape]
    assert "backbone.layers.1.mixer.experts.up_proj" in kept and "backbone.layers.3.mixer.down_proj.weight" in kept
    for name in kept:
        assert torch.equal(found[name], weights[name]), name


def test_a_wider_or_narrower_dtype_holds_the_same_draw_rounded(weights):
    for dtype in (torch.bfloat16, torch.float64):
        for name, weight in Language(CONFIG, dtype=dtype).initialise(7).state_dict().items():
            assert torch.equal(weight.float(), weights[name].to(weight.dtype).float()), name


def after_seeding(action):
    torch.manual_seed(3)
    action()
    return torch.rand(4)


def test_nothing_is_drawn_from_the_global_generator():
    model = Language(shrink(preset("toy")))
    assert torch.equal(after_seeding(lambda: model.initialise(0)), after_seeding(lambda: None))


def test_building_a_model_draws_nothing_either():
    config = shrink(preset("toy"))
    assert torch.equal(after_seeding(lambda: Language(config)), after_seeding(lambda: None))
