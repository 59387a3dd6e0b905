"""Folders of quantised weights: what their configs say, what their tensors are, into a model and out again."""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nautilus.config.released import read_config
from nautilus.data.batch import Batch
from nautilus.model.held import Held, decode_weights, held_by, put
from nautilus.model.language import Language
from nautilus.model.layout import name_map, role
from nautilus.model.quantised import ALGORITHMS, declarations
from nautilus.model.save import save_model
from nautilus.model.shards import inventory, read_tensors
from nautilus.model.weights import load_model
from nautilus.ops.cpu.library import native
from nautilus.ops.encode import encode
from nautilus.ops.formats import Packed, pack, to_modelopt
from nautilus.ops.linear import packed_once
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.train.loop import fit
from nautilus.train.objective import next_token
from nautilus.train.optim import OptimConfig, adamw

MODEL = "model.safetensors"
FP8 = torch.float8_e4m3fn
TOKENS = torch.arange(3, 17)[None]
IN_PROJ = "backbone.layers.0.mixer.in_proj"
UP = "backbone.layers.1.mixer.experts.2.up_proj"


@pytest.fixture(autouse=True)
def one_thread_of_torch(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("NAUTILUS_OPS", "torch")


def small(name="super", width=32, **changes):
    config = dataclasses.replace(shrink(preset(name), layers=8, width=width), **changes)
    return Language(config, dtype=torch.bfloat16).initialise(seed=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a small BF16 model that has every kind of layer."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_model(small(), folder)
    return folder


@pytest.fixture
def copy(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "copy")
    return tmp_path / "copy"


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens)[0]


def matrices(folder, *roles):
    """The modules of these roles with their weights."""
    config, tensors = read_config(json.loads((folder / "config.json").read_text())), load_file(folder / MODEL)
    slots = name_map(config, "legacy")
    wanted = [name for name in slots if name in tensors and role(slots[name].parameter, config) in roles]
    return {name.removesuffix(".weight"): tensors[name] for name in wanted}


EVERY = (
    *("mamba.in_proj", "mamba.out_proj", "attention.q_proj", "attention.k_proj", "attention.v_proj"),
    *("attention.o_proj", "experts.up_proj", "experts.down_proj", "experts.shared_experts.up_proj"),
    *("experts.shared_experts.down_proj", "experts.fc1_latent_proj", "experts.fc2_latent_proj", "lm_head"),
)


def rewrite(folder, change) -> None:
    tensors = load_file(folder / MODEL)
    change(tensors)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})


def declare(folder, algorithm, exclude=(), **more) -> None:
    body = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": list(exclude)} | more
    document = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": body}
    (folder / "hf_quant_config.json").write_text(json.dumps(document))


def declare_groups(folder, weights, *, ignore=(), inputs=None, targets=("Linear",), **more) -> None:
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": list(ignore)} | more
    edit(folder, quantization_config=section)


def edit(folder, **changes) -> None:
    document = json.loads((folder / "config.json").read_text()) | changes
    document = {key: value for key, value in document.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(document))


# ----- how files spell a matrix --------------------------------------------------------------------------------------


def modelopt(packed, inputs=True):
    return to_modelopt(packed) | ({"input_scale": torch.tensor(0.25)} if inputs else {})


def compressed_nvfp4(packed):
    parts = to_modelopt(packed)
    return {
        "weight_packed": parts["weight"],
        "weight_scale": parts["weight_scale"],
        "weight_global_scale": parts["weight_scale_2"].reciprocal()[None],
        "input_global_scale": torch.tensor([4.0]),
    }


def compressed_channel(packed):
    return {"weight": packed.codes, "weight_scale": packed.scale.bfloat16()}


def words(codes):
    """4-bit codes, eight to an int32 along the last axis."""
    padded = pack(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)))
    return padded.flatten().view(torch.int32).reshape(len(codes), -1)


def compressed_int4(packed):
    codes = torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2)
    parts = {
        "weight_packed": words(codes),
        "weight_scale": packed.scale,
        "weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }
    if packed.zero is not None:
        parts["weight_zero_point"] = words(packed.zero.mT.contiguous()).mT.contiguous()
    return parts


def quantise(folder, spell, format, *, roles=EVERY, exclude=(), prepare=lambda packed: packed, **how):
    """Put every matrix of the roles into the format, spelled so. What each was turned into."""
    found = {m: weight for m, weight in matrices(folder, *roles).items() if m not in exclude}
    done = {module: prepare(encode(weight, format, **how)) for module, weight in found.items()}

    def change(tensors):
        for module, packed in done.items():
            del tensors[f"{module}.weight"]
            tensors |= {f"{module}.{part}": tensor for part, tensor in spell(packed).items()}

    rewrite(folder, change)
    return done


def assert_holds(model, done):
    """Each matrix is held as it was stored, and the logits are those of the numbers that it stands for."""
    held = {}
    for (parameter, expert), one in held_by(model).items():
        name = parameter.removesuffix(".weight")
        name = name if expert is None else name.replace(".experts.", f".experts.{expert}.")
        held[name] = one.matrix
    assert held.keys() == done.keys()
    for module, packed in done.items():
        assert held[module].format == packed.format
        assert torch.equal(held[module].decode(), packed.decode()), module
    got = logits(model)
    decode_weights(model, model.compute)
    assert not held_by(model) and torch.equal(got, logits(model))


# ----- every format that is read -------------------------------------------------------------------------------------

PAIR = {"num_bits": 8, "type": "float"}
SPELLINGS = {
    "FP8": (modelopt, "fp8_e4m3", {}),
    "FP8_PER_CHANNEL_PER_TOKEN": (modelopt, "fp8_e4m3", {"tile": "row"}),
    "NVFP4": (modelopt, "nvfp4", {"rule": "four_over_six"}),
    "W4A16_NVFP4": (lambda packed: modelopt(packed, inputs=False), "nvfp4", {}),
    "MXFP8": (lambda packed: modelopt(packed, inputs=False), "mxfp8", {}),
    "MXFP4": (lambda packed: modelopt(packed, inputs=False), "mxfp4", {}),
    "W8A16": (lambda packed: modelopt(packed, inputs=False), "int8", {"tile": "row"}),
}
FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
rounded_scale = lambda packed: dataclasses.replace(packed, scale=packed.scale.bfloat16().float())
GROUPS = {
    "nvfp4-pack-quantized": (compressed_nvfp4, "nvfp4", {"tensor_scale": 2.0**-11}, FLOAT4),
    "float-quantized": (
        compressed_channel,
        "fp8_e4m3",
        {"tile": "row", "prepare": rounded_scale},
        PAIR | {"strategy": "channel"},
    ),
    "pack-quantized": (compressed_int4, "int4", {"tile": "1x32"}, INT4),
    "pack-quantized with zero points": (compressed_int4, "int4", {"rule": "zero_point"}, INT4 | {"symmetric": False}),
    "int-quantized": (compressed_channel, "int8", {"prepare": rounded_scale}, {"num_bits": 8, "type": "int"}),
    "int-quantized in groups": (lambda p: modelopt(p, False), "int8", {"tile": "1x32"}, {"num_bits": 8, "type": "int"}),
    "mxfp4-pack-quantized": (
        lambda p: {"weight_packed": p.codes, "weight_scale": p.scale},
        "mxfp4",
        {},
        FLOAT4 | {"group_size": 32},
    ),
    "mxfp8-quantized": (lambda p: modelopt(p, False), "mxfp8", {}, PAIR | {"group_size": 32}),
}


@pytest.mark.parametrize("algorithm", SPELLINGS)
def test_every_modelopt_format_is_held_as_it_is_stored(algorithm, copy):
    spell, format, how = SPELLINGS[algorithm]
    done = quantise(copy, spell, format, **how)
    declare(copy, algorithm)
    model = load_model(copy)
    assert set(model.quantised.schemes.values()) == {algorithm, None}  # the prediction block's are not
    assert_holds(model, {m: p for m, p in done.items()})


@pytest.mark.parametrize("name", GROUPS)
def test_every_compressed_tensors_format_is_held_as_it_is_stored(name, copy):
    spell, format, how, weights = GROUPS[name]
    done = quantise(copy, spell, format, **how)
    declare_groups(copy, weights, inputs=PAIR, ignore=["re:mtp.*"], format=name.split()[0])
    assert_holds(load_model(copy), done)


def test_the_formats_of_the_table_are_all_tried():
    tried = {format for _, format, _ in SPELLINGS.values()} | {format for _, format, _, _ in GROUPS.values()}
    assert tried == {kind.format for kind in ALGORITHMS.values()}


# ----- traps ---------------------------------------------------------------------------------------------------------


def test_the_global_scale_of_compressed_tensors_is_the_reciprocal(copy):
    """Read as a multiplier, it would make weights larger by the square of it."""
    done = quantise(copy, compressed_nvfp4, "nvfp4", roles=("mamba.in_proj",), tensor_scale=2.0**-11)
    stored = load_file(copy / MODEL)[f"{IN_PROJ}.weight_global_scale"]
    assert stored.item() == 2.0**11
    declare_groups(copy, FLOAT4, inputs=PAIR, targets=["re:.*in_proj"])
    held = load_model(copy).backbone.layers[0].mixer.in_proj
    assert held.weight.tensor_scale.item() == 2.0**-11
    assert held.input_scale.item() == 0.25  # the reciprocal of what is stored, too
    assert torch.equal(held.weight.decode(), done[IN_PROJ].decode())


def test_the_low_half_of_a_byte_is_the_even_column(copy):
    quantise(copy, modelopt, "nvfp4", roles=("mamba.in_proj",))
    declare(copy, "MIXED_PRECISION", quantized_layers={m: {"quant_algo": "NVFP4"} for m in in_projections(copy)})

    def write(tensors):
        tensors[f"{IN_PROJ}.weight"][0, 0] = 0x5A  # -1 in the low half, 3 in the high one
        tensors[f"{IN_PROJ}.weight_scale"][0, 0] = 2.0
        tensors[f"{IN_PROJ}.weight_scale_2"].fill_(0.25)

    rewrite(copy, write)
    row = load_model(copy).backbone.layers[0].mixer.in_proj.weight.decode()[0]
    assert row[:2].tolist() == [-0.5, 1.5]


def in_projections(folder):
    return [name.removesuffix(".weight") for name in load_file(folder / MODEL) if name.endswith("in_proj.weight")]


def test_nano_says_so_in_its_own_file_only_and_keeps_its_router_in_float32(copy):
    gate = "backbone.layers.1.mixer.gate.weight"
    exact = torch.linspace(-0.123456, 0.1, 8 * 32).view(8, 32)
    rewrite(copy, lambda tensors: tensors.update({gate: exact}))
    kept = [m for m in matrices(copy, *EVERY) if "experts" not in m]
    done = quantise(copy, modelopt, "nvfp4", exclude=kept)
    declare(copy, "NVFP4", kept, kv_cache_quant_algo="FP8", group_size=16)
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    model = load_model(copy)
    assert torch.equal(model.state_dict()[gate], exact) and model.compute == torch.bfloat16
    assert (model.quantised.producer, model.quantised.kv_cache) == ("modelopt 0.29.0", "FP8")
    assert_holds(model, done)


def tied(tmp_path, how):
    """A folder of a model whose head is its embedding, which `how(folder)` puts into few bits."""
    save_model(small("toy", tied=True), tmp_path / "tied")
    how(tmp_path / "tied")
    return tmp_path / "tied"


def test_a_tied_head_uses_the_embedding_in_few_bits(tmp_path):
    def how(folder):
        rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
        quantise(folder, modelopt, "nvfp4", roles=("embeddings",))
        layers = {"backbone.embeddings": {"quant_algo": "NVFP4"}}
        declare(folder, "MIXED_PRECISION", quantized_layers=layers)

    model = load_model(tied(tmp_path, how))
    assert isinstance(model.head_weight, Packed) and model.compute == torch.bfloat16
    model.save(tmp_path / "again")
    again = load_model(tmp_path / "again")  # with the head written out, as readers that do not tie want it
    assert "lm_head.weight_scale" in load_file(tmp_path / "again" / MODEL)
    assert torch.equal(logits(again), logits(model))
    got = logits(model)
    decode_weights(model, model.compute)
    assert torch.equal(got, logits(model))


@pytest.mark.parametrize("both", [False, True])
def test_a_tied_head_that_is_rounded_differently_is_refused(tmp_path, both):
    def how(folder):
        quantise(folder, modelopt, "fp8_e4m3", roles=("embeddings",))  # the head is one of them: it is the embedding
        layers = {"backbone.embeddings": {"quant_algo": "FP8"}, "lm_head": {"quant_algo": "FP8"}}

        def change(tensors):
            if both:
                tensors["lm_head.weight_scale"] *= 2
            else:
                del layers["backbone.embeddings"], tensors["backbone.embeddings.weight_scale"]
                del tensors["backbone.embeddings.input_scale"]
                tensors["backbone.embeddings.weight"] = torch.randn(97, 32).bfloat16()

        rewrite(folder, change)
        declare(folder, "MIXED_PRECISION", quantized_layers=layers)

    with pytest.raises(UserError, match=r"tie_word_embeddings=true, but its lm_head\.weight differs"):
        load_model(tied(tmp_path, how))


def test_a_stack_may_hold_matrices_of_several_formats_and_plain_ones(copy):
    first, second, rest = (
        {f"backbone.layers.1.mixer.experts.{e}.up_proj" for e in part} for part in ((0, 3), (5,), (1,))
    )
    experts = set(matrices(copy, "experts.up_proj"))
    done = quantise(copy, modelopt, "nvfp4", roles=("experts.up_proj",), exclude=experts - first)
    done |= quantise(copy, modelopt, "fp8_e4m3", roles=("experts.up_proj",), exclude=experts - second)
    layers = {m: {"quant_algo": "NVFP4"} for m in first} | {m: {"quant_algo": "FP8"} for m in second}
    declare(copy, "MIXED_PRECISION", quantized_layers=layers)
    model = load_model(copy)
    up = model.backbone.layers[1].mixer.experts.up_proj
    kinds = [one.format if isinstance(one, Packed) else str(one.dtype) for one in up]
    assert kinds[:6] == ["nvfp4", "torch.bfloat16", "torch.bfloat16", "nvfp4", "torch.bfloat16", "fp8_e4m3"]
    model.save(copy.parent / "again")
    assert (copy.parent / "again" / MODEL).read_bytes() == resaved(copy)
    got = logits(model)
    decode_weights(model, model.compute)
    assert torch.equal(got, logits(model))


def resaved(folder) -> bytes:
    """The folder's tensors as the library lays them out."""
    save_file(load_file(folder / MODEL), folder / "resaved", metadata={"format": "pt"})
    return (folder / "resaved").read_bytes()


# ----- what is said and what is held ---------------------------------------------------------------------------------


def test_a_mixed_description_may_stand_in_both_files(copy):
    experts = quantise(copy, modelopt, "nvfp4", roles=("experts.up_proj", "experts.down_proj"))
    mamba = quantise(copy, modelopt, "fp8_e4m3", roles=("mamba.in_proj",))
    layers = {m: {"quant_algo": "NVFP4", "group_size": 16} for m in experts} | {m: {"quant_algo": "FP8"} for m in mamba}
    declare(copy, "MIXED_PRECISION", quantized_layers=layers, kv_cache_quant_algo="FP8")
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": []}
    edit(copy, quantization_config=section | {"kv_cache_scheme": scheme})
    model = load_model(copy)
    assert model.quantised.kv_cache == "FP8" and model.quantised.schemes[UP] == "NVFP4"
    assert_holds(model, experts | mamba)
    layers[IN_PROJ] = {"quant_algo": "NVFP4"}
    edit(copy, quantization_config=section)
    with pytest.raises(UserError, match=rf"{IN_PROJ}: config\.json says NVFP4, the file holds fp8_e4m3"):
        load_model(copy)


def test_groups_of_config_json_without_an_algorithm_are_read_too(copy):
    done = quantise(copy, modelopt, "nvfp4", roles=("experts.up_proj",))
    group = {"targets": sorted(done), "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    edit(copy, quantization_config={"quant_method": "modelopt", "config_groups": {"group_0": group}})
    assert_holds(load_model(copy), done)


@pytest.mark.parametrize(
    "exclude",
    [
        ["*.mixer.in_proj", "lm_head", "mtp*"],
        ["backbone.layers.?.mixer.in_proj", "backbone.layers.10.*", "lm_*", "mtp*"],
        ["model.layers.*.mixer.in_proj", "lm_head", "mtp.layers*"],
        [
            "backbone.layers.0",
            "backbone.layers.2*",
            "backbone.layers.4.mixer",
            "backbone.layers.6.mixer.in_proj",
            "lm_head",
        ],
    ],
)
def test_exclusions_are_globs_names_and_what_lies_below_them(exclude, copy):
    keep = set(matrices(copy, "mamba.in_proj", "lm_head"))
    if any(name.startswith("backbone.layers.0") for name in exclude):
        keep |= {m for m in matrices(copy, "mamba.out_proj") if m.split(".")[2] in ("0", "2", "4")}
    done = quantise(copy, modelopt, "nvfp4", exclude=keep)
    declare(copy, "NVFP4", exclude)
    assert_holds(load_model(copy), done)


def test_what_is_excluded_must_be_plain_and_what_is_not_must_not(copy):
    quantise(copy, modelopt, "nvfp4")
    declare(copy, "NVFP4", ["*.in_proj"])
    with pytest.raises(UserError, match=rf"{IN_PROJ}: hf_quant_config\.json says not quantised, the file holds nvfp4"):
        load_model(copy)


def test_what_is_not_excluded_must_be_quantised(copy):
    quantise(copy, modelopt, "nvfp4", exclude=[IN_PROJ])
    declare(copy, "NVFP4")
    with pytest.raises(UserError, match=rf"{IN_PROJ}: hf_quant_config\.json says NVFP4, the file holds BF16"):
        load_model(copy)
    declare(copy, "FP8", [IN_PROJ])
    with pytest.raises(UserError, match=r"says FP8, the file holds nvfp4") as caught:
        load_model(copy)
    assert "  and " in str(caught.value) and "does not hold what it says" in str(caught.value)


@pytest.mark.parametrize("odd", ["backbone.embeddings", "mtp.layers.1.mixer.fc1_latent_proj"])
def test_what_no_description_names_may_be_plain_or_what_the_rest_is_and_nothing_else(odd, copy):
    kept = [m for m in matrices(copy, *EVERY) if m.startswith("mtp.")]
    quantise(copy, modelopt, "nvfp4", exclude=kept)
    declare(copy, "NVFP4")
    load_model(copy)
    weight = load_file(copy / MODEL)[f"{odd}.weight"]
    for format, right in (("fp8_e4m3", False), ("nvfp4", True)):
        parts = {f"{odd}.{part}": tensor for part, tensor in modelopt(encode(weight, format)).items()}
        rewrite(copy, lambda tensors, parts=parts: tensors.update(parts))
        with (
            contextlib.nullcontext()
            if right
            else pytest.raises(UserError, match=f"{odd}: .* says NVFP4, the file holds")
        ):
            load_model(copy)


def test_a_scale_for_each_row_is_not_what_fp8_says(copy):
    quantise(copy, modelopt, "fp8_e4m3", tile="row")
    declare(copy, "FP8")
    with pytest.raises(UserError, match="said to be FP8, but has a scale for each row, not tensor"):
        load_model(copy)


def test_an_undeclared_folder_is_read_from_its_tensors_and_said_to_be_odd(copy, caplog):
    done = quantise(copy, modelopt, "nvfp4", roles=("mamba.in_proj",))
    with caplog.at_level(logging.WARNING, logger="nautilus.model"):
        model = load_model(copy)
    assert [r.getMessage() for r in caplog.records] == [
        f"{copy} holds quantised weights but no hf_quant_config.json, which would say which"
    ]
    assert model.quantised.schemes[IN_PROJ] == "NVFP4"
    assert_holds(model, done)


def test_experts_that_were_never_calibrated_are_named_in_the_log(copy, caplog):
    quantise(copy, modelopt, "nvfp4")
    rewrite(copy, lambda tensors: tensors.pop(f"{UP}.input_scale"))
    declare(copy, "NVFP4")
    load_model(copy)
    assert f"1 matrices were not calibrated and have no input scale: ['{UP}']" in caplog.text
    load_model(copy).save(copy.parent / "again")  # what it was meant to be is not forgotten
    said = json.loads((copy.parent / "again" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "NVFP4"
    assert f"{UP}.input_scale" not in load_file(copy.parent / "again" / MODEL)


# ----- the scales of the cache ---------------------------------------------------------------------------------------


def attention_layer(model):
    return next(block.mixer for block in model.backbone.layers if type(block.mixer).__name__ == "AttentionMixer")


def test_missing_scales_of_the_cache_are_one_and_said_once(copy, caplog):
    quantise(copy, modelopt, "nvfp4")
    declare(copy, "NVFP4", kv_cache_quant_algo="FP8")
    with caplog.at_level(logging.INFO, logger="nautilus.model"):
        mixer = attention_layer(load_model(copy))
    assert (mixer.k_scale, mixer.v_scale) == (1.0, 1.0)
    assert [r.getMessage() for r in caplog.records if "keys and values" in r.getMessage()] == [
        f"{copy} is meant for keys and values in FP8, but has no scales for them: they are 1.0"
    ]


@pytest.mark.parametrize("between", ["k_proj.", ""])
def test_scales_of_the_cache_are_kept_and_written_back(between, copy, tmp_path):
    quantise(copy, modelopt, "nvfp4")
    declare(copy, "NVFP4", kv_cache_quant_algo="FP8")
    layer = "backbone.layers.7.mixer."
    names = f"{layer}{between}k_scale", f"{layer}{between.replace('k', 'v')}v_scale"
    rewrite(copy, lambda t: t.update({names[0]: torch.tensor(1.25), names[1]: torch.tensor([0.5])}))
    model = load_model(copy)
    assert (attention_layer(model).k_scale, attention_layer(model).v_scale) == (1.25, 0.5)
    model.save(tmp_path / "again")
    written = {name for name in load_file(tmp_path / "again" / MODEL) if name.endswith(("k_scale", "v_scale"))}
    assert written == {f"{layer}k_proj.k_scale", f"{layer}v_proj.v_scale"}  # and none for the prediction block
    assert attention_layer(load_model(tmp_path / "again")).v_scale == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_a_scale_of_the_cache_that_is_none_is_refused(value, copy):
    name = "backbone.layers.7.mixer.v_proj.v_scale"
    rewrite(copy, lambda tensors: tensors.update({name: torch.tensor(value)}))
    with pytest.raises(UserError, match=rf"{name} in .*model\.safetensors: it is .*, which is no scale"):
        load_model(copy)


# ----- refused by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm,why",
    [
        ("W4A16_AWQ", "packed along the rows"),
        ("NVFP4_SVD", "low-rank branch"),
        ("FP8_PB_WO", "block of 128x128"),
        ("W4A8_MXFP4_FP8", "a rule of their own"),
        ("IQ1_S", "known are FP8, "),
        (7, "known are FP8, "),
    ],
)
def test_algorithms_that_cannot_be_read_are_refused_with_what_to_do(algorithm, why, copy):
    declare(copy, algorithm)
    with pytest.raises(UserError, match=f"hf_quant_config.json gives every matrix .*{why}.*; load the BF16 checkpoint"):
        load_model(copy)
    declare(copy, "MIXED_PRECISION", quantized_layers={UP: {"quant_algo": algorithm}})
    with pytest.raises(UserError, match=f"gives {UP} the algorithm .*{why}"):
        load_model(copy)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", None, 3])
def test_other_packages_ways_are_refused_by_name(method, copy):
    edit(copy, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=rf"quant_method={method!r}; modelopt and compressed-tensors can be read; load"):
        load_model(copy)


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 3, "type": "int", "group_size": 128, "strategy": "group"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 4, "type": "float", "group_size": 64},
        {},
    ],
)
def test_groups_that_cannot_be_read_are_refused_with_their_numbers(weights, copy):
    declare_groups(copy, weights)
    bits = weights.get("num_bits")
    with pytest.raises(
        UserError, match=rf"group_0 of .*config\.json is for weights of num_bits={bits}, .*; load the BF16"
    ):
        load_model(copy)


@pytest.mark.parametrize(
    "part,why",
    [
        ("pre_quant_scale", "AWQ and SmoothQuant scale what a matrix is given"),
        ("svdquant_lora_a", "low-rank branch"),
        ("weight_scale_inv", "block of 128x128"),
        ("weight_g_idx", "not neighbours"),
        ("q_scale", "nothing here computes with it"),
    ],
)
def test_companions_that_change_the_meaning_are_refused_by_name(part, why, copy):
    quantise(copy, modelopt, "nvfp4", roles=("mamba.in_proj",))
    rewrite(copy, lambda tensors: tensors.update({f"{IN_PROJ}.{part}": torch.ones(32)}))
    with pytest.raises(UserError, match=rf"{IN_PROJ} in model\.safetensors: {part} cannot be read: .*{why}"):
        load_model(copy)


def test_a_gptq_file_is_refused_by_name_and_not_as_a_missing_weight(copy):
    def change(tensors):
        del tensors[f"{IN_PROJ}.weight"]
        tensors[f"{IN_PROJ}.qweight"] = torch.zeros(4, 166, dtype=torch.int32)
        tensors[f"{IN_PROJ}.scales"] = torch.ones(1, 166)

    rewrite(copy, change)
    with pytest.raises(
        UserError, match=rf"(?s){IN_PROJ} in .*qweight cannot be read: GPTQ and AWQ.*load the BF16"
    ) as caught:
        load_model(copy)
    assert "missing" not in str(caught.value)


# ----- damaged -------------------------------------------------------------------------------------------------------


def f32(*values):
    return torch.tensor(values, dtype=torch.float32)


BAD = {
    "no scale": ({"weight_scale": None}, "its weight is U8, and its weight_scale is missing"),
    "no tensor scale": ({"weight_scale_2": None}, "its tensor_scale is missing"),
    "no codes": ({"weight": None}, "one of weight and weight_packed must be there"),
    "both codes": ({"weight_packed": torch.zeros(166, 16, dtype=torch.uint8)}, "one of weight and weight_packed"),
    "one block too many": ({"weight_scale": torch.ones(166, 3).to(FP8)}, r"scale is torch.float8_e4m3fn of shape"),
    "a row too few": ({"weight_scale": torch.ones(165, 2).to(FP8)}, r"scale is torch.float8_e4m3fn of shape"),
    "swizzled": ({"weight_scale": torch.ones(332).to(FP8)}, r"scale is torch.float8_e4m3fn of shape \(332,\)"),
    "three axes": (
        {"weight_scale": torch.ones(166, 2, 1).to(FP8)},
        r"weight_scale is F8_E4M3 \[166, 2, 1\], not a matrix",
    ),
    "scales of another type": ({"weight_scale": torch.ones(166, 2)}, "codes in U8 with scales in F32 are no known"),
    "two tensor scales": ({"weight_scale_2": f32(1, 2)}, r"weight_scale_2 is F32 \[2\], not one F32 number"),
    "tensor scale of E4M3": ({"weight_scale_2": f32(1).to(FP8)}, r"weight_scale_2 is F8_E4M3 \[1\], not one F32"),
    "two input scales": ({"input_scale": f32(1, 2)}, r"input_scale is F32 \[2\], not one F32 number"),
    "NaN block": (
        {"weight_scale": torch.full((166, 2), math.nan).to(FP8)},
        "332 of its scale numbers are negative, NaN",
    ),
    "negative block": ({"weight_scale": torch.full((166, 2), -1.0).to(FP8)}, "332 of its scale numbers are negative"),
    "infinite tensor scale": ({"weight_scale_2": f32(math.inf)}, "1 of its tensor_scale numbers"),
    "negative tensor scale": ({"weight_scale_2": f32(-1)}, "1 of its tensor_scale numbers are negative"),
    "NaN input scale": ({"input_scale": f32(math.nan)}, "its input scale is nan, which is none"),
    "half a row": (
        {"weight": torch.zeros(166, 8, dtype=torch.uint8)},
        r"weight is U8 \[166, 8\], config.json asks for",
    ),
    "flat": (
        {"weight": torch.zeros(2656, dtype=torch.uint8)},
        r"weight is U8 \[2656\], config.json asks for \[166, 16\]",
    ),
    "signed codes": (
        {"weight": torch.zeros(166, 32, dtype=torch.int8)},
        "codes in I8 with scales in F8_E4M3 are no known",
    ),
    "wide codes": (
        {"weight": torch.zeros(166, 32)},
        "input_scale, weight_scale, weight_scale_2 beside a weight in F32",
    ),
    "E5M2": ({"weight": torch.zeros(166, 32).to(torch.float8_e5m2)}, "beside a weight in F8_E5M2"),
    "a stranger": ({"weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}, "weight_zero_point would change its"),
    "two kinds of tensor scale": ({"weight_global_scale": f32(1)}, "weight_scale_2 would change its meaning"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_matrix_is_refused_with_its_name_and_file(case, copy):
    quantise(copy, modelopt, "nvfp4", roles=("mamba.in_proj",))
    changes, message = BAD[case]

    def change(tensors):
        assert tensors[f"{IN_PROJ}.weight"].shape == (166, 16)
        for part, tensor in changes.items():
            tensors.pop(f"{IN_PROJ}.{part}", None)
            tensors |= {} if tensor is None else {f"{IN_PROJ}.{part}": tensor}

    rewrite(copy, change)
    with pytest.raises(UserError, match=rf"cannot be read: 1 of them\n  {IN_PROJ} in model\.safetensors: .*{message}"):
        load_model(copy)


@pytest.mark.parametrize("shape", [[166, 31], [166, 30], [166], [166, 64], [0, 0], [-1, 32], [2**62, 32]])
def test_an_int4_matrix_of_another_shape_than_it_says_is_refused(shape, copy):
    quantise(copy, compressed_int4, "int4", roles=("mamba.in_proj",))
    rewrite(copy, lambda tensors: tensors.update({f"{IN_PROJ}.weight_shape": torch.tensor(shape)}))
    with pytest.raises(UserError, match=rf"{IN_PROJ} in model\.safetensors: "):
        load_model(copy)


def test_an_odd_width_is_refused(copy):
    edit(copy, hidden_size=31)
    odd = {f"{IN_PROJ}.weight": torch.zeros(166, 16, dtype=torch.uint8), f"{IN_PROJ}.weight_scale": torch.ones(166, 2)}
    odd[f"{IN_PROJ}.weight_scale"] = odd[f"{IN_PROJ}.weight_scale"].to(FP8)
    rewrite(copy, lambda tensors: tensors.update(odd | {f"{IN_PROJ}.weight_scale_2": torch.tensor(1.0)}))
    with pytest.raises(UserError):
        load_model(copy)


@pytest.mark.parametrize("module", ["backbone.layers.1.mixer.gate", "mtp.layers.1.mixer.gate"])
def test_a_router_in_few_bits_is_refused(module, copy):
    weight = load_file(copy / MODEL)[f"{module}.weight"]
    parts = {f"{module}.{part}": tensor for part, tensor in modelopt(encode(weight, "fp8_e4m3")).items()}
    rewrite(copy, lambda tensors: tensors.update(parts))
    with pytest.raises(
        UserError, match=rf"{module} in .*the weight of experts\.gate is F8_E4M3; it can be BF16, F16 or F32"
    ):
        load_model(copy)


def test_many_damaged_matrices_are_listed_up_to_twenty(copy):
    done = quantise(copy, modelopt, "nvfp4")
    rewrite(copy, lambda tensors: [tensors.pop(f"{module}.weight_scale") for module in done])
    with pytest.raises(UserError) as caught:
        load_model(copy)
    assert f"cannot be read: {len(done)} of them" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + 20 + 1 + 1


@pytest.mark.parametrize(
    "content,message",
    [
        ("{}", "has None under 'quantization', not settings"),
        ('{"quantization": {}}', "has no quant_algo"),
        ("[]", "holds list"),
        ("{", "not valid JSON"),
        ('{"quantization": {"quant_algo": "MIXED_PRECISION"}}', "has None under 'quantized_layers'"),
        ('{"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}}}', "has 1 under 'a'"),
        ('{"quantization": {"quant_algo": "FP8", "exclude_modules": "lm_head"}}', "as exclude_modules, not a list"),
        ('{"quantization": {"quant_algo": "FP8", "exclude_modules": [1]}}', "as exclude_modules, not a list of names"),
        ('{"quantization": {"quant_algo": "FP8", "exclude_modules": ["re:("]}}', "by the expression '\\('"),
        (
            '{"quantization": {"quant_algo": "FP8", "exclude_modules": ["re:(a)\\\\1"]}}',
            "is not understood here; copy it again",
        ),
    ],
)
def test_a_damaged_description_is_refused_with_its_file(content, message, copy):
    (copy / "hf_quant_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"hf_quant_config\.json.*{message}"):
        load_model(copy)


def test_a_folder_that_quantises_nothing_is_a_plain_one(copy):
    declare(copy, None, kv_cache_quant_algo="FP8")
    model = load_model(copy)
    assert held_by(model) == {} and set(model.quantised.schemes.values()) == {None}
    assert torch.equal(logits(model), logits(small()))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with matrices in NVFP4, FP8 and BF16, and its logits."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    save_model(small("super", layers=small().config.layers[:4]), folder)
    layers = {m: {"quant_algo": "NVFP4"} for m in quantise(folder, modelopt, "nvfp4", roles=("experts.up_proj",))}
    layers |= {m: {"quant_algo": "FP8"} for m in quantise(folder, modelopt, "fp8_e4m3", roles=("mamba.in_proj",))}
    declare(folder, "MIXED_PRECISION", quantized_layers=layers)
    with pytest.MonkeyPatch.context() as patch:  # as in the tests
        patch.setenv("NAUTILUS_OPS", "torch")
        return folder, logits(load_model(folder))


FILES = [MODEL, "hf_quant_config.json", "config.json", "generation_config.json"]


@given(
    file=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["flip", "cut", "drop", "double"]),
    value=st.integers(0, 255),
    size=st.integers(1, 40),
)
@example(file=MODEL, place=0.0, how="flip", value=255, size=1)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_a_clear_error_or_harmless(file, place, how, value, size, mixed, tmp_path):
    folder, want = mixed
    shutil.copytree(folder, tmp_path / "damaged", dirs_exist_ok=True)
    data = bytearray((folder / file).read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0] if file == MODEL else len(data)
    at = int(place * header)
    damaged = {
        "flip": data[:at] + bytes([value]) + data[at + 1 :],
        "cut": data[: int(place * len(data))],
        "drop": data[:at] + data[at + size :],
        "double": data[: at + size] + data[at:],
    }[how]
    (tmp_path / "damaged" / file).write_bytes(damaged)
    with contextlib.suppress(UserError):
        got = logits(load_model(tmp_path / "damaged"))
        assert file != MODEL or torch.equal(got, want)  # a config may say something else that is right as well


@given(name=st.sampled_from(["weight", "weight_scale", "weight_scale_2", "input_scale"]), data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_type_and_shape_of_a_part_is_a_clear_error_or_right(name, data, mixed, tmp_path):
    """A header that is valid by itself, with bytes to match."""
    kind = data.draw(
        st.sampled_from(["U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F32", "BF16", "I32", "I64", "BOOL", "C64"])
    )
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 12, 24, 32, 166, 2**31, 2**62, 2**64 - 1]), max_size=3))
    size = math.prod(shape) * {"F32": 4, "BF16": 2, "I32": 4, "I64": 8, "C64": 8}.get(kind, 1)
    if size > 1 << 20:
        return
    folder, want = mixed
    shutil.copytree(folder, tmp_path / "damaged", dirs_exist_ok=True)
    raw = (folder / MODEL).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    module = data.draw(st.sampled_from([IN_PROJ, UP, "backbone.norm_f"]))
    entries = {key: (value, body[slice(*value["data_offsets"])]) for key, value in header.items() if key[0] != "_"}
    entries[f"{module}.{name}"] = {"dtype": kind, "shape": shape}, bytes(size)
    listed = [(key, value["dtype"], value["shape"], part) for key, (value, part) in entries.items()]
    write_header(tmp_path / "damaged" / MODEL, listed)
    with contextlib.suppress(UserError):
        got = logits(load_model(tmp_path / "damaged"))
        assert got.shape == want.shape and got.isfinite().all()
        assert name != "input_scale" or torch.equal(got, want), "no number of the model was touched"


# ----- out again -----------------------------------------------------------------------------------------------------


def test_saving_what_was_loaded_writes_the_same_bytes(mixed, tmp_path):
    model = load_model(mixed[0])
    model.save(tmp_path / "again")
    assert (tmp_path / "again" / MODEL).read_bytes() == resaved(mixed[0])
    before, after = (json.loads((f / "hf_quant_config.json").read_text()) for f in (mixed[0], tmp_path / "again"))
    assert after["producer"] == before["producer"]
    kinds = {m: entry["quant_algo"] for m, entry in after["quantization"]["quantized_layers"].items()}
    assert kinds == {m: e["quant_algo"] for m, e in before["quantization"]["quantized_layers"].items()}
    model.save(tmp_path / "third")
    assert torch.equal(logits(load_model(tmp_path / "third")), mixed[1])
    assert "nvfp4" in (tmp_path / "third" / "README.md").read_text()


def test_a_uniform_model_is_described_by_what_it_leaves_out(copy, tmp_path):
    done = quantise(copy, modelopt, "fp8_e4m3", exclude=["lm_head", IN_PROJ])
    declare(copy, "FP8", ["lm_head", IN_PROJ], kv_cache_quant_algo="FP8")
    load_model(copy).save(tmp_path / "again")
    said = json.loads((tmp_path / "again" / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["kv_cache_quant_algo"]) == ("FP8", "FP8")
    left = {module for module in said["exclude_modules"] if not module.startswith("mtp.")}
    assert left == {"lm_head", IN_PROJ} and set(said["exclude_modules"]) & set(done) == set()
    assert_holds(load_model(tmp_path / "again"), done)


def test_shards_may_part_a_matrix_from_its_scales(mixed, tmp_path):
    save_model(load_model(mixed[0]), tmp_path / "again", shard_bytes=600)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 20
    assert torch.equal(logits(load_model(tmp_path / "again")), mixed[1])


@pytest.mark.parametrize("precision,dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_writes_the_numbers_themselves(precision, dtype, mixed, tmp_path):
    model = load_model(mixed[0])
    model.save(tmp_path / "numbers", precision=precision)
    assert not (tmp_path / "numbers" / "hf_quant_config.json").exists()
    numbers = load_model(tmp_path / "numbers")
    assert held_by(numbers) == {} and numbers.quantised is None
    decode_weights(model, dtype)
    assert torch.equal(numbers.state_dict()[f"{IN_PROJ}.weight"], model.state_dict()[f"{IN_PROJ}.weight"])
    assert "plain floating-point numbers" in (tmp_path / "numbers" / "README.md").read_text()


def test_int4_has_no_name_in_modelopt_files_and_can_be_written_as_numbers_only(copy, tmp_path):
    quantise(copy, compressed_int4, "int4", roles=("mamba.in_proj",))
    model = load_model(copy)
    with pytest.raises(UserError, match=f"{IN_PROJ} cannot be written: .*along the other axis.*or give a precision"):
        model.save(tmp_path / "again")
    model.save(tmp_path / "again", precision="fp32")
    assert not (tmp_path / "again" / "hf_quant_config.json").exists()


def test_matrices_that_were_put_in_by_hand_are_written_as_a_release_would(tmp_path):
    model = small("nano")
    weight = model.backbone.layers[0].mixer.in_proj.weight.detach()
    held = {(f"{IN_PROJ}.weight", None): Held(encode(weight, "fp8_e4m3"), torch.tensor(0.5))}
    up = model.backbone.layers[1].mixer.experts.up_proj.detach()
    held |= {("backbone.layers.1.mixer.experts.up_proj", e): Held(encode(up[e], "nvfp4")) for e in range(len(up))}
    put(model, held)
    model.save(tmp_path / "model")
    said = json.loads((tmp_path / "model" / "hf_quant_config.json").read_text())
    assert said["producer"] == {"name": "modelopt", "version": "nautilus"}  # engines look for the first
    layers = said["quantization"]["quantized_layers"]
    assert layers[IN_PROJ] == {"quant_algo": "FP8"} and layers[UP] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    loaded = load_model(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.backbone.layers[0].mixer.in_proj.input_scale.item() == 0.5


def test_a_format_without_a_name_is_not_written(tmp_path):
    model = small("nano")
    weight = model.backbone.layers[0].mixer.in_proj.weight.detach()
    put(model, {(f"{IN_PROJ}.weight", None): Held(encode(weight, "fp8_e5m2"))})
    with pytest.raises(UserError, match="fp8_e5m2 with a scale for each tensor has no name in files"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_families_are_read_and_written_under_their_own_names(tmp_path):
    model = small("llama_3_1_8b", layers=small("llama_3_1_8b").config.layers[:4])
    name = "backbone.layers.1.mixer.up_proj.weight"
    put(model, {(name, None): Held(encode(model.state_dict()[name], "nvfp4"), torch.tensor(0.5))})
    model.save(tmp_path / "model")
    assert "model.layers.0.mlp.up_proj.weight_scale_2" in load_file(tmp_path / "model" / MODEL)
    assert torch.equal(logits(load_model(tmp_path / "model")), logits(model))


# ----- the files' own memory -----------------------------------------------------------------------------------------


def lies_in(tensor, file) -> bool:
    """Whether the tensor's memory is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if line.endswith(str(file)) and begin <= tensor.data_ptr() < end:
            return True
    return False


def test_matrices_and_numbers_stay_in_their_file(mixed):
    model, file = load_model(mixed[0]), mixed[0] / MODEL
    in_proj = model.backbone.layers[0].mixer.in_proj.weight
    assert lies_in(in_proj.codes, file)
    for expert in model.backbone.layers[1].mixer.experts.up_proj:
        assert lies_in(expert.codes, file) and lies_in(expert.scale, file)
    assert lies_in(model.backbone.embeddings.weight, file) and lies_in(model.lm_head.weight, file)
    assert not lies_in(model.backbone.layers[1].mixer.experts.down_proj, file)  # a stack of several tensors
    assert not lies_in(load_model(mixed[0], dtype=torch.float32).lm_head.weight, file)


def write_header(file, entries) -> None:
    """A file of these (name, type, shape, bytes), one after the other, without any padding."""
    header, offset = {}, 0
    for name, kind, shape, data in entries:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in entries))


def test_numbers_at_odd_places_of_a_file_are_copied(tmp_path):
    write_header(tmp_path / MODEL, [("a", "U8", [3], b"abc"), ("b", "F32", [2], struct.pack("<2f", 1.5, -2.0))])
    read = dict(read_tensors(inventory(tmp_path)))
    assert read["a"].tolist() == [97, 98, 99] and read["b"].tolist() == [1.5, -2.0]
    assert lies_in(read["a"], tmp_path / MODEL)
    assert read["b"].data_ptr() % 4 == 0 and not lies_in(read["b"], tmp_path / MODEL)


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**64 - 1], [2**62, 0, 1]])
def test_an_axis_longer_than_any_memory_is_refused_though_another_is_empty(shape, tmp_path):
    write_header(tmp_path / MODEL, [("a", "F32", shape, b"")])
    with pytest.raises(UserError, match=r"a in .*model\.safetensors is said to be"):
        inventory(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 10**9, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(length, mixed, tmp_path):
    shutil.copytree(mixed[0], tmp_path / "damaged")
    data = (mixed[0] / MODEL).read_bytes()
    (tmp_path / "damaged" / MODEL).write_bytes(struct.pack("<Q", length) + data[8:])
    with pytest.raises(UserError, match=r"model\.safetensors .* is no complete safetensors file"):
        load_model(tmp_path / "damaged")


@pytest.mark.parametrize("offsets", [[0, 2656], [2656, 5312], [2**64 - 1, 2**64 - 1], [2656, 0], [-1, 2655]])
def test_offsets_that_overlap_or_overflow_are_refused(offsets, mixed, tmp_path):
    shutil.copytree(mixed[0], tmp_path / "damaged")
    data = (mixed[0] / MODEL).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[f"{IN_PROJ}.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (tmp_path / "damaged" / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(UserError, match=r"model\.safetensors .* is no complete safetensors file"):
        load_model(tmp_path / "damaged")


def test_a_tensor_that_a_header_lists_twice_is_refused_or_read_as_one(mixed, tmp_path):
    shutil.copytree(mixed[0], tmp_path / "damaged")
    data = (mixed[0] / MODEL).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].rstrip()
    first = text.index(b'"backbone')
    entry = text[first : text.index(b"}", first) + 1]
    text = text[:-1] + b"," + entry + b"}"
    (tmp_path / "damaged" / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with contextlib.suppress(UserError):
        assert torch.equal(logits(load_model(tmp_path / "damaged")), mixed[1])


def test_an_empty_tensor_has_no_memory_to_share(tmp_path):
    write_header(tmp_path / MODEL, [("a", "F32", [3, 0], b""), ("b", "BF16", [1], b"ab")])
    assert dict(read_tensors(inventory(tmp_path)))["a"].shape == (3, 0)


def test_what_is_written_to_a_loaded_model_stays_out_of_the_file(plain):
    before = (plain / MODEL).read_bytes()
    with torch.no_grad():
        load_model(plain).lm_head.weight.zero_()
    assert (plain / MODEL).read_bytes() == before
    assert load_model(plain).lm_head.weight.any()


def batches(vocab, steps=3):
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, vocab, (2, 12), generator=draw)
        weights = torch.ones(2, 12)
        weights[:, 0] = 0
        yield [Batch(tokens=tokens, weights={"next_token": weights})]


def test_a_model_in_its_file_trains_as_one_in_memory_does(plain):
    mapped, copied = load_model(plain), load_model(plain)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.data = parameter.clone()
    assert not lies_in(copied.lm_head.weight, plain / MODEL)
    for model in (mapped, copied):
        fit(model, list(batches(97)), next_token, adamw(model, OptimConfig(lr=1e-2)), steps=3)
    assert not torch.equal(mapped.lm_head.weight, load_model(plain).lm_head.weight)
    for (name, one), (_, other) in zip(mapped.state_dict().items(), copied.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_a_model_outlives_the_folder_it_came_from(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "copy")
    model = load_model(tmp_path / "copy")
    want = logits(model)
    model.save(tmp_path / "copy")  # over its own files
    assert torch.equal(logits(load_model(tmp_path / "copy")), want)
    shutil.rmtree(tmp_path / "copy")
    assert torch.equal(logits(model), want)


def resident_bytes(file) -> int:
    """Of the file's mappings, what this process has in its memory."""
    lines, found = Path("/proc/self/smaps").read_text().splitlines(), 0
    for number, line in enumerate(lines):
        if line.endswith(str(file)):
            found += next(int(later.split()[1]) for later in lines[number:] if later.startswith("Rss:")) * 1024
    return found


@pytest.mark.skipif(native().functions is None, reason="only native kernels pack matrices")
def test_a_model_is_saved_as_it_was_read_though_its_files_left_memory_once_it_was_packed(tmp_path, monkeypatch):
    monkeypatch.delenv("NAUTILUS_OPS")
    folder = tmp_path / "read"
    mamba, experts = small("nano").config.layers[:2]
    experts = dataclasses.replace(experts, hidden=512, shared=512)
    save_model(small("nano", width=1024, layers=(mamba, experts)), folder)
    spell, format, how = SPELLINGS["NVFP4"]
    quantise(folder, spell, format, roles=[role for role in EVERY if role != "lm_head"], **how)
    declare(folder, "NVFP4", exclude=["lm_head"])
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight[5] = 1  # what was changed must not be read from the file again
    with torch.no_grad(), packed_once({}):
        model(TOKENS)
    assert resident_bytes(folder / MODEL) < (folder / MODEL).stat().st_size / 2
    assert (model.lm_head.weight[5] == 1).all()
    save_model(model, tmp_path / "written")
    read, written = (load_file(place / MODEL) for place in (folder, tmp_path / "written"))
    read["lm_head.weight"][5] = 1
    assert read.keys() == written.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), written[name].flatten().view(torch.uint8)), name


def test_types_and_devices_may_be_chosen_for_quantised_models_too(mixed):
    model = load_model(mixed[0], dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    got = logits(model)
    decode_weights(model, torch.float32)
    assert torch.equal(got, logits(model)) and got.dtype == torch.float32


# ----- training ------------------------------------------------------------------------------------------------------


def test_training_refuses_matrices_in_few_bits_and_says_what_to_do(mixed):
    model = load_model(mixed[0])
    with pytest.raises(UserError, match="18 matrices of the model are in fp8_e4m3 and nvfp4, .* decode_weights"):
        adamw(model, OptimConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(UserError, match="cannot be trained"):
        fit(model, list(batches(97)), next_token, optimizer, steps=3)
    decode_weights(model, torch.float32)
    fit(model, list(batches(97)), next_token, adamw(model, OptimConfig(lr=1e-2)), steps=3)


def test_gradients_reach_what_a_matrix_was_given(mixed):
    """As a search for sensitive layers needs them, though the matrices themselves have none."""
    gradients = []
    model = load_model(mixed[0])
    for _ in range(2):
        embeds = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32).bfloat16().requires_grad_()
        hidden, _ = model.hidden(embeds_BTD=embeds)
        model.head(hidden).logsumexp(-1).sum().backward()
        gradients.append(embeds.grad)
        decode_weights(model, torch.bfloat16)
    assert gradients[0].isfinite().all() and gradients[0].any()
    assert torch.allclose(gradients[0], gradients[1], rtol=0.05, atol=0.05 * gradients[1].abs().max().item())


def test_the_state_of_a_quantised_model_has_what_is_left_as_parameters(mixed):
    model = load_model(mixed[0])
    assert f"{IN_PROJ}.weight" not in model.state_dict()
    assert all(p.is_floating_point() for p in model.parameters())


def test_descriptions_are_found_in_either_file_and_in_both(copy):
    assert declarations(copy, {}) == []
    declare(copy, "NVFP4")
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt", "version": "1"}}
    found = declarations(copy, {"quantization_config": section})
    assert [(d.file.name, d.everywhere, d.producer) for d in found] == [
        ("hf_quant_config.json", "NVFP4", "modelopt 0.29.0"),
        ("config.json", "FP8", "modelopt 1"),
    ]
    whole = json.loads((copy / "hf_quant_config.json").read_text())  # as some engines put the one into the other
    assert declarations(copy, {"quantization_config": whole})[1].everywhere == "NVFP4"
