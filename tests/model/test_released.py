"""The tensors of released quantised checkpoints: their number and bytes, from presets alone."""

import json

import pytest

from nautilus.model.held import quantisation_of
from nautilus.model.language import Language
from nautilus.model.layout import written_slots
from nautilus.model.quantised import describe
from nautilus.model.released import SCHEMES, bytes_of, released_quantisation, released_tensors
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError


def totals(name, scheme):
    table = released_tensors(preset(name), scheme)
    return len(table), sum(map(bytes_of, table.values()))


@pytest.mark.parametrize(
    "name,scheme,tensors,size",
    [
        # Files that were counted.
        ("nano", "nano_nvfp4", 24_147, 19_339_781_632),
        ("super", "super_nvfp4", 165_860, 80_297_329_824),
        # Counted too; the bytes of the load-balancing bias, in float32, are added to those of BF16 throughout.
        ("nano", "bf16", 6_243, 63_155_880_576 + 2 * 23 * 128),
        ("super", "bf16", 42_683, 247_222_066_176 + 2 * 20_992),
        ("lightning", "bf16", 6_513, None),
        ("ultra", "bf16", 51_023, None),
        # Foretold: files that were not seen. Lightning's is without the 12 scales of its cache 18,475.
        ("ultra", "ultra_nvfp4", 198_887, 351_881_408_096),
        ("lightning", "lightning_nvfp4", 18_475 + 12, None),
    ],
)
def test_released_files_hold_that_many_tensors_and_bytes(name, scheme, tensors, size):
    got = totals(name, scheme)
    assert got == (tensors, got[1] if size is None else size)


@pytest.mark.parametrize(
    "name,scheme,counts",
    [
        ("nano", "nano_nvfp4", {"NVFP4": 5_968}),
        ("nano", "nano_fp8", {"FP8": 5_968}),
        ("super", "super_nvfp4", {"NVFP4": 40_961, "FP8": 139}),
        ("super", "super_fp8", {"FP8": 41_120}),
        ("ultra", "ultra_nvfp4", {"NVFP4": 49_152, "FP8": 192}),
        ("lightning", "lightning_nvfp4", {"W4A16_NVFP4": 5_935, "FP8": 46}),
    ],
)
def test_that_many_modules_are_quantised(name, scheme, counts):
    algorithms = [kind for kind in released_quantisation(preset(name), scheme).schemes.values() if kind]
    assert {kind: algorithms.count(kind) for kind in set(algorithms)} == counts


def test_nano_keeps_attention_and_the_mamba_layer_before_it_and_its_router_in_float32():
    table = released_tensors(preset("nano"), "nano_nvfp4")
    kept = [
        int(name.split(".")[2])
        for name, (kind, _) in table.items()
        if name.endswith("in_proj.weight") and kind == "BF16"
    ]
    assert kept == [4, 11, 18, 25, 32, 41]
    assert {kind for name, (kind, _) in table.items() if ".q_proj." in name or "conv1d" in name} == {"BF16"}
    assert {kind for name, (kind, _) in table.items() if ".gate." in name} == {"F32"}
    assert not any("k_scale" in name for name in table)


def test_super_holds_what_the_search_found():
    table = released_tensors(preset("super"), "super_nvfp4")
    layer = "backbone.layers.{}.mixer.{}.weight"
    assert table[layer.format(1, "shared_experts.down_proj")][0] == "U8"
    assert table[layer.format(3, "shared_experts.down_proj")][0] == "F8_E4M3"
    assert table[layer.format(76, "shared_experts.down_proj")][0] == "BF16"
    assert table[layer.format(41, "shared_experts.up_proj")][0] == "BF16"
    assert table[layer.format(69, "o_proj")][0] == "F8_E4M3" and table[layer.format(16, "o_proj")][0] == "BF16"
    assert sum(name.endswith(("k_scale", "v_scale")) for name in table) == 16  # none for the prediction block
    assert {kind for name, (kind, _) in table.items() if name.startswith("mtp.")} == {"BF16", "F32"}


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "bf16"])
def test_a_description_says_what_the_tensors_are(scheme):
    config = shrink(preset(scheme.partition("_")[0]), layers=12)
    table, said = released_tensors(config, scheme), released_quantisation(config, scheme)
    kinds = {"U8": ("NVFP4", "W4A16_NVFP4"), "F8_E4M3": ("FP8",), "BF16": (None,)}
    for module, algorithm in said.schemes.items():
        kind = table[f"{module}.weight"][0]
        assert algorithm in kinds[kind], module
    slots = written_slots(config, "legacy")
    assert said.schemes.keys() == quantisation_of(Language(config, device="meta"), slots, {}).schemes.keys()
    assert json.loads(json.dumps(describe(said)))["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_an_unknown_scheme_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="no quantisation scheme 'nano_fp4'; did you mean 'nano_nvfp4'"):
        released_tensors(preset("nano"), "nano_fp4")
