"""Answers are those of the engine, none is asked for twice, and in bytes they are what `needle` counts."""

import dataclasses
import json
import random

import pytest
import torch

import nautilus
from nautilus.cli import main
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.eval import retrieval
from nautilus.eval.needle import haystack, share_right
from nautilus.eval.retrieval import Plan, retrieve
from nautilus.eval.ruler import PAIRS, question
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.runtime import Run, UserError, read_metrics
from nautilus.serve import Engine, Sampling

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([], vocab=SMALLEST)


def model():
    config = dataclasses.replace(shrink(preset("toy")), vocab=TOKENIZER.vocab, eos=(TOKENIZER.eos,), positions=900)
    found = Language(config).initialise(5)
    found.head_weight.data *= 12
    return found.requires_grad_(False).eval()


MODEL = model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("retrieval") / "tiny"
    MODEL.save(here, precision="fp32", tokenizer=TOKENIZER)
    return here


def evaluate(folder, out, *words):
    return main(["eval", str(folder), f"out={out}", "samples=2", "lengths=500", "tasks=single,variables", *words])


def test_answers_are_those_of_the_engine_alone(tmp_path):
    plan = Plan(tasks=["single", "multivalue"], lengths=[600, 660], samples=2)
    cells, examples = retrieve(Run(tmp_path), Engine(MODEL, TOKENIZER, rows=3, saved_gb=0.01), plan)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(8)] and len(examples) == 4
    for row in rows:
        one = question(row["task"], row["length"], row["index"], seed=0, tokens_of=TOKENIZER.encode)
        alone = Engine(MODEL, TOKENIZER).generate([one.tokens], Sampling(temperature=0, max_tokens=one.longest))[0]
        assert row["answer"] == alone.text[:200] and row["score"] == one.example.score(alone.text)
        assert row["tokens"] == len(one.tokens) and row["answered"] == len(alone.tokens)
    shown = {(cell.task, cell.column): cell for cell in cells}
    assert shown["all", "600"].count == 4 and shown["single", "660"].count == 2


def test_pairs_are_what_needles_count_and_their_document_is_read_once(tmp_path):
    plan, engine = Plan(tasks=["pairs"], lengths=[200], samples=3 * PAIRS), Engine(MODEL, TOKENIZER, saved_gb=0.05)
    (cell,), _ = retrieve(Run(tmp_path), engine, plan)
    documents = []
    for number in range(3):
        last = question("pairs", 200, number * PAIRS + PAIRS - 1, seed=0, tokens_of=TOKENIZER.encode).example.text
        drawn = (haystack(random.Random(f"0 pairs 200 {number}"), length, PAIRS) for length in range(65, 300))
        documents.append(next(each for each in drawn if each.text.startswith(last)))
    assert cell.count == 24
    assert cell.score == pytest.approx(sum(share_right(MODEL, TOKENIZER, [each]) for each in documents) / 3)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for row in rows:  # a model of random weights is never right, so what it says is compared
        document, at = documents[row["index"] // PAIRS], row["index"] % PAIRS
        logits_TV = MODEL(torch.tensor([TOKENIZER.encode(document.text)]))[0][0]
        said = logits_TV[document.answers[at] - 1].argmax()
        assert row["answer"] == TOKENIZER.decode([int(said)], skip_special=True)
    read = sum(row["tokens"] - row["cached"] for row in rows)
    assert read < 0.6 * sum(row["tokens"] for row in rows)


def test_an_interrupted_command_goes_on_and_one_with_more_adds_to_it(folder, tmp_path, capsys, monkeypatch):
    plain, asked = Engine.step, []

    def interrupted(engine):
        if len(read_metrics(tmp_path / "out" / "metrics.jsonl")) >= 2:
            raise KeyboardInterrupt
        return plain(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        assert evaluate(folder, tmp_path / "out", "rows=1") == 130
    begun = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert 2 <= len(begun) < 4
    with monkeypatch.context() as patch:
        request = Engine.request
        patch.setattr(Engine, "request", lambda self, *a, **k: (asked.append(a), request(self, *a, **k))[1])
        assert evaluate(folder, tmp_path / "out") == 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert rows[: len(begun)] == begun and len(rows) == 4 and len(asked) == 4 - len(begun)
    assert "single" in capsys.readouterr().out
    assert evaluate(folder, tmp_path / "out", "samples=3") == 0
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert [(cell["task"], cell["count"]) for cell in cells] == [("single", 3), ("variables", 3), ("all", 6)]
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "report.png").is_file()
    assert evaluate(folder, tmp_path / "out", "seed=1") == 2 and "seed (begun with 0, now 1)" in capsys.readouterr().err


def test_a_chat_is_asked_through_the_template_and_its_reasoning_does_not_count(tmp_path):
    plan = Plan(tasks=["single"], lengths=[800], samples=1, chat=True, thinking=8)
    retrieve(Run(tmp_path), Engine(MODEL, TOKENIZER), plan)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    one = question("single", 800, 0, seed=0, tokens_of=retrieval.as_read(Engine(MODEL, TOKENIZER), plan), more=72)
    assert TOKENIZER.decode(one.tokens).endswith("<think>\n") and one.longest > 72
    assert row["tokens"] == len(one.tokens) and "</think>" not in row["answer"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("suite=rular", "suite='rular' was asked for; did you mean 'ruler'"),
        ("lengths=500,1000", "lengths=1000, but the model has positions=900"),
        ("tasks=singel", "no task 'singel'; have single,"),
        ("tasks=words", "task words of length=500 was asked for, but without any filler it takes"),
        ("samples=0", "samples=0 must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, tmp_path, capsys, words, message):
    assert evaluate(folder, tmp_path / "out", *words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_chat_needs_a_template_and_a_command_a_model(folder, tmp_path, capsys, monkeypatch):
    def plain(source):
        model, tokenizer = MODEL, train_tokenizer([], vocab=SMALLEST)
        tokenizer.template = None
        return model, tokenizer

    monkeypatch.setattr(nautilus, "load", plain)
    assert evaluate(folder, tmp_path / "out", "chat=true") == 2
    assert "chat=true was asked for, but this model has no chat template" in capsys.readouterr().err
    assert main(["eval"]) == 2 and "nautilus eval MODEL" in capsys.readouterr().err
    with pytest.raises(UserError):
        retrieval.refuse(Plan(tasks=["single"], lengths=[1], samples=1), 100)
