"""Megatron's token files, held against another program's writer of them."""

import numpy as np
import pytest

from nautilus.data.corpus import sources
from nautilus.data.megatron import open_megatron, read_index, write_megatron
from nautilus.data.prepare import prepare
from nautilus.runtime import UserError

END = 2
DOCUMENTS = [[5, 6, 7, END], [8, END], [9, 10, 11, 12, 13, END]]


def oracle(folder, documents, token_size=2) -> None:
    """The pair folder/other.{bin,idx}, by datatrove's writer."""
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

    file = MegatronTokenizedFile(str(folder), "other", token_size=token_size)
    for document in documents:
        file.write(document)
    file.close()


@pytest.mark.parametrize("size, code", [(2, "<u2"), (4, "<i4")])
def test_pairs_of_another_writer_are_read_and_written_byte_for_byte(tmp_path, size, code):
    oracle(tmp_path, DOCUMENTS, size)
    index = read_index(tmp_path / "other")
    assert index.dtype == code and index.lengths.tolist() == [4, 2, 6] and index.documents.tolist() == [0, 1, 2, 3]
    shard = open_megatron(tmp_path / "other.idx", source="other", document_end=END, vocab=14)
    assert (shard.tokens, shard.documents) == (12, 3)
    assert shard.rows(6).take([0, 1]).tokens.tolist() == [[5, 6, 7, 2, 8, 2], [9, 10, 11, 12, 13, 2]]
    write_megatron(shard, tmp_path / "own")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"own{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


def test_documents_of_several_sequences_are_documents(tmp_path):
    oracle(tmp_path, [[5, 6], [7, END], [8, END]])
    raw = bytearray((tmp_path / "other.idx").read_bytes())
    # The first two sequences become one document: bounds 0, 2, 3 in place of 0, 1, 2, 3.
    raw[26:34] = (3).to_bytes(8, "little")
    raw[-32:] = np.array([0, 2, 3], "<i8").tobytes()
    (tmp_path / "other.idx").write_bytes(raw)
    assert open_megatron(tmp_path / "other", source="other", document_end=END, vocab=9).documents == 2


def test_a_shard_written_for_megatron_trains_the_same_rows(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Number {number} is followed by {number + 1}.\n" * 20)
    first = prepare(sources((str(tmp_path / "text"),)), tmp_path / "cache", vocab=300)
    write_megatron(first.shards["text"]["train"], tmp_path / "pair")
    first.tokenizer.save(tmp_path / "words")
    places = sources((str(tmp_path / "pair.bin"),))
    second = prepare(places, tmp_path / "cache", vocab=300, tokenizer=tmp_path / "words")
    how = {"length": 64, "rows": 4, "micro": 2, "seed": 0, "reset": True}
    one, two = (next(prepared.stream(**how)) for prepared in (first, second))
    rows = [sorted(row for batch in step for row in map(tuple, batch.tokens.tolist())) for step in (one, two)]
    flat = np.memmap(first.shards["text"]["train"].path, first.shards["text"]["train"].dtype)
    assert all(len(row) == 64 for step in rows for row in step)
    assert np.array_equal(np.memmap(second.shards["pair"]["train"].path, "<u2"), flat)
    assert second.held_out() == {} and "tokens" in second.facts()["text: pair"]
    with pytest.raises(UserError, match="need tokenizer=FOLDER"):
        prepare(places, tmp_path / "cache", vocab=300)


@pytest.mark.parametrize(
    "documents, vocab, complaint",
    [
        ([[5, 6], [8, END]], 20, "2 documents and 1 tokens 2"),
        ([[5, END, 6, END]], 20, "1 documents and 2 tokens 2"),
        ([[5, 6, END]], 6, "tokens from 0 to 6, the tokenizer 6 words"),
        ([], 6, "holds 0 tokens"),
    ],
)
def test_tokens_that_do_not_fit_the_tokenizer_are_refused(tmp_path, documents, vocab, complaint):
    oracle(tmp_path, documents)
    with pytest.raises(UserError, match=complaint):
        open_megatron(tmp_path / "other", source="other", document_end=END, vocab=vocab)


def test_files_that_are_not_whole_are_refused(tmp_path):
    oracle(tmp_path, DOCUMENTS)
    index, tokens = tmp_path / "other.idx", tmp_path / "other.bin"
    whole, flat = index.read_bytes(), tokens.read_bytes()
    for broken in (b"", b"MMIDIDX\x00\x01" + whole[9:], whole[:-4], whole[:20], whole[:17] + b"\x09" + whole[18:]):
        index.write_bytes(broken)
        with pytest.raises(UserError, match="index of version 1|does not fit"):
            read_index(tmp_path / "other")
    index.write_bytes(whole)
    tokens.write_bytes(flat[:-1])
    with pytest.raises(UserError, match="speaks of 12 tokens"):
        read_index(tmp_path / "other")
    tokens.unlink()
    with pytest.raises(UserError, match="come in pairs"):
        sources_read = sources((str(tmp_path / "other"),))
        open_megatron(sources_read[0].where, source="other", document_end=END, vocab=14)
