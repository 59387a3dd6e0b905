import dataclasses

import pytest

from nautilus.config import Attention, Experts, Mamba, Rotary, weight_count
from nautilus.presets import PRESETS, preset, shrink

# Exact where a published count is exact: the Lightning card and the Super verification card (arXiv 2604.12374).
EXACT = {
    "nano": (31_577_940_288, 0),
    "lightning": (31_577_940_288, 1_335_325_952),
    "super": (120_668_707_840, 2_942_325_248),
    "ultra": (549_308_993_536, 11_215_610_368),
}
# In billions, as the reports round them; the decimals say how far.
ROUNDED = {
    "nemotron_h_4b": "4.489",
    "nemotron_h_8b": "8.101",
    "nemotron_h_47b": "46.79",
    "nemotron_h_56b": "56.324",
    "nano_9b_v2": "8.888",
    "nano_12b_v2": "12.310",
    "nano_4b": "3.974",
    "llama_3_1_8b": "8.030",
}
# (layers, Mamba, experts, attention) and where attention stands.
SHAPES = {
    "nano": ((52, 23, 23, 6), [5, 12, 19, 26, 33, 42]),
    "lightning": ((52, 23, 23, 6), [5, 12, 19, 26, 33, 42]),
    "super": ((88, 40, 40, 8), [7, 16, 25, 36, 47, 58, 69, 78]),
    "ultra": ((108, 48, 48, 12), [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98]),
}
DEPTHS = {
    "nemotron_h_4b": 52,
    "nemotron_h_8b": 52,
    "nemotron_h_47b": 98,
    "nemotron_h_56b": 118,
    "nano_9b_v2": 56,
    "nano_12b_v2": 62,
    "nano_4b": 42,
    "llama_3_1_8b": 64,
}


@pytest.mark.parametrize("name", EXACT)
def test_parameter_counts_are_the_published_ones(name):
    count = weight_count(preset(name))
    assert (count["main"], count["mtp"]) == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameter_counts_round_to_the_published_ones(name):
    decimals = len(ROUNDED[name].split(".")[1])
    assert f"{weight_count(preset(name))['main'] / 1e9:.{decimals}f}" == ROUNDED[name]


@pytest.mark.parametrize("name,billions", [("nano", 3.228), ("super", 12.233), ("ultra", 54.985)])
def test_active_parameters_are_the_published_ones(name, billions):
    assert weight_count(preset(name))["active"] / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_layers_stand_where_they_were_published(name):
    pattern = preset(name).pattern
    shape, attention = SHAPES[name]
    assert (len(pattern), pattern.count("M"), pattern.count("E"), pattern.count("*")) == shape
    assert [i for i, letter in enumerate(pattern) if letter == "*"] == attention


@pytest.mark.parametrize("name", DEPTHS)
def test_depths_are_the_published_ones(name):
    assert len(preset(name).layers) == DEPTHS[name]


def test_derived_sizes_of_the_large_models():
    sizes = {}
    for name in ("nano", "super", "ultra"):
        config = preset(name)
        mamba = next(layer for layer in config.layers if isinstance(layer, Mamba))
        attention = next(layer for layer in config.layers if isinstance(layer, Attention))
        rows = mamba.inner + mamba.conv_width + mamba.heads
        sizes[name] = (mamba.inner, mamba.conv_width, rows, attention.heads * attention.head_width)
    assert sizes == {
        "nano": (4096, 6144, 10304, 4096),
        "super": (8192, 10240, 18560, 4096),
        "ultra": (16384, 18432, 35072, 8192),
    }


def test_no_model_of_the_family_has_positions():
    for name in set(PRESETS) - {"llama_3_1_8b", "qwen3_30b_a3b", "gpt_oss_20b"}:
        assert all(layer.rotary is None for layer in preset(name).layers if isinstance(layer, Attention)), name


def test_relatives_of_other_families_keep_their_switches():
    llama = next(layer for layer in preset("llama_3_1_8b").layers if isinstance(layer, Attention))
    assert llama.rotary == Rotary(theta=5e5, factor=8.0, low=1.0, high=4.0, original=8192)
    windows = [layer.window for layer in preset("gpt_oss_20b").layers if isinstance(layer, Attention)]
    assert windows == [128, 0] * 12
    assert preset("qwen3_30b_a3b").pattern == "*E" * 48


def test_the_toy_has_every_part_of_the_family():
    config = preset("toy")
    assert set(config.pattern) == set("M*E") and config.mtp
    assert next(layer for layer in config.layers if isinstance(layer, Experts)).latent > 0


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'huge'; have toy, .*ultra"):
        preset("huge")


@pytest.mark.parametrize("name", PRESETS)
def test_shrinking_keeps_kinds_and_switches_and_gets_small(name):
    config = preset(name)
    small = shrink(config)
    assert set(small.pattern) == set(config.pattern)
    assert [layer.letter for layer in small.mtp] == [layer.letter for layer in config.mtp]
    assert weight_count(small)["main"] < 1_000_000
    assert switches(small) == switches(config)
    assert (small.tied, small.norm_eps) == (config.tied, config.norm_eps)


def switches(config) -> set:
    """What decides which code runs, sizes left aside."""
    found = set()
    for layer in (*config.layers, *config.mtp):
        for field in dataclasses.fields(layer):
            value = getattr(layer, field.name)
            if isinstance(value, bool | str):
                found.add((layer.letter, field.name, value))
            elif field.name in ("rotary", "window", "latent", "shared"):
                found.add((layer.letter, field.name, bool(value)))
    return found


@pytest.mark.parametrize("layers", [1, 3, 12])
def test_shrinking_keeps_the_first_layers(layers):
    config = preset("super")
    small = shrink(config, layers=layers, width=32)
    assert small.pattern.startswith(config.pattern[:layers]) and small.width == 32
