"""`nautilus boost` and `nautilus eagle`: whole folders, gone on with after an interruption, models left as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file

import nautilus
from nautilus.cli import main
from nautilus.model.eagle import load_eagle
from nautilus.posttrain.drafter import Drafter
from nautilus.runtime import read_metrics
from nautilus.serve import Engine
from tests.posttrain.small import TOKENIZER, counter

torch.set_num_threads(1)
SMALL = "answers=24 measured=5 tokens=24 prompt_tokens=6 drafts=3 steps=5 rows=4 save_every=2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("drafters") / "counter"
    counter().save(here, precision="fp32", tokenizer=TOKENIZER)
    return here


def weights(folder):
    return load_file(folder / "model.safetensors")


def boost(folder, out, *words):
    return main(["boost", str(folder), f"out={out}", *SMALL, *words])


def test_boost_writes_a_whole_model_whose_trunk_is_bit_for_bit_the_same(folder, tmp_path, capsys):
    assert boost(folder, tmp_path / "out") == 0
    old, new = weights(folder), weights(tmp_path / "out" / "model")
    assert old.keys() == new.keys() and all(old[name].dtype == new[name].dtype for name in old)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)
    model, tokenizer = nautilus.load(tmp_path / "out")
    assert Engine(model, tokenizer, max_tokens=32).generate([[101, 102]])[0].tokens
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown and f"serve {tmp_path / 'out'}" in shown
    found = json.loads((tmp_path / "out" / "results.json").read_text())["lengths"]
    assert [(each["drafter"], each["texts"]) for each in found] == [
        ("before", "greedy"), ("before", "temperature 1"), ("after", "greedy"), ("after", "temperature 1"),
    ]  # fmt: skip
    assert all(1 <= each["low"] <= each["length"] <= each["high"] <= 4 for each in found)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "Tokens a pass" in (tmp_path / "out" / "report.html").read_text()


def test_an_interrupted_boost_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch, capsys):
    assert boost(folder, tmp_path / "whole") == 0
    plain, calls = Drafter.divergence, []

    def interrupted(self, *given, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Drafter, "divergence", interrupted)
        assert boost(folder, tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "model").exists()
    written = (tmp_path / "cut" / "state" / "answers.jsonl").read_bytes()
    assert boost(folder, tmp_path / "cut") == 0
    assert "after step 2 of 5" in capsys.readouterr().err
    assert (tmp_path / "cut" / "state" / "answers.jsonl").read_bytes() == written
    whole, cut = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [*range(5)]
    assert boost(folder, tmp_path / "cut", "seed=1") == 2
    assert "seed (begun with 0, now 1)" in capsys.readouterr().err


def test_a_block_in_bf16_learns_in_float32_and_is_written_in_bf16(folder, tmp_path):
    counter().save(tmp_path / "half", precision="bf16", tokenizer=TOKENIZER)
    assert boost(tmp_path / "half", tmp_path / "out") == 0
    old, new = weights(tmp_path / "half"), weights(tmp_path / "out" / "model")
    assert all(old[name].dtype == new[name].dtype for name in old)
    assert {name for name in old if not torch.equal(old[name], new[name])} <= {name for name in old if "mtp." in name}


def test_eagle_writes_a_head_for_the_model_with_or_without_a_block(folder, tmp_path, capsys):
    counter("").save(tmp_path / "plain", precision="fp32", tokenizer=TOKENIZER)
    for place, told in ((folder, "its block"), (tmp_path / "plain", "head")):
        out = tmp_path / f"eagle-{place.name}"
        assert main(["eagle", str(place), f"out={out}", "words=40", *SMALL]) == 0
        head = load_eagle(out, nautilus.load(place)[0])
        assert len(head.token_ids_K) == 40 and {*range(100, 116)} <= {*head.token_ids_K.tolist()}
        assert told in capsys.readouterr().out and (out / "report.html").is_file()


@pytest.mark.parametrize(
    "words, message",
    [
        (["boost"], "no model to boost"),
        (["eagle"], "no model to draft for"),
        (["boost", "{folder}", "tokens=8"], "tokens=8 of an answer hold no draft of drafts=7"),
        (["boost", "{folder}", "sampled=0"], "sampled=0.0 must be positive"),
        (["boost", "{folder}", "steps=0"], "steps=0 must be at least 1"),
        (["boost", "{folder}", "temperature=0"], "temperature=0.0 must be positive"),
        (["boost", "{folder}", "tokens=999999999"], "lower tokens or prompt_tokens"),
        (["boost", "{folder}", "prompts=nowhere"], "no text at 'nowhere'"),
        (["boost", "{plain}"], "no multi-token-prediction block"),
        (["eagle", "{folder}", "words=0"], "words=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(folder, tmp_path, capsys, words, message):
    counter("").save(tmp_path / "plain", precision="fp32", tokenizer=TOKENIZER)
    asked = [word.format(folder=folder, plain=tmp_path / "plain") for word in words]
    assert main([*asked, *([f"out={tmp_path / 'out'}"] if len(asked) > 1 else [])]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
