import contextlib
import copy as copying
import dataclasses
import errno
import json
import math
import os
import resource
import shutil
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nautilus.config import Linear, Mamba, Nothing, lay, weight_count
from nautilus.model import shards, weights
from nautilus.model.card import add_to_card
from nautilus.model.language import Language
from nautilus.model.layout import PREFIX, name_map, parameter_table, place_of, tensor_table
from nautilus.model.save import save_model
from nautilus.model.weights import load_model
from nautilus.presets import PRESETS, preset, shrink
from nautilus.runtime import UserError


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small(name: str = "lightning", **changes) -> Language:
    config = dataclasses.replace(shrink(preset(name), layers=4, width=32), **changes)
    model = Language(config).initialise(seed=3)
    for mixer in model.experts_mixers().values():  # a bias that bfloat16 cannot hold
        if mixer.gate.bias is not None:
            mixer.gate.bias.copy_(torch.linspace(-0.1234567, 0.1, mixer.layer.experts))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model of every kind of layer, and the model."""
    folder, model = tmp_path_factory.mktemp("saved") / "model", small()
    save_model(model, folder)
    return folder, model


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def assert_same(one: Language, other: Language) -> None:
    assert one.config == other.config
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def edit(folder, **changes) -> None:
    """Change keys of config.json; None removes a key."""
    document = json.loads((folder / "config.json").read_text()) | changes
    document = {key: value for key, value in document.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(document))


def rewrite(folder, change) -> None:
    """Change the tensors of the folder's one file by a function on the dict of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def respell(folder, model, layout) -> None:
    """The folder's one file with the model's tensors under the names of another layout."""
    held = model.state_dict()
    slots = name_map(model.config, layout).items()
    save_file({name: place_of(slot, held).clone() for name, slot in slots}, folder / "model.safetensors")


# ----- which tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,tensors,elements,main_bytes",
    [
        ("nano", 6_243, 31_577_940_288, 63_155_880_576),
        ("lightning", 6_513, 32_913_266_240, None),
        ("super", 42_683, 123_611_033_088, 247_222_066_176),
        ("ultra", 51_023, 560_524_603_904, None),
    ],
)
def test_released_checkpoints_hold_as_many_tensors_and_bytes(name, tensors, elements, main_bytes):
    table = tensor_table(preset(name))
    total = sum(torch.Size(shape).numel() for shape in table.values())
    assert (len(table), total) == (tensors, elements)
    assert main_bytes is None or 2 * total == main_bytes


def test_super_keeps_its_load_balancing_bias_in_that_many_float32_numbers():
    table = tensor_table(preset("super"))
    assert sum(shape[0] for name, shape in table.items() if name.endswith("e_score_correction_bias")) == 20_992


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_is_what_the_model_has(name):
    model = Language(preset(name), device="meta")
    assert parameter_table(model.config) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("qwen3_30b_a3b", "gpt_oss_20b")])
def test_the_table_has_as_many_elements_as_the_config_counts(name):
    count, table = weight_count(preset(name)), tensor_table(preset(name))
    assert count["main"] + count["mtp"] == sum(torch.Size(shape).numel() for shape in table.values())


def test_llama_and_qwen_files_hold_as_many_tensors_as_the_published_ones():
    assert len(tensor_table(preset("llama_3_1_8b"), "llama")) == 291
    assert len(tensor_table(preset("qwen3_30b_a3b"), "qwen3_moe")) == 18_867


# ----- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_saving_and_loading_changes_no_bit(name, tmp_path):
    model = small(name)
    save_model(model, tmp_path / "model")
    assert_same(load_model(tmp_path / "model"), model)


def test_linear_and_empty_layers_are_saved_in_our_own_form(tmp_path):
    layers = (*lay("M", Mamba(heads=6, head_width=8, state=16, groups=2, chunk=8)), Linear(), Nothing())
    model = small("toy", layers=layers, mtp=())
    save_model(model, tmp_path / "model")
    assert_same(load_model(tmp_path / "model"), model)
    assert "opens only in Nautilus" in (tmp_path / "model" / "README.md").read_text()


def test_layers_of_different_size_are_saved_as_blocks(tmp_path):
    model = small()
    wider = dataclasses.replace(model.config.layers[1], hidden=40, experts=12, active=5)
    model = small(layers=(*model.config.layers, wider))
    save_model(model, tmp_path / "model")
    assert_same(load_model(tmp_path / "model"), model)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert "model.layers.1.mixer.experts.0.up_proj.weight" in names


@pytest.mark.parametrize("layout", PREFIX)
def test_every_spelling_of_names_loads(layout, copy, saved):
    legacy = load_file(copy / "model.safetensors")
    respell(copy, saved[1], layout)
    tensors = load_file(copy / "model.safetensors")
    assert len(tensors) < len(legacy) if "stacked" in layout else len(tensors) == len(legacy)
    assert_same(load_model(copy), saved[1])


@pytest.mark.parametrize("shard_bytes", [1, 3000, 20_000])
def test_shards_are_at_most_as_large_as_asked_and_hold_everything(shard_bytes, tmp_path, saved):
    save_model(saved[1], tmp_path / "model", shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    whole = load_file(saved[0] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "model" / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
    assert_same(load_model(tmp_path / "model"), saved[1])


def test_saving_again_in_fewer_shards_leaves_no_old_file(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", shard_bytes=3000)
    save_model(saved[1], tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


# ----- number formats ------------------------------------------------------------------------------------------------


def test_bf16_files_round_the_weights_and_keep_the_load_balancing_bias(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", precision="bf16")
    loaded = load_model(tmp_path / "model")
    assert loaded.compute == torch.bfloat16
    for name, tensor in saved[1].state_dict().items():
        bias = name.endswith("e_score_correction_bias")
        assert torch.equal(loaded.state_dict()[name], tensor if bias else tensor.bfloat16()), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_file_can_be_loaded_wider_or_narrower_than_it_is_stored(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", precision="bf16")
    wide = load_model(tmp_path / "model", dtype=torch.float32)
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}
    assert wide.compute == torch.float32
    narrow = load_model(saved[0], dtype=torch.bfloat16)
    kept = {name for name, t in narrow.state_dict().items() if t.dtype == torch.float32}
    assert kept == {name for name in narrow.state_dict() if name.endswith("e_score_correction_bias")}


def test_a_router_stored_in_float32_stays_so_among_bf16_weights(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", precision="bf16")
    gate = "backbone.layers.1.mixer.gate.weight"
    exact = saved[1].state_dict()[gate]
    rewrite(tmp_path / "model", lambda tensors: tensors.update({gate: exact.clone()}))
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.state_dict()[gate], exact)
    logits, _ = loaded(torch.arange(9)[None])
    assert logits.isfinite().all()
    save_model(loaded, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")[gate].dtype == torch.float32


def test_an_unknown_precision_is_refused(tmp_path, saved):
    with pytest.raises(UserError, match="precision='fp3' cannot be written; bf16, fp32, fp16 can"):
        save_model(saved[1], tmp_path / "model", precision="fp3")
    with pytest.raises(UserError, match="float64.*give precision"):
        save_model(Language(saved[1].config, dtype=torch.float64), tmp_path / "model")


# ----- tied head, stop ids, what lies beside the weights -------------------------------------------------------------


def test_a_tied_head_is_written_out_for_readers_that_do_not_tie(tmp_path):
    model = small(tied=True)
    save_model(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    assert_same(load_model(tmp_path / "model"), model)
    rewrite(tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"))
    assert_same(load_model(tmp_path / "model"), model)


def test_a_head_that_contradicts_its_config_is_refused(tmp_path):
    save_model(small(tied=True), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="tie_word_embeddings=true.*lm_head.weight differs"):
        load_model(tmp_path / "model")


def test_a_tied_llama_file_has_no_head(tmp_path):
    model = small("llama_3_1_8b", tied=True)
    save_model(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert_same(load_model(tmp_path / "model"), model)


def test_stop_ids_of_the_generation_config_win(copy):
    edit(copy, eos_token_id=2)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert load_model(copy).config.eos == (2, 11)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_model(copy).config.eos == (7,)
    (copy / "generation_config.json").unlink()
    assert load_model(copy).config.eos == (2,)


def test_the_card_says_what_is_inside_and_what_was_told(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", precision="bf16", facts={"tokens seen": "12,345"})
    card = (tmp_path / "model" / "README.md").read_text()
    counts = weight_count(saved[1].config)
    numbers = (counts["main"] + counts["mtp"], counts["mtp"], counts["active"])
    for part in (*(f"{number:,}" for number in numbers), "bf16", "12,345", "drops"):
        assert part in card


def test_a_section_of_the_card_is_added_once_and_keeps_the_others(tmp_path, saved):
    save_model(saved[1], tmp_path / "model")
    before = (tmp_path / "model" / "README.md").read_text()
    add_to_card(tmp_path / "model", "Training", {"steps": 3})
    add_to_card(tmp_path / "model", "Measures", {"a|b": 0.5}, "Of text.")
    add_to_card(tmp_path / "model", "Training", {"steps": 4})
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith(before.rstrip("\n")) and card.count("## Training") == 1 and "| steps | 3 |" not in card
    assert "| steps | 4 |" in card and "Of text." in card and "| a\\|b | 0.5 |" in card


@pytest.mark.parametrize("precision,value", [(None, math.nan), ("bf16", math.inf), ("fp16", 1e6)])
def test_numbers_that_are_none_are_not_written_over_a_good_folder(tmp_path, saved, precision, value):
    save_model(saved[1], tmp_path / "model")
    good = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    broken = copying.deepcopy(saved[1])
    with torch.no_grad():
        broken.backbone.norm_f.weight[3] = value
    with pytest.raises(UserError, match="norm_f.weight holds NaN or infinite"):
        save_model(broken, tmp_path / "model", precision=precision)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == good
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_is_saved_beside_the_weights(tmp_path, saved):
    class Words:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_model(saved[1], tmp_path / "model", tokenizer=Words())
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_rotary_tables_of_old_llama_files_are_passed_over(tmp_path):
    model = small("llama_3_1_8b")
    save_model(model, tmp_path / "model")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(tmp_path / "model", lambda tensors: tensors.update(extra))
    assert_same(load_model(tmp_path / "model"), model)


# ----- bad input -----------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(copy):
    def damage(tensors):
        del tensors["backbone.norm_f.weight"]
        tensors["backbone.layers.0.mixer.in_proj.bias"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()

    rewrite(copy, damage)
    with pytest.raises(UserError) as caught:
        load_model(copy)
    message = str(caught.value)
    assert "1 tensors missing, 1 unexpected, 1 of another shape" in message
    assert "missing: backbone.norm_f.weight [32]" in message
    assert "unexpected: backbone.layers.0.mixer.in_proj.bias [3] in model.safetensors" in message
    assert "shape: lm_head.weight is [5, 32], config.json asks for [97, 32]" in message


def test_a_long_list_is_cut_after_twenty(copy):
    experts = [name for name in load_file(copy / "model.safetensors") if ".experts." in name]
    rewrite(copy, lambda tensors: [tensors.pop(name) for name in experts])
    with pytest.raises(UserError) as caught:
        load_model(copy)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2] == f"  and {len(experts) - 20} more"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused_by_name(copy, value):
    def damage(tensors):
        tensors["backbone.layers.0.mixer.D"][1] = value
        tensors["backbone.layers.1.mixer.experts.2.up_proj.weight"][0, 0] = value

    rewrite(copy, damage)
    with pytest.raises(UserError, match="NaN or infinite numbers in 2 tensors") as caught:
        load_model(copy)
    assert "backbone.layers.0.mixer.D in model.safetensors" in str(caught.value)
    assert "backbone.layers.1.mixer.experts.2.up_proj.weight in model.safetensors" in str(caught.value)


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused_by_name(share, saved, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    whole = (saved[0] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"model\.safetensors .*truncated"):
        load_model(folder)


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused_or_harmless(place, value, saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    data = bytearray((saved[0] / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    data[int(place * header)] = value
    (folder / "model.safetensors").write_bytes(data)
    with contextlib.suppress(UserError):
        assert_same(load_model(folder), saved[1])


def test_offsets_beyond_the_file_are_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["data_offsets"] = [0, 2**63]
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(UserError, match=r"model\.safetensors .* no complete safetensors file"):
        load_model(copy)


def test_a_pickle_under_a_safetensors_name_is_refused(copy):
    torch.save({"weight": torch.ones(3)}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors .* no complete safetensors file"):
        load_model(copy)


def test_pickles_are_named_but_never_opened(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin; pickles are never opened"):
        load_model(copy)


def test_code_that_comes_with_a_checkpoint_is_not_run(copy, saved):
    (copy / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit(copy, auto_map={"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "modeling_evil.Config"})
    assert_same(load_model(copy), saved[1])


def test_an_index_that_names_an_absent_file_is_refused(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", shard_bytes=20_000)
    gone = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"1 are not in the folder: {gone.name}"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["../copy/model.safetensors", "x" * 5000, "a\0b", ".", ""])
def test_an_index_cannot_lead_out_of_the_folder(copy, saved, name):
    index = {"weight_map": {"lm_head.weight": str(saved[0] / "model.safetensors"), "a": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="2 are not in the folder"):
        load_model(copy)


@pytest.mark.parametrize(
    "place, message",
    [
        ({"dtype": "bf16"}, "dtype='bf16'; give None"),
        ({"dtype": torch.int8}, "dtype=torch.int8; give None"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn; give None"),
        ({"device": "nowhere"}, "device='nowhere', which cannot be used here"),
        ({"device": "meta"}, "device='meta', which holds no weights"),
    ],
)
def test_a_place_that_cannot_hold_a_model_is_refused(saved, place, message):
    with pytest.raises(UserError, match=message):
        load_model(saved[0], **place)


def test_a_file_for_which_there_is_no_address_space_is_named(copy, saved, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(shards.mmap, "mmap", full)
    with pytest.raises(UserError, match=r"cannot map .*model.safetensors .* ulimit -v"):
        load_model(copy)


def test_a_tensor_in_two_files_is_refused(tmp_path, saved):
    save_model(saved[1], tmp_path / "model", shard_bytes=20_000)
    first, second = sorted((tmp_path / "model").glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(UserError, match="is in .* and in "):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    "content,message",
    [("", "not valid JSON"), ("{", "not valid JSON"), ("[]", "holds list"), ("\x00\udcff", "can't decode byte 0xff")],
)
def test_an_unreadable_config_is_refused_by_name(copy, content, message):
    (copy / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"config\.json.* {message}"):
        load_model(copy)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(copy, file):
    (copy / file).unlink()
    os.mkfifo(copy / file)
    with pytest.raises(UserError, match=file):
        load_model(copy)


@pytest.mark.parametrize("stops", [-1, 97, 2**31, 2**70, 1.5, "2", True, [2, "x"], [[2]], {"a": 1}])
def test_stop_ids_that_are_no_tokens_are_refused_by_name(copy, stops):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(UserError, match=r"copy.*eos_token_id=.* must be token ids.*correct"):
        load_model(copy)


def test_stop_ids_beyond_the_vocabulary_are_refused_in_config_json_too(copy):
    (copy / "generation_config.json").unlink()
    edit(copy, eos_token_id=[2, 97])
    with pytest.raises(UserError, match=r"eos_token_id=\[97\] must be token ids in 0\.\.96"):
        load_model(copy)


def test_a_padding_id_that_is_no_token_is_harmless(copy):
    edit(copy, pad_token_id=-1)
    assert load_model(copy).config.pad == 0


@pytest.mark.parametrize("layout,message", [("legacy", "000,000,000 experts"), ("stacked", " of another shape")])
def test_more_experts_than_can_be_listed_are_refused_at_once(copy, saved, layout, message):
    respell(copy, saved[1], layout)
    edit(copy, n_routed_experts=10**15)
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        load_model(copy)
    assert time.monotonic() - begin < 5 and len(str(caught.value)) < 5000


def test_a_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(copy)


def test_an_unknown_config_key_is_refused_with_a_suggestion_and_the_file(copy):
    edit(copy, mamba_num_head=6)
    with pytest.raises(UserError, match=r"config\.json: .*'mamba_num_head'.*did you mean 'mamba_num_heads'"):
        load_model(copy)


def test_a_config_of_another_size_names_the_tensors(copy):
    edit(copy, hidden_size=64)
    with pytest.raises(
        UserError, match=r"backbone\.embeddings\.weight is \[97, 32\], config\.json asks for \[97, 64\]"
    ):
        load_model(copy)


def test_undeclared_quantised_tensors_are_refused_by_name(copy):
    name = "backbone.layers.0.mixer.in_proj"
    codes = lambda tensors: tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    rewrite(copy, lambda tensors: tensors.update({f"{name}.weight": codes(tensors)}))
    with pytest.raises(
        UserError, match=rf"{name} in model\.safetensors: its weight is F8_E4M3, and its weight_scale is"
    ):
        load_model(copy)


def test_tensors_of_types_that_no_weight_has_are_refused_by_name(copy):
    name = "backbone.layers.0.mixer.in_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({name: tensors[name].to(torch.int16)}))
    with pytest.raises(UserError, match=rf"type: {name} is I16; only BF16, F32, F16"):
        load_model(copy)


def test_a_source_that_is_neither_folder_nor_id_is_refused():
    with pytest.raises(UserError, match="neither a folder nor the id of a hub repository"):
        load_model("/no/such/folder")


def test_a_hub_id_is_fetched_without_code_or_pickles(monkeypatch, saved):
    asked = {}

    def fetch(name, patterns):
        asked[name] = patterns
        return saved[0]

    monkeypatch.setattr(weights, "hub_folder", fetch)
    assert_same(load_model("owner/name"), saved[1])
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["owner/name"])


# ----- a save that fails ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_at_most(size: int):
    """The kernel refuses larger files, as a full disk would in the middle of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_breaks_off_leaves_the_previous_checkpoint(copy, saved):
    with files_at_most(8000), pytest.raises(UserError, match="a file of it would be larger"):
        save_model(small("nano"), copy)
    assert_same(load_model(copy), saved[1])
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("shard", [1, 3])
def test_a_full_disk_is_one_clear_message_and_leaves_the_previous_checkpoint(copy, saved, shard, monkeypatch):
    written = []

    def write(tensors, file, metadata):
        written.append(file)
        if len(written) == shard:
            raise shards.SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})")
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(shards, "save_file", write)
    with pytest.raises(UserError, match="disk is full"):
        save_model(small("nano"), copy, shard_bytes=5000)
    assert_same(load_model(copy), saved[1])
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_checkpoint_is_found_again_after_a_kill_between_the_renames_of_a_save(copy, saved):
    copy.rename(copy.with_name(".copy.old"))
    assert_same(load_model(copy), saved[1])


def test_a_failure_that_is_no_full_disk_is_not_called_one(copy, monkeypatch):
    def write(tensors, file, metadata):
        raise shards.SafetensorError("something else")

    monkeypatch.setattr(shards, "save_file", write)
    with pytest.raises(shards.SafetensorError, match="something else"):
        save_model(small("nano"), copy)


def test_files_say_that_they_are_for_torch(saved):
    with safe_open(saved[0] / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
