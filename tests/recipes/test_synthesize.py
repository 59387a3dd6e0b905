"""Rows made of texts by the command: a model that has learnt nothing rephrases, goes on and is told where it cannot."""

import json

import pytest

import nautilus
from nautilus.cli import main
from nautilus.config import Attention, Config, Mamba, lay
from nautilus.data.conversations import conversations_in
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.model.language import Language

ANYTHING = "kinds=rephrase rephrased.shortest=0 rephrased.longest=1e9 rephrased.facts=0"
SMALL = "tokens=600 turn_tokens=300 held_out=1"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model that says anything and often ends, texts, and a model that has no chat template."""
    here = tmp_path_factory.mktemp("synthesize")
    plain = train_tokenizer([], vocab=SMALLEST)
    chats = Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text("spaced"))
    layers = lay("M*", Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=2, groups=1, head_width=16))
    model = Language(Config(vocab=chats.vocab, width=16, layers=layers, eos=chats.stop)).initialise(1)
    mute = Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=None)
    for name, tokenizer in {"model": chats, "mute": mute}.items():
        model.save(here / name, tokenizer=tokenizer)
    texts = [{"text": f"Town {number} has a river."} for number in range(24)]
    (here / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts) + "no row\n")
    return here


def synthesize(places, out, words=ANYTHING, model="model"):
    asked = f"synthesize {places / model} texts={places / 'texts.jsonl'} {SMALL} {words} out={out}"
    return main(asked.split())


def test_texts_become_rows_a_table_and_a_report(places, tmp_path, capsys):
    assert synthesize(places, tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "no text in the row" in shown and "cut off" in shown and str(tmp_path / "run" / "report.html") in shown
    found = [*conversations_in(tmp_path / "run" / "conversations.jsonl")]
    steps = json.loads((tmp_path / "run" / "results.json").read_text())["steps"]["rephrase"]
    assert 0 < len(found) == steps["kept"] and sum(steps.values()) == 24
    assert not (tmp_path / "run" / "mcqa.jsonl").exists()
    before = (tmp_path / "run" / "state" / "answers.jsonl").read_bytes()
    assert synthesize(places, tmp_path / "run") == 0
    assert (tmp_path / "run" / "state" / "answers.jsonl").read_bytes() == before, "nothing was asked again"
    assert synthesize(places, tmp_path / "run", f"{ANYTHING} seed=1") == 2 and "seed" in capsys.readouterr().err


def test_what_was_made_can_be_learnt(places, tmp_path):
    assert synthesize(places, tmp_path / "run") == 0
    words = f"sft {places / 'model'} data={tmp_path / 'run' / 'conversations.jsonl'} out={tmp_path / 'sft'}"
    assert main([*words.split(), "steps=2", "rows=2", "optim.warmup=0"]) == 0
    assert nautilus.load(tmp_path / "sft")


def test_a_model_that_writes_nothing_of_use_says_so_and_leaves_examples(places, tmp_path, capsys):
    assert synthesize(places, tmp_path / "run", "kinds=question,choice") == 2
    said = capsys.readouterr().err
    assert "nothing of what model wrote can be used; 48 unreadable (" in said and "turn_tokens=300" in said
    assert "no Question" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        ("texts=", "write nautilus synthesize MODEL texts=FILE"), ("kinds=poems", "kinds=poems was asked for"),
        ("texts=/nowhere", "no text at '/nowhere'"), ("against=sorts", "there is no task 'sorts'"),
        ("verifier=/nowhere", "/nowhere"), ("tokens=1e9", "positions="),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(places, tmp_path, capsys, words, message):
    assert synthesize(places, tmp_path / "run", f"{ANYTHING} {words}") == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_model_without_a_template_is_refused(places, tmp_path, capsys):
    assert synthesize(places, tmp_path / "run", model="mute") == 2
    assert "a model without a chat template" in capsys.readouterr().err and not (tmp_path / "run").exists()
