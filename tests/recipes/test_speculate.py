"""`nautilus speculate`: from prompts of every kind to the table, with nothing answered twice."""

import json
import re

import pytest
import torch

from nautilus.cli import main
from nautilus.eval.contest import Contest
from nautilus.recipes import speculate
from nautilus.runtime import Run, UserError
from tests.posttrain.small import TOKENIZER, counter

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("speculate")
    counter().save(here / "counter", precision="fp32", tokenizer=TOKENIZER)
    rows = [{"prompt": "ABCDEFGH" * count} for count in (2, 3)] + [{"messages": [{"role": "user", "content": "AB"}]}]
    (here / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (here / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    return here


def words(here, out, *more):
    asked = f"prompts=made,{here / 'own.jsonl'},gsm8k:{here / 'gsm8k.jsonl'}"
    return [
        "speculate",
        str(here / "counter"),
        asked,
        f"out={out}",
        "each=2",
        "repeats=1",
        "answer=30",
        "drafts=6",
        *more,
    ]


def test_the_report_has_every_arm_and_every_set(folder, tmp_path, capsys):
    assert main(words(folder, tmp_path / "out", "max_tokens=2048")) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    arms = [*dict.fromkeys(row["arm"] for row in found["rows"])]
    assert arms[0] == "plain" and arms[-1] == "oracle" and "ours, untrained" in arms and "mtp 4" in arms
    assert [*dict.fromkeys(row["family"] for row in found["rows"])][-1] == "all"
    assert {(pair["arm"], pair["other"]) for pair in found["pairs"]} == {
        ("ours, untrained", other) for other in ("mtp 1", "mtp 2", "mtp 3", "mtp 4", "all-knowing", "oracle")
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "made_code" in page and "own.jsonl" in page and "gsm8k" in page and "passes by their tokens" in page
    assert Run(tmp_path / "out").picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "rate by that of another" in shown and "ours, untrained / mtp 2" in shown


def test_the_same_command_again_asks_nothing_and_others_are_refused(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(words(folder, out)) == 0
    first = (out / "results.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Contest, "answered", None)
        assert main(words(folder, out)) == 0
    again = (out / "results.json").read_text()
    facts = re.compile(r'"facts": \{[^}]*\}')  # costs are measured anew
    assert facts.sub("", again) == facts.sub("", first)
    capsys.readouterr()
    assert main(words(folder, out, "seed=1")) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("each=0", "each=0 must be at least 1"),
        ("prompts=nowhere.jsonl", "nowhere.jsonl"),
        ("prompts=spider:nowhere", "nowhere"),
        ("hvd=nowhere", "nowhere"),
        ("eagle=nowhere", "nowhere"),
        ("answer=4", "longer than a draft"),
        ("max_tokens=31", "no prompt leaves room"),
    ],
)
def test_what_cannot_be_is_one_message(folder, tmp_path, capsys, wrong, says):
    assert main([*words(folder, tmp_path / "out"), wrong]) == 2
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="nautilus speculate MODEL"):
        speculate.main(speculate.Settings())
