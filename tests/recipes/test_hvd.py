"""From prompts to a predictor that belongs to the model, with nothing asked twice."""

import dataclasses
import json
import random

import pytest
import torch

from nautilus.cli import main
from nautilus.config import Config, Experts, lay
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.posttrain import payoff
from nautilus.runtime import Run, UserError
from nautilus.serve import Engine
from nautilus.serve.draft.predictor import load_predictor
from nautilus.serve.prefixes import fingerprint
from tests.serve.test_scheduler import ATTENTION, MAMBA

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([], vocab=SMALLEST)


def model_of(seed=3):
    layers = lay("ME*M", MAMBA, ATTENTION, Experts(experts=6, active=2, hidden=32))
    model = Language(Config(vocab=TOKENIZER.vocab, width=64, positions=200, layers=layers)).initialise(seed)
    with torch.no_grad():
        model.state_dict()["lm_head.weight"].mul_(6)  # so that greedy answers run into circles, which can be copied
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    here, draw = tmp_path_factory.mktemp("hvd"), random.Random(0)
    model_of().save(here / "model", precision="fp32", tokenizer=TOKENIZER)
    words = ["red", "green", "blue", "one", "two", "three"]
    rows = [{"prompt": " ".join(draw.choice(words) for _ in range(9))} for _ in range(7)]
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return here


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        for name, plan in payoff.PLANS.items():
            patch.setitem(payoff.PLANS, name, dataclasses.replace(plan, epochs=3, hidden=16))
        yield


def words(here, out, *more):
    return ["hvd", "train", str(here / "model"), f"out={out}", "answer=60", "drafts=9", "max_tokens=160", *more]


@pytest.fixture(scope="module")
def done(places):
    assert main(words(places, places / "out", f"prompts={places / 'prompts.jsonl'}")) == 0
    return places / "out"


def test_the_predictor_is_that_of_the_model_and_of_no_other(done):
    theirs = {"target": fingerprint(model_of()), "tokenizer": TOKENIZER.fingerprint}
    assert load_predictor(done / "payoff.safetensors", **theirs).header.grid == (1, 2, 3, 4, 6, 8)
    with pytest.raises(UserError, match="another model"):
        load_predictor(done / "payoff.safetensors", **theirs | {"target": fingerprint(model_of(4))})


def test_the_report_has_every_policy_and_both_counts(done):
    run = Run.open(done)
    found = json.loads((done / "results.json").read_text())
    names = [one["name"] for one in found["outcomes"]]
    assert names == [
        "plain",
        "prompt look-up",
        "all copied drafts",
        "fixed precedence",
        "by score",
        "all-knowing",
        "paper",
        "by rate",
        "oracle",
    ]
    assert [one["counted"] for both in found["qualities"].values() for one in both] == ["place", "cycle"] * 2
    assert all(one["rate"] > 0 for one in found["outcomes"]) and len(found["prices"]["passes"]) == 9
    page = run.report.read_text()
    assert all(name in page for name in names) and "precision" in page and "<svg" in page
    assert run.picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_asks_nothing_and_others_are_refused(done, places, capsys, monkeypatch):
    before = (done / "payoff.safetensors").read_bytes()
    answers = (done / "state" / "answers.jsonl").read_text()
    assert len(answers.splitlines()) == 14 and len({json.loads(line)["group"] for line in answers.splitlines()}) == 7
    monkeypatch.setattr(Engine, "request", None)
    assert main(words(places, done, f"prompts={places / 'prompts.jsonl'}")) == 0
    assert (done / "payoff.safetensors").read_bytes() == before
    assert (done / "state" / "answers.jsonl").read_text() == answers
    assert str(done / "report.html") in capsys.readouterr().out
    assert main(words(places, done, f"prompts={places / 'prompts.jsonl'}", "seed=1")) == 2
    assert "seed" in capsys.readouterr().err


def test_recorded_answers_do_as_well_as_prompts(done, places, tmp_path, monkeypatch):
    """Whoever has them need not ask; those of a model's drafts count where they are told."""
    rows = [json.loads(line) for line in (done / "state" / "answers.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["index"])
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(Engine, "request", None)
    out = tmp_path / "again"
    assert main(words(places, out, f"traces={tmp_path / 'traces.jsonl'}")) == 0
    names = [one["name"] for one in json.loads((out / "results.json").read_text())["outcomes"]]
    assert len(names) == 9
    told = [{**row, "depths": [1] * (len(row["answer"]) - 1) + [0]} for row in rows]
    (tmp_path / "deep.jsonl").write_text("\n".join(map(json.dumps, told)))
    deep = tmp_path / "deep"
    assert main(words(places, deep, f"traces={tmp_path / 'deep.jsonl'}", "depth=1")) == 0
    outcomes = json.loads((deep / "results.json").read_text())["outcomes"]
    assert next(one for one in outcomes if one["name"] == "model, 1 tokens")["accepted"]["mtp"] > 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "prompts=FILE, or traces=FILE"), (["prompts=a", "traces=b"], "prompts=FILE, or traces=FILE"),
        (["prompts=nowhere"], "no text at 'nowhere'"), (["drafts=99", "prompts=a"], "drafts=99"),
        (["answer=0", "prompts=a"], "answer=0"), (["temperatures=", "prompts=a"], "temperatures must name one"),
        (["traces=nowhere"], "cannot read nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message(more, message, places, tmp_path, capsys):
    assert main(words(places, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_two_prompts_are_too_few(places, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert main(words(places, tmp_path / "out", f"prompts={tmp_path / 'few.jsonl'}")) == 2
    assert "2 different prompts" in capsys.readouterr().err
