"""Trainings that follow others, through the command as a person gives it. One small layer each, four rows of text."""

import dataclasses
import json
import math
import re
import shutil

import pytest
from safetensors.torch import load_file

from nautilus.cli import main
from nautilus.cli.settings import resolve
from nautilus.config import PrecisionTable
from nautilus.recipes.pretrain import Settings
from nautilus.runtime import Run, read_metrics
from nautilus.train.checkpoint import state_folders
from nautilus.train.continuing import restored
from nautilus.train.optim import learning_rate, schedule

SMALL = (
    "toy rows=4 length=16 save_every=3 optim.warmup=2 optim.lr=1e-2 optim.min_lr=1e-4 model.vocab=300 prompts=a "
    "model.layers=M* model.mtp= mtp_depths=0 model.width=32 model.layers.M.heads=2 model.layers.*.head_width=8 "
    "compute=fp32"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    here = tmp_path_factory.mktemp("text")
    for number in range(12):
        counting = " ".join(f"{n} comes before {n + 1}." for n in range(number, number + 40))
        (here / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    return here


@pytest.fixture(scope="module", autouse=True)
def no_report(text):
    """What is measured after training is none of this file's business, and takes most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nautilus.recipes.pretrain.examine", lambda *given, **named: (None, []))
        yield


@pytest.fixture(scope="module")
def pretrain(text):
    def go(out, *words, plain=True):
        given = SMALL.split() if plain else []
        return main(["pretrain", *given, f"out={out}", *([f"data={text}"] if plain else []), *words])

    return go


@pytest.fixture(scope="module")
def ten(tmp_path_factory, pretrain):
    """Ten updates, the last five of them decaying."""
    out = tmp_path_factory.mktemp("ten") / "run"
    assert pretrain(out, "steps=10", "optim.decay=0.5") == 0
    return Run(out)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory, pretrain):
    out = tmp_path_factory.mktemp("twenty") / "run"
    assert pretrain(out, "steps=20", "optim.decay=0.5") == 0
    return Run(out)


def copied(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    return Run(tmp_path / "copy")


def state_of(run, step):
    folder = run.state / f"step_{step:09}"
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")
    return {name: value for name, value in tensors.items() if not name.startswith("random.")}  # nothing is drawn


def same(got, want):
    assert got.keys() == want.keys()
    return [name for name in want if not got[name].equal(want[name])] == []


def rates(run):
    return [row["lr"] for row in read_metrics(run.metrics)]


def test_a_run_keeps_the_state_that_a_longer_one_goes_on_from(ten):
    assert [folder.name for folder in state_folders(ten)] == [f"step_{n:09}" for n in (5, 9, 10)]


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_always_had_them(ten, twenty, pretrain, tmp_path):
    longer = copied(ten, tmp_path)
    assert pretrain(longer.folder, "steps=20", "optim.decay=0.5") == 0
    assert same(state_of(longer, 20), state_of(twenty, 20))
    strip = lambda run: [(row["step"], row["loss"], row["lr"]) for row in read_metrics(run.metrics)]
    assert strip(longer) == strip(twenty) and len(strip(longer)) == 20
    assert longer.settings["steps"] == 20


def test_a_run_whose_rates_would_have_been_others_is_not_extended(ten, pretrain, tmp_path, capsys):
    longer = copied(ten, tmp_path)
    assert pretrain(longer.folder, "steps=20", "optim.decay=0.5", "optim.warmup=1") == 2
    assert "others from update 0 on" in capsys.readouterr().err
    assert pretrain(longer.folder, "steps=20", "optim.decay=0.5", "seed=1") == 2
    assert "seed" in capsys.readouterr().err
    assert len(state_folders(longer)) == 3


def test_a_decay_begins_at_once_from_any_state(twenty, pretrain, tmp_path):
    """From update 9 of 20: the same text and the same state as there, the rate falling over 4 updates."""
    out, source = tmp_path / "annealed", twenty.folder
    assert pretrain(out, f"from={source}/state/step_{10:09}", "anneal=4", plain=False) == 0
    optim = dataclasses.replace(resolve(Settings, [*SMALL.split(), "steps=14"]).optim, warmup=0, decay=4 / 14)
    want = [learning_rate(step + 1, 14, optim) for step in range(10, 14)]
    assert rates(Run(out)) == pytest.approx(want) and want[-1] == pytest.approx(1e-4) and want[0] < 0.6e-2
    first, there = read_metrics(Run(out).metrics)[0], read_metrics(twenty.metrics)[10]
    assert (first["step"], first["loss"], first["tokens"]) == (10, there["loss"], there["tokens"])


def test_an_interrupted_decay_resumes_where_it_began_even_if_the_other_run_went_on(ten, pretrain, tmp_path):
    source, out, whole = copied(ten, tmp_path), tmp_path / "part", tmp_path / "whole"
    words = f"from={source.folder}", "anneal=6", "save_every=2"
    assert pretrain(whole, *words, plain=False) == 0
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(out / "state" / f"step_{16:09}")
    shutil.rmtree(source.state)
    assert pretrain(out, *words, plain=False) == 0
    assert same(state_of(Run(out), 16), state_of(Run(whole), 16))


def test_a_new_phase_starts_at_step_zero_with_weights_moments_and_the_last_rate(ten, pretrain, tmp_path, text):
    out = tmp_path / "later"
    words = f"from={ten.folder}", "steps=3", "save_every=1", "lengths=0.5*64,0.5*8"
    assert pretrain(out, *words, plain=False) == 0
    assert rates(Run(out)) == pytest.approx([1e-4] * 3)
    assert [row["step"] for row in read_metrics(Run(out).metrics)] == [0, 1, 2]
    assert [row["tokens"] for row in read_metrics(Run(out).metrics)] == [64, 128, 192]
    assert json.loads((out / "origin.json").read_text())["step"] == 10
    assert Run(out).settings["data"] == [str(text)]
    moments = {name: value for name, value in state_of(Run(out), 3).items() if name.endswith(".step")}
    assert moments and all(value == 13 for value in moments.values())


def test_weights_alone_start_with_moments_of_their_own(ten, pretrain, tmp_path):
    out, source = tmp_path / "weights", ten.model
    words = (
        "steps=1",
        "rows=4",
        "length=16",
        "mtp_depths=0",
        "optim.warmup=0",
        "prompts=a",
        f"data={ten.folder}/config.json",
    )
    assert pretrain(out, f"from={source}", *words, "optim.decay=0", "optim.lr=0", "optim.min_lr=0", plain=False) == 0
    assert all(value == 1 for name, value in state_of(Run(out), 1).items() if name.endswith(".step"))
    got, want = load_file(out / "model" / "model.safetensors"), load_file(source / "model.safetensors")
    assert same(got, want)


def test_a_model_without_a_block_for_more_tokens_trains_none():
    depths = lambda *words: resolve(Settings, words).mtp_depths
    assert depths("toy") == depths("toy_1m", "model.mtp=*E") == 2
    assert depths("toy_1m") == depths("toy", "model.mtp=") == depths("toy_1m", "recipe=super") == 0
    assert depths("toy_1m", "mtp_depths=2") == 2, "what was asked for is refused later, not dropped"


def test_a_published_recipe_sets_what_is_not_given(ten):
    asked = resolve(Settings, ["toy", "recipe=super", "steps=5000", "optim.lr=1e-3", "length=256"])
    assert (asked.optim.lr, asked.optim.min_lr, asked.optim.warmup, asked.optim.decay) == (1e-3, 4.5e-6, 40, 0.2)
    assert (asked.steps, asked.average, asked.average_every, asked.reset) == (5000, 20, 5, False)
    assert asked.model == Settings().model and asked.mtp_weight == 0.3
    layers = len(asked.model.layers)
    assert asked.precision == PrecisionTable(format="nvfp4", last_layers=math.ceil(14 / 88 * layers))
    assert resolve(Settings, ["super", "recipe=super"]).precision.last_layers == 14
    deeper = resolve(Settings, ["recipe=ultra", "model.layers=" + "ME*" * 18, "precision.mamba_out=nvfp4"])
    assert (deeper.precision.last_layers, deeper.precision.mamba_out) == (8, "nvfp4")
    own = resolve(
        Settings, ["super", "recipe=super", "precision.last_layers=3", "reset=true", "precision.format=mxfp8"]
    )
    assert own.precision == PrecisionTable(format="mxfp8", last_layers=3) and own.reset
    assert not resolve(Settings, ["recipe=nano", "mtp_depths=0"]).precision.on
    later = resolve(Settings, [f"from={ten.folder}", "recipe=ultra_long", "length=1024", "rows=200", "steps=9"])
    assert later.lengths == ("0.92*131072", "0.08*512") and later.mixing == "turns"
    assert [schedule(later.optim, 9)(step) for step in range(9)] == pytest.approx([1e-4] * 9)


@pytest.mark.parametrize(
    "words, message",
    [
        (["recipe=super_long"], "give from=RUN"),
        (["recipe=nani"], "nano"),
        (["anneal=5"], "give from=RUN"),
        (["from=nowhere"], "no run, no saved state"),
        (["from={model}", "anneal=5"], "weights only"),
        (["from={run}", "out={run}"], "one folder"),
        (["from={run}", "anneal=5", "steps=9"], "leave steps out"),
        (["lengths=3*x"], "share.tokens"),
    ],
)
def test_what_cannot_follow_is_refused(ten, tmp_path, capsys, words, message):
    given = [word.format(run=ten.folder, model=ten.model) for word in words]
    assert main(["pretrain", f"out={tmp_path / 'out'}", *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_settings_come_back_from_the_file_as_they_were(ten):
    asked = resolve(Settings, [*SMALL.split(), "steps=10", f"out={ten.folder}", "optim.decay=0.5"])
    kept = restored(Settings, ten.settings)
    assert dataclasses.replace(kept, data=asked.data) == asked


def test_a_hub_id_is_the_folder_that_its_copy_lies_in(ten, text, pretrain, tmp_path, monkeypatch):
    copy, asked = ten.folder / "model", []
    monkeypatch.setattr("nautilus.train.continuing.local_folder", lambda name: asked.append(str(name)) or copy)
    words = f"data={text}", "steps=1", "rows=4", "length=16", "compute=fp32", "optim.lr=0", "optim.min_lr=0"
    for out, source in (("hub", "owner/name"), ("folder", copy)):
        assert pretrain(tmp_path / out, f"from={source}", *words, plain=False) == 0
    assert set(asked) == {"owner/name"}
    assert json.loads((tmp_path / "hub" / "origin.json").read_text())["folder"] == str(copy)
    assert same(state_of(Run(tmp_path / "hub"), 1), state_of(Run(tmp_path / "folder"), 1))


@pytest.mark.parametrize("origin", ['{"a": 1}', '{"folder": 3, "step": "x"}', "{}"])
def test_a_damaged_origin_is_named(ten, pretrain, tmp_path, capsys, origin):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "origin.json").write_text(origin)
    assert pretrain(tmp_path / "out", f"from={ten.folder}", plain=False) == 2
    assert "origin.json has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [{"model": 5}, {"optim": None}, {"optim": {"lr": "x"}}, {"data": 5}, {"steps": "many"}],
)
def test_damaged_settings_of_a_run_are_named(ten, pretrain, tmp_path, capsys, damage):
    run = copied(ten, tmp_path)
    run.write_settings(run.settings | damage)
    assert pretrain(tmp_path / "later", f"from={run.folder}", "steps=3", plain=False) == 2
    assert pretrain(run.folder, "steps=20") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("config.json has settings that cannot be" in line for line in said)
