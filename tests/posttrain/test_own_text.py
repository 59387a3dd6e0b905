"""Answers are the engine's, none is asked for twice, and only they are learnt from."""

import json

import pytest
import torch

from nautilus.model.language import Language
from nautilus.posttrain.own_text import Answer, Manner, answers, rows_of
from nautilus.runtime import UserError, read_metrics
from nautilus.serve import Engine, Sampling
from tests.posttrain.small import TOKENIZER, config

torch.set_num_threads(1)
MODEL = Language(config("")).initialise(3).requires_grad_(False).eval()
PROMPTS = [(101, 104, 107), (105, 106), (101, 104, 107), (110,), (113, 115, 101)]
MANNER = Manner(temperature=1, tokens=9, seed=4)


def engine(rows=2):
    return Engine(MODEL, TOKENIZER, max_tokens=32, rows=rows)


def test_answers_come_in_the_order_of_the_prompts_whatever_runs_beside_them(tmp_path):
    found = answers(tmp_path / "a.jsonl", engine(), PROMPTS, MANNER)
    assert [one.prompt for one in found] == PROMPTS
    for index, one in enumerate(found):
        alone = engine(rows=1).generate([PROMPTS[index]], MANNER.sampling(index))[0]
        assert alone.tokens == one.tokens
    assert found[0].tokens != found[2].tokens, "the same prompt is drawn anew"
    assert found != answers(tmp_path / "b.jsonl", engine(), PROMPTS, Manner(temperature=1, tokens=9, seed=5))


def test_greedy_answers_are_greedy_and_whole_ones_do_not_end(tmp_path):
    found = answers(tmp_path / "a.jsonl", engine(), PROMPTS, Manner(temperature=0, tokens=9))
    wanted = engine().generate(PROMPTS, Sampling(temperature=0, max_tokens=9))
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    whole = answers(tmp_path / "b.jsonl", engine(), PROMPTS * 8, Manner(temperature=1, tokens=9, whole=True))
    assert {len(one.tokens) for one in whole} == {9}


def test_an_interrupted_run_asks_only_for_what_is_missing(tmp_path, monkeypatch):
    whole = answers(tmp_path / "whole.jsonl", engine(), PROMPTS, MANNER)
    plain, path = Engine.step, tmp_path / "cut.jsonl"

    def interrupted(self):
        if len(read_metrics(path)) >= 2:
            raise KeyboardInterrupt
        return plain(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "step", interrupted)
        answers(path, engine(), PROMPTS, MANNER)
    kept, asked, request = path.read_text(), [], Engine.request
    monkeypatch.setattr(Engine, "request", lambda self, *given: (asked.append(given), request(self, *given))[1])
    assert answers(path, engine(), PROMPTS, MANNER) == whole
    assert path.read_text().startswith(kept) and 0 < len(asked) == len(PROMPTS) - len(kept.splitlines())


@pytest.mark.parametrize(
    "row, message",
    [
        ({"step": 0, "index": 0, "prompt": [101], "answer": [102]}, "to another prompt"),
        ({"step": 0, "index": 77, "prompt": [101], "answer": [102]}, "answer 77"),
        ({"step": 0, "index": 3, "prompt": [110], "answer": "x"}, "no tokens as answer 3"),
        ({"step": 0, "index": 3, "prompt": [110], "answer": []}, "no tokens as answer 3"),
    ],
)
def test_a_file_of_other_answers_is_refused(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        answers(tmp_path / "a.jsonl", engine(), PROMPTS, MANNER)


def test_only_tokens_of_answers_count():
    found = [Answer(prompt=(5, 6, 7), tokens=(8, 9)), Answer(prompt=(5,), tokens=(6, 7, 8, 9, 10, 11, 12, 13))]
    batch = rows_of(found, length=6, pad=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 0]]
    assert batch.weights["next_token"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    with pytest.raises(UserError, match="no answer is left"):
        rows_of([Answer(prompt=(5, 6, 7), tokens=(8, 9))], length=3, pad=0)
