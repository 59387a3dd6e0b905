"""The writer of folders that are laid out as released ones."""

import importlib.util
import json
import math
import pathlib
import types

import pytest
import torch
from safetensors.torch import load_file

from nautilus.model.held import held_by
from nautilus.model.released import SCHEMES, bytes_of, released_tensors
from nautilus.model.weights import load_model
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "write_released.py"
spec = importlib.util.spec_from_file_location("write_released", FILE)
assert spec is not None and spec.loader is not None
written = importlib.util.module_from_spec(spec)
spec.loader.exec_module(written)


def toy(scheme):
    name = "lightning" if scheme == "bf16" else scheme.partition("_")[0]
    return shrink(preset(name), layers=8, width=64)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_folder_opens_and_computes_finite_numbers(scheme, tmp_path):
    config = toy(scheme)
    written.write(config, scheme, tmp_path)
    model = load_model(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) <= SCHEMES[scheme].shards and not list(tmp_path.glob("*.part"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    table = released_tensors(config, scheme)
    assert {name: (tuple(t.shape), t.nbytes) for name, t in tensors.items()} == {
        name: (entry[1], bytes_of(entry)) for name, entry in table.items()
    }
    logits, _ = model(torch.arange(40)[None] % config.vocab)
    assert logits.isfinite().all() and 0.01 < logits.std() < 100
    said = "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    assert said == SCHEMES[scheme].in_config
    assert (tmp_path / "hf_quant_config.json").exists() == bool(SCHEMES[scheme].rules)


@pytest.mark.parametrize("scheme", ["nano_nvfp4", "super_nvfp4"])
def test_matrices_are_of_the_size_that_trained_ones_are(scheme, tmp_path):
    written.write(toy(scheme), scheme, tmp_path)
    model = load_model(tmp_path)
    for place, one in held_by(model).items():
        assert 0.015 < one.matrix.decode().std() < 0.025, place
        assert one.input_scale is not None and one.input_scale > 0
    assert 0.015 < model.lm_head.weight.float().std() < 0.025
    assert 0.3 < model.backbone.layers[0].mixer.conv1d.weight.float().std() < 0.5
    assert (model.backbone.norm_f.weight == 1).all()


def test_what_is_there_is_kept_and_the_rest_is_written_as_it_would_have_been(tmp_path):
    config = toy("nano_nvfp4")
    written.write(config, "nano_nvfp4", tmp_path / "whole")
    written.write(config, "nano_nvfp4", tmp_path / "halted")
    first, second, third = sorted((tmp_path / "halted").glob("*.safetensors"))[:3]
    second.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    before = first.stat().st_mtime_ns
    written.write(config, "nano_nvfp4", tmp_path / "halted")
    assert first.stat().st_mtime_ns == before
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "halted" / file.name).read_bytes() == file.read_bytes(), file.name
    written.write(config, "nano_nvfp4", tmp_path / "halted", seed=1)  # files of another seed are not kept
    assert first.stat().st_mtime_ns != before


def test_every_number_lies_at_a_multiple_of_its_size(tmp_path):
    written.write(toy("super_nvfp4"), "super_nvfp4", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        assert all(t.data_ptr() % t.element_size() == 0 for t in load_file(file).values())


def test_memory_is_bounded_by_pieces():
    sizes = list(written.pieces(3 * written.PIECE + 5))
    assert max(sizes) == written.PIECE and sum(sizes) == 3 * written.PIECE + 5
    assert written.PIECE * 8 < 1 << 30


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(written.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1 << 28))
    with pytest.raises(UserError, match=r"nano needs 0\.0 GB, 0\.3 GB are free; choose another folder"):
        written.write(toy("nano_nvfp4"), "nano_nvfp4", tmp_path / "nano")
    assert list((tmp_path / "nano").iterdir()) == []


def test_files_are_as_many_as_asked_and_of_nearly_the_same_size():
    sizes = {name: bytes_of(entry) for name, entry in released_tensors(preset("nano"), "nano_nvfp4").items()}
    groups = [sum(sizes[name] for name in group) for group in written.shared_out(sizes, 5)]
    assert len(groups) == 5 and sum(groups) == 19_339_781_632
    assert max(groups) < 1.05 * math.ceil(sum(groups) / 5)
