"""Prompts are what was given, or beginnings; none that is measured on is learnt from."""

import json

import pytest
import torch

from nautilus.data.corpus import sources, survey
from nautilus.data.shard import encode_corpus
from nautilus.model.language import Language
from nautilus.posttrain.prompts import Wanted, prompts
from nautilus.runtime import Run, UserError
from nautilus.serve import Engine
from tests.posttrain.small import TOKENIZER, config

torch.set_num_threads(1)
MODEL = Language(config("")).initialise(3).requires_grad_(False).eval()
TEXTS = [f"{number} is a number, and {number * number} its square." for number in range(60)]


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "out", {})


@pytest.fixture
def engine():
    return Engine(MODEL, TOKENIZER, max_tokens=64)


@pytest.fixture
def texts(tmp_path):
    place = tmp_path / "texts.jsonl"
    place.write_text("".join(json.dumps({"question": text}) + "\n" for text in TEXTS))
    return f"{place}#question"


def test_given_texts_are_cut_and_dealt(run, engine, texts):
    learnt, measured = prompts(run, engine, "x", Wanted(learnt=50, measured=7, tokens=12, places=(texts,)))
    assert (len(learnt), len(measured)) == (50, 7) and not {*learnt} & {*measured}
    cut = {tuple(TOKENIZER.encode(text)[:12]) for text in TEXTS}
    assert {*learnt, *measured} <= cut and len({*learnt}) == 50
    again = prompts(run, engine, "x", Wanted(learnt=50, measured=7, tokens=12, places=(texts,), seed=1))
    assert again[1] != measured


def test_messages_are_whole_or_left_out(run, engine, texts):
    wanted = Wanted(learnt=9, measured=2, tokens=80, places=(texts,), chat=True)
    learnt, measured = prompts(run, engine, "x", wanted)
    assert {len(prompt) for prompt in [*learnt, *measured]} <= {*range(81)}
    assert all("is a number" in TOKENIZER.decode(prompt) for prompt in learnt)
    assert all(TOKENIZER.decode(prompt).startswith("<|im_start|>") for prompt in learnt)


def test_too_few_to_learn_from_come_again_and_none_is_an_error(run, engine, texts):
    learnt, _ = prompts(run, engine, "x", Wanted(learnt=120, measured=20, tokens=12, places=(texts,)))
    assert len(learnt) == 120 and len({*learnt}) == 40
    with pytest.raises(UserError, match="60 prompts were found, where measured=60"):
        prompts(run, engine, "x", Wanted(learnt=5, measured=60, tokens=12, places=(texts,)))


def test_a_run_gives_the_beginnings_of_its_documents(run, engine, tmp_path):
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    trained = Run.create(tmp_path / "trained", {})
    (source,) = sources((str(tmp_path / "text"),), held_out=0.2)
    corpus = survey(source)
    encode_corpus(corpus, TOKENIZER, trained.folder / "data")
    learnt, measured = prompts(run, engine, trained.folder, Wanted(learnt=20, measured=4, tokens=9))
    held_out = {tuple(TOKENIZER.encode(document.text)[:9]) for document in corpus.documents("held_out")}
    seen = {tuple(TOKENIZER.encode(document.text)[:9]) for document in corpus.documents("train")}
    assert {*measured} <= held_out and {*learnt} <= seen and len({*learnt}) == 20


def test_else_the_model_begins_itself(run, engine):
    learnt, measured = prompts(run, engine, "x", Wanted(learnt=6, measured=3, tokens=8))
    assert all(prompt[0] == TOKENIZER.document_end and len(prompt) == 8 for prompt in [*learnt, *measured])
    assert len({*learnt, *measured}) == 9 and not {*TOKENIZER.stop} & {
        token for prompt in learnt for token in prompt[1:]
    }
    assert (learnt, measured) == prompts(run, engine, "x", Wanted(learnt=6, measured=3, tokens=8))
