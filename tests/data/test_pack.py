import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data.pack import best_fit, pack_best_fit, pack_stream

END, PAD = 1, 0
documents = st.lists(st.lists(st.integers(2, 99), max_size=12), min_size=1, max_size=8)
length = st.integers(2, 9)
quick = settings(max_examples=60, deadline=None)


@quick
@given(documents=documents, length=length, reset=st.booleans())
def test_a_packed_stream_is_the_documents_one_after_another(documents, length, reset):
    batch = pack_stream(documents, length=length, end=END, pad=PAD, reset=reset)
    want = [token for document in documents for token in [*document, END]]
    flat = batch.tokens.flatten().tolist()
    assert flat[: len(want)] == want and flat[len(want) :] == [PAD] * (len(flat) - len(want))
    assert len(flat) - len(want) < length


@quick
@given(documents=documents, length=length)
def test_documents_of_a_packed_stream_are_numbered_apart_and_whole(documents, length):
    batch = pack_stream(documents, length=length, end=END, pad=PAD)
    owner = [i for i, document in enumerate(documents) for _ in [*document, END]]
    owner += [-1] * (batch.tokens.numel() - len(owner))
    for row, owners in zip(batch.document, np.asarray(owner).reshape(-1, length), strict=True):
        numbers = row.tolist()
        for t in range(1, length):
            assert (numbers[t] == numbers[t - 1]) == (owners[t] == owners[t - 1])
        assert all((number == 0) == (who == -1) for number, who in zip(numbers, owners, strict=True))


@quick
@given(documents=documents, length=length, reset=st.booleans())
def test_a_token_counts_exactly_where_its_row_can_predict_it(documents, length, reset):
    batch = pack_stream(documents, length=length, end=END, pad=PAD, reset=reset)
    total = sum(len(document) + 1 for document in documents)
    flat = batch.weights["next_token"].flatten().tolist()
    first = {0} | {int(n) for n in np.cumsum([len(d) + 1 for d in documents])}
    for position, weight in enumerate(flat):
        blind = position % length == 0 or position >= total or (reset and position in first)
        assert weight == (0 if blind else 1)
    assert (batch.document is None) == (not reset)


def test_a_document_that_holds_the_end_token_is_refused():
    with pytest.raises(ValueError, match="document 1 holds the end token 1"):
        pack_stream([[5], [5, END, 6]], length=4, end=END)
    with pytest.raises(ValueError, match="rows of at least 2"):
        pack_stream([[5]], length=1, end=END)
    with pytest.raises(ValueError, match="0 rows"):
        pack_stream([], length=4, end=END)


samples = st.lists(
    st.lists(st.tuples(st.integers(2, 99), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=9),
    min_size=1,
    max_size=9,
)


@quick
@given(samples=samples, room=st.integers(0, 6))
def test_best_fit_keeps_every_sample_whole_and_once(samples, room):
    pairs = [([token for token, _ in sample], [weight for _, weight in sample]) for sample in samples]
    length = max(2, max(map(len, samples)) + room)
    batch = pack_best_fit(pairs, length=length, pad=PAD)
    found = []
    for tokens, weights, numbers in zip(batch.tokens, batch.weights["next_token"], batch.document, strict=True):
        used = int((numbers > 0).sum())
        assert (numbers[:used] > 0).all() and (tokens[used:] == PAD).all() and (weights[used:] == 0).all()
        assert numbers[:used].tolist() == sorted(numbers[:used].tolist())
        for number in range(1, int(numbers.max()) + 1):
            here = numbers == number
            found.append((tokens[here].tolist(), weights[here].tolist()))
    assert sorted(found) == sorted((tokens, [0.0, *weights[1:]]) for tokens, weights in pairs)


@quick
@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_opens_a_row_only_when_no_row_has_room(lengths):
    rows = best_fit(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert all(amount <= 20 for amount in fill)
    opened_by = [lengths[row[0]] for row in rows]
    assert all(fill[a] + opened_by[b] > 20 for a in range(len(rows)) for b in range(a + 1, len(rows)))


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 has 5 tokens, rows have 4; raise length"):
        pack_best_fit([([2], [1.0]), ([2] * 5, [1.0] * 5)], length=4)
    with pytest.raises(ValueError, match="2 tokens but 1 weights"):
        pack_best_fit([([2, 3], [1.0])], length=4)
