"""The llama.cpp contestant, as far as it goes without llama.cpp: names, shapes and values of the files it reads."""

import dataclasses
import pathlib

import numpy as np
import pytest

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, lay
from nautilus.data.tokenizer import SMALLEST, train_tokenizer

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
TINY = Config(
    vocab=320,
    width=256,
    layers=lay(
        "ME*E",
        Mamba(heads=8, head_width=32, state=16, groups=2),
        Attention(heads=4, groups=2, head_width=64),
        Experts(experts=4, active=2, hidden=320, shared=192, latent=128, scale=2.5),
    ),
)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers import gguf_file, llama_cpp

    return gguf_file, llama_cpp


def read(peers, path, format, shape=TINY, seed=0):
    gguf = pytest.importorskip("gguf")
    peers[0].write_gguf(path, shape, format, seed)
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("format", ["Q4_0", "NVFP4", "MXFP4", "IQ4_NL", "Q4_K"])
def test_every_matrix_has_zero_mean_and_the_spread_that_keeps_activations_near_one(tmp_path, peers, format):
    gguf = pytest.importorskip("gguf")
    scales = {}
    for tensor in read(peers, tmp_path / "tiny.gguf", format).tensors:
        if tensor.name.endswith(".scale"):
            scales[tensor.name.replace(".scale", ".weight")] = float(tensor.data.flat[0])
    assert bool(scales) == (format == "NVFP4")
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        if tensor.tensor_type.name not in ("F32", "F16"):
            values = gguf.dequantize(tensor.data, tensor.tensor_type) * scales.get(tensor.name, 1)
            std = 1 if tensor.name == "token_embd.weight" else values.shape[-1] ** -0.5
            assert 0.7 * std < values.std() < 1.4 * std, tensor.name
            assert abs(values.mean()) < 0.05 * std, tensor.name


def test_every_expert_has_bytes_of_its_own_and_a_seed_repeats_them(tmp_path, peers):
    first, again, other = (read(peers, tmp_path / f"{i}.gguf", "Q4_0", seed=i // 2) for i in range(3))
    for one, two, three in zip(first.tensors, again.tensors, other.tensors, strict=True):
        assert np.array_equal(one.data, two.data)
        if "exps" in one.name:
            assert len({expert.tobytes() for expert in one.data}) == 4
            assert not np.array_equal(one.data, three.data)


def test_the_settings_and_shapes_are_those_that_llama_cpp_reads(tmp_path, peers):
    reader = read(peers, tmp_path / "tiny.gguf", "Q4_K")
    value = lambda key: reader.fields[f"nemotron_h_moe.{key}"].contents()
    assert value("attention.head_count_kv") == [0, 0, 2, 0]
    assert value("feed_forward_length") == [0, 320, 0, 320]
    assert (value("ssm.inner_size"), value("ssm.time_step_rank"), value("moe_latent_size")) == (256, 8, 128)
    assert (value("expert_used_count"), value("expert_weights_scale"), value("expert_weights_norm")) == (2, 2.5, True)
    # Shapes as llama.cpp writes them, the row first.
    got = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert got["blk.0.ssm_in.weight"] == ("Q4_K", [256, 2 * 256 + 2 * 2 * 16 + 8])
    assert got["blk.0.ssm_conv1d.weight"] == ("F32", [4, 256 + 2 * 2 * 16])
    assert got["blk.0.ssm_norm.weight"] == ("F32", [128, 2])
    assert got["blk.0.ssm_a"] == ("F32", [1, 8])
    assert got["blk.1.ffn_gate_inp.weight"] == ("F32", [256, 4])
    assert got["blk.1.ffn_up_exps.weight"] == ("Q5_0", [128, 320, 4])
    assert got["blk.1.ffn_down_exps.weight"] == ("Q5_0", [320, 128, 4])
    assert got["blk.1.ffn_latent_down.weight"] == ("Q4_K", [256, 128])
    assert got["blk.2.attn_k.weight"] == ("Q4_K", [256, 128])


def test_with_our_tokenizer_the_file_has_its_words_merges_and_template(tmp_path, peers):
    gguf = pytest.importorskip("gguf")
    tokenizer = train_tokenizer(["the cat and the dog sat there " * 20], vocab=TINY.vocab - 4)
    peers[0].write_gguf(tmp_path / "chat.gguf", TINY, "Q4_0", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "chat.gguf").fields
    value = lambda key: fields[f"tokenizer.{key}"].contents()
    words, kinds = value("ggml.tokens"), value("ggml.token_type")
    assert len(words) == len(kinds) == TINY.vocab and words[-1].startswith("[unused")
    assert (kinds[tokenizer.eos], kinds[tokenizer.control["<think>"]], kinds[100], kinds[-1]) == (3, 4, 1, 5)
    assert "".join(words[id] for id in tokenizer.encode(" the cat")).replace("\u0120", " ") == " the cat"
    assert len(value("ggml.merges")) == tokenizer.vocab - SMALLEST and value("ggml.merges")[0].count(" ") == 1
    assert value("chat_template") == tokenizer.template and value("ggml.eos_token_id") == tokenizer.eos


def test_the_blocks_are_as_large_as_the_gguf_package_has_them(peers):
    gguf = pytest.importorskip("gguf")
    for name, (codes, size, _) in peers[0].BLOCK.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (codes, size)


@pytest.mark.parametrize(
    ("format", "layers", "said"),
    [
        ("NVFP4", (dataclasses.replace(TINY.layers[1], hidden=96), TINY.layers[0], TINY.layers[2]), "blocks of 64"),
        ("Q4_0", (*TINY.layers, Mlp(hidden=256)), "use those three"),
    ],
)
def test_a_shape_that_cannot_be_written_is_refused_and_leaves_no_file(tmp_path, peers, format, layers, said):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=said):
        peers[0].write_gguf(tmp_path / "no.gguf", dataclasses.replace(TINY, layers=layers), format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "gigabytes"), [("nano", 2.32), ("super", 3.4)])
def test_the_slices_have_layers_of_full_width_and_fit_a_small_machine(peers, name, gigabytes):
    gguf_file, llama_cpp = peers
    listed = list(gguf_file.tensors(llama_cpp.shape(name), "Q4_0"))
    size = sum(np.prod(gguf_file.stored(*each)) * (1 if each[2] in gguf_file.BLOCK else 4) for each in listed)
    assert size / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_of_several_settings_the_fastest_is_reported(peers, monkeypatch):
    llama_cpp = peers[1]
    row = '{"samples_ts": [%s], "flash_attn": %d}'
    monkeypatch.setattr(llama_cpp, "output", lambda command: f"[{row % ('3, 5', 0)}, {row % ('4, 7', 1)}]")
    tools = llama_cpp.Tools(**{name: pathlib.Path(name) for name in llama_cpp.PROGRAMS})
    speed = llama_cpp.decode(tools, pathlib.Path("x.gguf"))
    assert (speed.best, speed.median, speed.settings) == (7, 5.5, "flash attention on")
