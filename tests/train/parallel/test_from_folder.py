"""Training that begins with a folder of weights: in any layout the same, written again the same, few bits refused."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import nautilus
from nautilus.cli import main
from nautilus.data.tokenizer import train_tokenizer
from nautilus.model.language import Language
from nautilus.model.linear import Linear
from nautilus.model.save import save_model
from nautilus.model.weights import stored_weights
from nautilus.ops.encode import encode
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError, read_metrics

FILE = pathlib.Path(__file__).parents[1] / "ranks.py"
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)
TEXT = [f"Part {n}. " + " ".join(f"{i} comes before {i + 1}." for i in range(n, n + 60)) for n in range(20)]


def small(**changes):
    return dataclasses.replace(shrink(preset("super"), layers=4, width=32), vocab=400, **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    here = tmp_path_factory.mktemp("text")
    for number, one in enumerate(TEXT):
        (here / f"{number}.txt").write_text(one)
    return here


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder as models are released: BF16, experts one by one, in several files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("release") / "model"
    model = Language(small()).initialise(5)
    with torch.no_grad():
        for mixer in model.experts_mixers().values():
            mixer.gate.bias.uniform_(-0.1, 0.1)
    save_model(model, folder, precision="bf16", tokenizer=train_tokenizer(TEXT, vocab=380), shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor.float() for name, tensor in found.items()}


STILL = (
    "rows=2 length=48 steps=2 optim.lr=0 optim.min_lr=0 optim.warmup=0 optim.decay=0 balance=0 prompts=a compute=fp32"
)


@pytest.fixture(scope="module")
def begun(release, text, tmp_path_factory):
    """A function that gives the run of two updates of rate zero that begins with the release, in a layout."""
    known = {}

    def run(*layout):
        if layout not in known:
            out = tmp_path_factory.mktemp("begun") / "run"
            words = [f"from={release}", f"data={text}", f"out={out}", *STILL.split(), *layout]
            command = [sys.executable, "-m", "nautilus", "pretrain", *words]
            environment = os.environ | helper.ALIKE
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=helper.PATIENCE)
            assert done.returncode == 0, done.stderr[-3000:]
            known[layout] = out
        return known[layout]

    return run


LAYOUTS = [(), ("layout.tp=2", "layout.ep=2"), ("layout.dp=2",), ("layout.cp=2", "layout.ep=2")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_in_any_layout_the_weights_are_those_of_the_folder_before_and_after(begun, release, layout):
    run = begun(*layout)
    want = [line["loss"] for line in read_metrics(begun() / "metrics.jsonl")]
    assert [line["loss"] for line in read_metrics(run / "metrics.jsonl")] == pytest.approx(want, rel=1e-5)
    got, told = tensors(run / "model"), tensors(release)
    assert got.keys() == told.keys()
    assert [name for name in told if not torch.equal(got[name], told[name])] == []
    assert (run / "model" / "tokenizer.json").read_text() == (release / "tokenizer.json").read_text()
    assert json.loads((run / "origin.json").read_text()) == {"folder": str(release), "step": -1}


def test_tensors_come_one_at_a_time_by_the_models_names(release):
    model = Language(small()).initialise(5)
    places = model.state_dict()
    seen = dict(stored_weights(release, model.config))
    assert seen.keys() == places.keys()
    want = Language(small()).initialise(5).state_dict()
    for name, tensor in seen.items():
        if not name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor.float(), want[name].bfloat16().float()), name


def test_another_models_folder_and_a_tied_head_that_differs_are_refused(release, tmp_path):
    with pytest.raises(UserError, match="holds another model: it differs in .* leave model settings"):
        dict(stored_weights(release, shrink(preset("super"), layers=4, width=32)))
    tied = Language(small(tied=True)).initialise(0)
    tied.save(tmp_path / "tied")
    assert dict(stored_weights(tmp_path / "tied", tied.config)).keys() == tied.state_dict().keys()


def test_few_bits_are_refused_with_the_way_to_numbers_which_works(text, tmp_path, capsys):
    folder = tmp_path / "few"
    model = Language(small(), dtype=torch.bfloat16).initialise(5)
    for module in model.modules():
        if isinstance(module, Linear) and module is not model.lm_head and module.weight.shape[1] % 16 == 0:
            module.hold(encode(module.weight.detach().float(), "nvfp4"))
    model.save(folder, tokenizer=train_tokenizer(TEXT, vocab=380))
    assert main(["pretrain", f"from={folder}", f"out={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert re.search(r"matrices in .*NVFP4, which cannot be trained; take the BF16 release", message)
    exec(re.search(r'-c "(.*)"', message)[1], {})
    numbers = nautilus.load(f"{folder}-bf16")[0]
    assert dict(stored_weights(pathlib.Path(f"{folder}-bf16"), numbers.config)).keys() == numbers.state_dict().keys()
    words = [f"from={folder}-bf16", f"data={text}", f"out={tmp_path / 'run'}", "steps=1", "rows=1", "optim.warmup=0"]
    assert main(["pretrain", *words, "--show"]) == 0
