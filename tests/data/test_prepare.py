"""From places of text to a stream, and what the cache saves."""

import pytest

from nautilus.data.corpus import sources
from nautilus.data.prepare import prepare
from nautilus.runtime import UserError


@pytest.fixture
def place(tmp_path):
    for number in range(30):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text(f"Number {number} is followed by {number + 1}.\n" * 20)
    return sources((str(tmp_path / "text"),))


def test_the_second_time_everything_comes_from_the_cache(place, tmp_path):
    first = prepare(place, tmp_path / "cache", vocab=300)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    second = prepare(place, tmp_path / "cache", vocab=300)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint and first.shards == second.shards
    assert first.tokenizer.template is None  # a base model has no chat template yet


def test_held_out_texts_are_not_in_the_rows_that_train(place, tmp_path):
    prepared = prepare(place, tmp_path / "cache", vocab=300)
    (name,) = prepared.corpora
    held_out = prepared.held_out()[name]
    stream = prepared.stream(length=64, rows=4, micro=2, seed=0, reset=True)
    seen = "".join(prepared.tokenizer.decode(row.tolist()) for _ in range(40) for b in next(stream) for row in b.tokens)
    assert held_out and all(text.splitlines()[0] not in seen for text in held_out)


def test_a_tokenizer_that_is_not_there_or_too_large_is_refused(place, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        prepare(place, tmp_path / "cache", vocab=300, tokenizer=tmp_path / "nowhere")
    prepare(place, tmp_path / "cache", vocab=300).tokenizer.save(tmp_path / "words")
    with pytest.raises(UserError, match=r"has \d+ words but model.vocab=280"):
        prepare(place, tmp_path / "cache", vocab=280, tokenizer=tmp_path / "words")
