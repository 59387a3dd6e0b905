import json
import math

import numpy as np
import pytest

from nautilus.data.corpus import sources, survey
from nautilus.data.mix import Stream
from nautilus.data.shard import encode_corpus, open_shards
from nautilus.data.tokenizer import train_tokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"Document {i} says </s> and é. " * (i % 7 + 1))
    return survey(sources([str(folder)], held_out=0.2)[0])


def test_shards_hold_every_document_of_their_part_once(corpus, tokenizer, tmp_path):
    shards = encode_corpus(corpus, tokenizer, tmp_path / "cache")
    assert set(shards) == {"train", "held_out"}
    for part, shard in shards.items():
        flat = np.memmap(shard.path, shard.dtype).tolist()
        want = [d.text for d in corpus.documents(part)]
        ends = [i for i, token in enumerate(flat) if token == tokenizer.document_end]
        assert [tokenizer.decode(flat[a + 1 : b]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)] == want
        assert (shard.tokens, shard.documents) == (len(flat), len(want))
    assert (shards["train"].bytes, shards["held_out"].bytes) == (corpus.train_bytes, corpus.held_out_bytes)


def test_rows_of_a_shard_are_all_of_it_and_the_end_is_padded(corpus, tokenizer, tmp_path):
    shard = encode_corpus(corpus, tokenizer, tmp_path)["train"]
    for reset in (True, False):
        rows = shard.rows(16, reset=reset)
        assert len(rows) == math.ceil(shard.tokens / 16)
        batch = rows.take(range(len(rows)))
        assert batch.tokens.flatten()[: shard.tokens].tolist() == np.memmap(shard.path, shard.dtype).tolist()
        assert (batch.tokens.flatten()[shard.tokens :] == 0).all()
        flat = batch.tokens.flatten().tolist()
        after_end = {i + 1 for i, token in enumerate(flat) if token == tokenizer.document_end}
        blind = {*range(0, len(flat), 16), *range(shard.tokens, len(flat)), *(after_end if reset else ())}
        assert batch.weights["next_token"].sum() == len({*range(len(flat))} - blind)
        assert (batch.document is None) == (not reset)
    assert len({rows.fingerprint, shard.rows(16).fingerprint, shard.rows(8).fingerprint}) == 3


def test_a_second_call_reads_the_cache_and_another_tokenizer_or_text_does_not(corpus, tokenizer, tmp_path):
    cache, calls = tmp_path / "cache", []
    encode_corpus(corpus, tokenizer, cache, report=lambda done, total: calls.append((done, total)))
    total = corpus.train_bytes + corpus.held_out_bytes
    assert calls[-1] == (total, total) and calls == sorted(calls)
    calls.clear()
    encode_corpus(corpus, tokenizer, cache, report=lambda *seen: calls.append(seen))
    assert calls == [] and len([*cache.iterdir()]) == 1
    encode_corpus(corpus, train_tokenizer(["other text"], vocab=300), cache)
    assert len([*cache.iterdir()]) == 2


def test_a_large_vocabulary_takes_four_bytes_a_token(corpus, tokenizer, tmp_path, monkeypatch):
    small = encode_corpus(corpus, tokenizer, tmp_path / "small")["train"]
    monkeypatch.setattr(tokenizer, "vocab", 70000)
    large = encode_corpus(corpus, tokenizer, tmp_path / "large")["train"]
    assert (small.dtype, large.dtype) == ("<u2", "<u4")
    assert np.memmap(small.path, small.dtype).tolist() == np.memmap(large.path, large.dtype).tolist()


def test_an_interrupted_encoding_leaves_nothing_behind(corpus, tokenizer, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(corpus, tokenizer, tmp_path / "cache", report=interrupt)
    assert [*(tmp_path / "cache").iterdir()] == []
    assert encode_corpus(corpus, tokenizer, tmp_path / "cache")["train"].tokens


def test_text_that_changes_while_it_is_read_is_an_error(corpus, tokenizer, tmp_path):
    (tmp_path / "texts" / f"{sorted(corpus.train)[0]}").write_text("now something else")
    with pytest.raises(ValueError, match="changed while it was read"):
        encode_corpus(corpus, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("harm", ["flip", "cut", "no index", "half index", "gone"])
def test_a_damaged_shard_is_an_error_that_names_the_folder(corpus, tokenizer, tmp_path, harm):
    shard = encode_corpus(corpus, tokenizer, tmp_path / "cache")["train"]
    [folder] = (tmp_path / "cache").iterdir()
    raw = (folder / "train.bin").read_bytes()
    index = json.loads((folder / "index.json").read_text())
    match harm:
        case "flip":
            (folder / "train.bin").write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
        case "cut":
            (folder / "train.bin").write_bytes(raw[:-2])
        case "gone":
            (folder / "train.bin").unlink()
        case "no index":
            (folder / "index.json").unlink()
        case "half index":
            index["parts"].pop("train")
            (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="remove .* and it will be written anew"):
        open_shards(folder)
    if harm == "flip":
        assert open_shards(folder, verify=False)["train"].tokens == shard.tokens


def test_shards_feed_a_stream(corpus, tokenizer, tmp_path):
    shards = encode_corpus(corpus, tokenizer, tmp_path / "cache")
    stream = Stream({name: shard.rows(16) for name, shard in shards.items()}, rows=6, micro=4, seed=1)
    batches = next(stream)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(4, 16), (2, 16)]
    with pytest.raises(ValueError, match="fingerprint"):
        Stream({name: shard.rows(8) for name, shard in shards.items()}, rows=6, micro=4, seed=1).restore(stream.state())


def test_a_data_card_lies_beside_the_tokens(corpus, tokenizer, tmp_path):
    encode_corpus(corpus, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    card = (folder / "README.md").read_text()
    assert corpus.fingerprint in card and tokenizer.fingerprint in card
    assert f"| train | {len(corpus.train):,} documents, {corpus.train_bytes:,} bytes, " in card
