"""Needles are where the answers say, and the measure counts what a model that knows would get right."""

import json
import random
import re

import pytest
import torch

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.eval.needle import haystack, retrieval, share_right, write_needles
from nautilus.runtime import UserError


@pytest.mark.parametrize("length,pairs", [(128, 8), (1024, 8), (65, 8), (9, 1), (300, 26)])
def test_every_question_has_one_earlier_needle_with_its_value(length, pairs):
    for seed in range(20):
        found = haystack(random.Random(seed), length, pairs)
        assert len(found.text) == length - 1 and found.text.isascii() and len(found.answers) == pairs
        needles = dict(re.findall(r" ([A-Z])=([a-z])", found.text))
        assert len(needles) == pairs
        for at in found.answers:
            key, mark, value = found.text[at - 2 : at + 1]
            assert mark == "?" and needles[key] == value and found.text.index(f" {key}=") < at


def test_needles_that_do_not_fit_are_refused():
    for length, pairs in ((64, 8), (1000, 27), (1000, 0)):
        with pytest.raises(ValueError, match="needles with questions do not fit"):
            haystack(random.Random(0), length, pairs)


def test_the_same_seed_writes_the_same_documents(tmp_path):
    for name in ("a", "b"):
        write_needles(tmp_path / name, documents=5, length=100, pairs=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line)["text"] for line in (tmp_path / "a").read_text().splitlines()]
    assert len(set(rows)) == 5 and all(len(row) == 99 for row in rows)


class Oracle(torch.nn.Module):
    """Predicts, after a question, the value `shift` letters after the right one; knows the text by heart."""

    def __init__(self, vocab: int, shift: int):
        super().__init__()
        self.head_weight, self.shift = torch.eye(vocab), shift

    def hidden(self, tokens_BT):
        following_BT = torch.roll(tokens_BT, -1, 1) + self.shift
        return torch.nn.functional.one_hot(following_BT, len(self.head_weight)).float(), None


def test_the_share_is_one_for_an_oracle_and_none_for_one_that_is_off():
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    assert dict(retrieval(Oracle(SMALLEST + 1, 0), tokenizer, (64, 200), pairs=4, documents=3)) == {64: 1.0, 200: 1.0}
    assert dict(retrieval(Oracle(SMALLEST + 1, 1), tokenizer, (64,), pairs=4, documents=3)) == {64: 0.0}


def test_documents_do_not_depend_on_how_they_are_batched(monkeypatch):
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    draw = random.Random(0)
    documents = [haystack(draw, 64, 4) for _ in range(5)]
    monkeypatch.setattr("nautilus.eval.needle.BUDGET", 130)
    assert share_right(Oracle(SMALLEST + 1, 0), tokenizer, documents) == 1.0


def test_a_tokenizer_of_longer_words_is_refused():
    tokenizer = train_tokenizer(["old moon under water " * 50], vocab=SMALLEST + 40)
    with pytest.raises(UserError, match=f"vocab={SMALLEST}"):
        retrieval(Oracle(400, 0), tokenizer, (128,), pairs=2, documents=2)
