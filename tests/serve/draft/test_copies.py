"""Drafts come from a request itself and from what its tenant was answered, never from anybody else."""

import random

import pytest

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.runtime import UserError
from nautilus.serve.draft.copies import SHARED, TENANTS, Copies
from nautilus.serve.draft.corpus import corpus_of
from nautilus.serve.draft.suffix import SuffixCache

TOKENIZER = train_tokenizer([], vocab=SMALLEST)


def test_the_draft_of_the_higher_score_is_taken_and_says_where_it_comes_from():
    copies = Copies()
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3]
    own = copies.draft("a", "", text, 4)
    assert own and own.draft.tokens == (4, 5, 9, 1) and own.origin == "own"
    copies.finish("b", "", [1, 2, 3, 7, 7])
    assert copies.draft("a", "", text, 4) == own, "two tokens are less than four"
    assert copies.draft("a", "", text, 2) == copies.draft("a", "other", text, 2), "of equals its own"
    copies.finish("c", "", [8, 9, 1, 2, 3, 6, 6, 6, 6])
    copies.finish("d", "", [8, 9, 1, 2, 3, 6, 6, 6, 6])
    found = copies.draft("e", "", [0, 8, 9, 1, 2, 3], 9)
    assert found and found.origin == "tenant" and found.draft.tokens == (6, 6, 6, 6)


def test_answers_are_copied_from_within_a_tenant_only_and_from_their_end_on():
    copies, text = Copies(), [*range(20)]
    assert copies.draft("a", "x", text, 4) is None
    copies.finish("a", "x", text)
    assert "a" not in copies.own
    assert copies.draft("b", "y", text[:9], 4) is None
    found = copies.draft("b", "x", text[:9], 4)
    assert found and found.origin == "tenant" and found.draft.tokens == (9, 10, 11, 12)
    copies.finish("c", "z", [])
    assert "z" not in copies.shared


def test_a_text_that_grows_is_that_text():
    draw, copies = random.Random(0), Copies()
    text = [draw.randrange(3) for _ in range(60)]
    for size in range(1, 60):
        whole = SuffixCache()
        whole.extend(text[:size])
        found = copies.draft("a", "", text[:size], 5)
        assert (found and found.draft) == whole.draft(whole.tokens, 5)


def test_tenants_and_their_tokens_are_bounded_the_latest_stay():
    copies = Copies()
    for tenant in range(TENANTS + 3):
        copies.finish(tenant, str(tenant), [tenant] * 5)
    assert [*copies.shared] == [str(tenant) for tenant in range(3, TENANTS + 3)]
    for number in range(7):
        copies.finish(number, "9", [number] * SHARED)
    assert len(copies.shared["9"].tokens) <= 2 * SHARED + 1 and [*copies.shared][-1] == "9"


def test_a_corpus_is_copied_from_whoever_asks(tmp_path):
    (tmp_path / "a.txt").write_text("def area(width, height):\n    return width * height\n")
    (tmp_path / "b.txt").write_text("SELECT name FROM people WHERE age > 30;\n")
    corpus = corpus_of([str(tmp_path)], TOKENIZER)
    copies, asked = Copies(corpus), TOKENIZER.encode("Write it: def area(width")
    found = copies.draft("a", "x", asked, 12)
    assert found and found.origin == "corpus" and TOKENIZER.decode(found.draft.tokens) == ", height):\n "
    assert copies.draft("b", "y", TOKENIZER.encode("SELECT name FROM"), 5).origin == "corpus"
    assert TOKENIZER.decode(copies.draft("c", "y", TOKENIZER.encode("* height"), 40).draft.tokens) == "\n", "to its end"
    assert Copies().draft("a", "x", asked, 12) is None


def test_a_corpus_of_nothing_or_of_too_much_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words " * 40)
    monkeypatch.setattr("nautilus.serve.draft.corpus.MOST", 100)
    with pytest.raises(UserError, match="more than 100 tokens"):
        corpus_of([str(tmp_path / "a.txt")], TOKENIZER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        corpus_of([str(tmp_path / "empty")], TOKENIZER)
