import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.config import (
    Attention,
    Config,
    Experts,
    Linear,
    Mamba,
    Mlp,
    Nothing,
    Rotary,
    from_dict,
    lay,
    to_dict,
    weight_count,
)
from nautilus.model.language import Language

SIZE = st.integers(1, 9)
ROTARY = st.builds(Rotary, theta=st.sampled_from([1e4, 5e5]), factor=st.sampled_from([1.0, 8.0]))
MAMBA = st.builds(
    lambda per, groups, width, state, taps: Mamba(
        heads=per * groups, groups=groups, head_width=width, state=state, taps=taps
    ),
    SIZE, SIZE, SIZE, SIZE, SIZE,
)  # fmt: skip
ATTENTION = st.builds(
    lambda per, groups, width, rotary, window, norm: Attention(
        heads=per * groups, groups=groups, head_width=2 * width, rotary=rotary, window=window, head_norm=norm
    ),
    SIZE, SIZE, SIZE, st.none() | ROTARY, st.integers(0, 5), st.booleans(),
)  # fmt: skip
EXPERTS = st.builds(
    lambda active, idle, hidden, shared, latent, gated: Experts(
        experts=active + idle, active=active, hidden=hidden, shared=shared, latent=latent, gated=gated
    ),
    SIZE, st.integers(0, 9), SIZE, st.integers(0, 5), st.integers(0, 5), st.booleans(),
)  # fmt: skip
MLP = st.builds(Mlp, hidden=SIZE, gated=st.booleans())
LAYER = st.one_of(MAMBA, ATTENTION, EXPERTS, MLP, st.just(Linear()), st.just(Nothing()))
CONFIGS = st.builds(
    Config,
    vocab=SIZE,
    width=SIZE,
    layers=st.lists(LAYER, min_size=1, max_size=5).map(tuple),
    mtp=st.lists(ATTENTION | EXPERTS, max_size=2).map(tuple),
    tied=st.booleans(),
    init_std=st.sampled_from([0.0, 0.02]),
    eos=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)


@given(config=CONFIGS)
def test_a_config_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


@given(one=CONFIGS, other=CONFIGS)
def test_fingerprints_are_equal_exactly_when_configs_are(one, other):
    assert (one.fingerprint == other.fingerprint) == (one == other)
    assert dataclasses.replace(one, positions=one.positions + 1).fingerprint != one.fingerprint


@settings(max_examples=40)
@given(config=CONFIGS)
def test_weights_are_those_of_the_model_built_on_no_device(config):
    count = weight_count(config)
    model = Language(config, device="meta")
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    assert (sum(sizes.values()) - mtp, mtp) == (count["main"], count["mtp"])
    assert all(tensor.device == torch.device("meta") for tensor in model.state_dict().values())


@given(config=CONFIGS, layer=LAYER)
def test_one_more_layer_adds_its_own_weights_wherever_it_stands(config, layer):
    def more(layers):
        return weight_count(dataclasses.replace(config, layers=layers))["main"] - weight_count(config)["main"]

    assert more((layer, *config.layers)) == more((*config.layers, layer))
    assert (more((layer, *config.layers)) > config.width) == (layer != Nothing())


@given(config=CONFIGS)
def test_active_weights_leave_out_idle_experts_and_the_embedding(config):
    count = weight_count(config)
    busy = tuple(
        dataclasses.replace(layer, active=layer.experts) if isinstance(layer, Experts) else layer
        for layer in config.layers
    )
    everything = weight_count(dataclasses.replace(config, layers=busy))["active"]
    assert everything == count["main"] - (0 if config.tied else config.vocab * config.width)
    assert 0 < count["active"] <= everything


def test_a_count_by_hand():
    config = Config(vocab=10, width=4, layers=lay("-*", Mlp(hidden=3), Attention(heads=2, groups=1, head_width=2)))
    ends = 10 * 4 * 2 + 4
    mlp, attention = 4 + 2 * 3 * 4, 4 + (2 + 2 + 1 + 1) * 2 * 4
    assert weight_count(config) == {"main": ends + mlp + attention, "mtp": 0, "active": ends + mlp + attention - 40}


def test_the_initial_deviation_follows_the_width_unless_it_is_given():
    config = Config(vocab=10, width=100, layers=(Linear(),))
    assert config.std == pytest.approx(0.09)
    assert dataclasses.replace(config, init_std=0.02).std == 0.02
    assert config.pattern == "L"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"vocab": 0}, "vocab=0"),
        ({"layers": (Linear(),) * 10_001}, "hold 10,001 layers; at most 10,000"),
        ({"width": 0}, "width=0"),
        ({"layers": ()}, "layers is empty"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"init_std": -1.0}, "init_std=-1.0"),
        ({"mtp": (Mlp(hidden=3),)}, r"mtp='-' may hold only attention"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**({"vocab": 10, "width": 4, "layers": (Linear(),)} | change))


@pytest.mark.parametrize(
    "values,message",
    [
        ({"vocab": 3, "width": 4, "layers": [{"kind": "L"}], "depth": 2}, "Config has no setting depth; it has bos"),
        ({"vocab": 3.5, "width": 4, "layers": [{"kind": "L"}]}, "vocab=3.5; a whole number"),
        ({"vocab": 3, "width": "4", "layers": [{"kind": "L"}]}, "width='4'; a whole number"),
        ({"vocab": 3, "width": 4, "tied": 1, "layers": [{"kind": "L"}]}, "tied=1; true or false"),
        ({"vocab": 3, "width": 4, "norm_eps": 10**400, "layers": [{"kind": "L"}]}, "norm_eps=1000.*; a finite number"),
        ({"vocab": 3, "width": 4, "eos": ["x"], "layers": [{"kind": "L"}]}, r"eos_token_id=\['x'\] must be token ids"),
        ({"vocab": 3, "width": 4, "layers": [{"kind": "-", "hidden": 2**62}]}, "hidden=4611686018427387904; a whole"),
        ({"vocab": 3, "layers": [{"kind": "L"}]}, "Config cannot be built .*width"),
        ({"vocab": 3, "width": 4, "layers": [{"kind": "X"}]}, "kind 'X'; known kinds are"),
        ({"vocab": 3, "width": 4, "layers": [{"kind": "-", "hiden": 3}]}, "Mlp has no setting hiden; it has"),
        (
            {"vocab": 3, "width": 4, "layers": [{"kind": "*", "heads": 2, "groups": 1, "rotary": {"base": 1}}]},
            "Rotary has no setting base",
        ),
    ],
)
def test_a_record_that_cannot_be_read_says_why(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)
