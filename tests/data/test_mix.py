import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data.batch import Batch, join
from nautilus.data.mix import CIRCLE, GOLDEN, Mix, Stream, floor_sum, points_below, shuffled
from nautilus.runtime import UserError

quick = settings(max_examples=60, deadline=None)
weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


def mix_of(weights, rows=7, seed=0) -> Mix:
    return Mix({f"source {i}": (weight, rows + i) for i, weight in enumerate(weights)}, seed)


@quick
@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 200), st.integers(0, 200))
def test_floor_sum_agrees_with_adding_up(count, modulus, step, start):
    assert floor_sum(count, modulus, step, start) == sum((start + j * step) // modulus for j in range(count))


@quick
@given(st.integers(0, CIRCLE), st.integers(0, 100), st.integers(0, CIRCLE - 1))
def test_points_below_an_edge_agree_with_counting(edge, count, offset):
    assert points_below(edge, count, offset) == sum((offset + j * GOLDEN) % CIRCLE < edge for j in range(count))


@quick
@given(weights=weights, start=st.integers(0, 10**12), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_where_counting_began(weights, start, seed):
    mix = mix_of(weights, seed=seed)
    places = mix.places(start, start + 20)
    assert places[13:] == mix.places(start + 13, start + 20)
    before, after = mix.counts(start), mix.counts(start + 20)
    for name in mix.names:
        assert after[name] - before[name] == sum(place.source == name for place in places)


@quick
@given(weights=weights, index=st.integers(0, 10**15), seed=st.integers(0, 99))
def test_every_source_has_had_its_share_at_any_moment(weights, index, seed):
    mix = mix_of(weights, seed=seed)
    counts = mix.counts(index)
    assert sum(counts.values()) == index
    # Kronecker points of the golden ratio: an interval misses its share by at most about log2(index) points.
    bound = 2 + index.bit_length()
    for name, (weight, _) in mix.sources.items():
        assert abs(counts[name] - index * weight / sum(weights)) < bound + index * 1e-15


@quick
@given(size=st.integers(1, 300), key=st.integers(0, CIRCLE - 1))
def test_shuffling_is_a_permutation(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffling_sends_every_position_everywhere():
    size, draws = 11, 3000
    counts = torch.zeros(size, size)
    for key in range(draws):
        for position in (0, 5, 10):
            counts[position, shuffled(position, size, key * GOLDEN % CIRCLE)] += 1
    for position in (0, 5, 10):
        chi2 = ((counts[position] - draws / size) ** 2 / (draws / size)).sum()
        assert chi2 < 29.6, f"chi-square {chi2:.1f} with 10 degrees of freedom; 29.6 is the 0.1% point"


def test_each_pass_over_a_source_gives_every_row_once_and_in_another_order():
    mix = Mix({"a": (1.0, 50), "b": (3.0, 40)}, seed=3)
    places = mix.places(0, 600)
    passes = [[p.row for p in places if (p.source, p.epoch) == ("b", epoch)] for epoch in range(3)]
    assert all(sorted(rows) == list(range(40)) for rows in passes)
    assert passes[0] != passes[1] and passes[0] != list(range(40))
    other = Mix({"a": (1.0, 50), "b": (3.0, 40)}, seed=4)
    assert places != other.places(0, 600)


def test_the_order_of_rows_is_written_down():
    """Changing it would break the resume of every saved run."""
    places = Mix({"a": (1.0, 5), "b": (2.0, 9)}, seed=0).places(10**6, 10**6 + 6)
    assert [tuple(place) for place in places] == [
        ("b", 74074, 3),
        ("a", 66666, 1),
        ("b", 74074, 2),
        ("b", 74074, 4),
        ("a", 66667, 1),
        ("b", 74074, 1),
    ]


def numbered(rows: int, first: int) -> Batch:
    """Rows that can be told apart: row r holds first + r."""
    tokens = (first + torch.arange(rows))[:, None].expand(rows, 4).contiguous()
    return Batch(tokens, {"next_token": torch.ones(rows, 4)})


def stream(**changes) -> Stream:
    sources = {"a": numbered(30, 0), "b": numbered(20, 1000)}
    return Stream(sources, **(dict(weights={"a": 1.0, "b": 2.0}, rows=12, micro=2, seed=5) | changes))


def rows_of(micro_batches) -> list[int]:
    return join(micro_batches).tokens[:, 0].tolist()


@quick
@given(before=st.integers(0, 9), ranks=st.sampled_from([1, 2, 3, 4, 6]), micro=st.integers(1, 5))
def test_stopping_and_resuming_changes_no_row_on_any_number_of_ranks(before, ranks, micro):
    straight = stream()
    want = [rows_of(next(straight)) for _ in range(before + 2)][before:]
    stopped = stream()
    for _ in range(before):
        next(stopped)
    resumed = [stream(rank=rank, ranks=ranks, micro=micro) for rank in range(ranks)]
    for one in resumed:
        one.restore(stopped.state())
    got = [[row for one in resumed for row in rows_of(next(one))] for _ in range(2)]
    assert got == want
    assert all(one.state() == straight.state() for one in resumed)


def test_a_step_comes_in_micro_batches():
    assert [len(batch) for batch in next(stream(micro=5))] == [5, 5, 2]
    assert [len(batch) for batch in next(stream(micro=99, ranks=3, rank=1))] == [4]


def test_without_weights_every_row_is_given_once_before_any_comes_again():
    one = stream(weights=None, rows=10)
    seen = [row for _ in range(5) for row in rows_of(next(one))]
    assert abs(sum(row < 1000 for row in seen) - 30) <= 2
    assert sum(one.epochs().values()) == pytest.approx(2, abs=0.2)


def test_resuming_on_other_data_is_an_error():
    saved = stream().state()
    assert set(saved) == {"consumed", "seed", "fingerprint"}
    others = {
        "other text": Stream(
            {"a": numbered(30, 1), "b": numbered(20, 1000)}, weights={"a": 1.0, "b": 2.0}, rows=12, micro=2, seed=5
        ),
        "other weights": stream(weights={"a": 1.0, "b": 2.5}),
        "other seed": stream(seed=6),
    }
    for other in others.values():
        with pytest.raises(ValueError, match="resume with the same sources, weights"):
            other.restore(saved)


@pytest.mark.parametrize("consumed", [None, "12", -12, 1.5, True])
def test_a_position_that_is_no_count_is_refused(consumed):
    other = stream()
    with pytest.raises(UserError, match=f"consumed={consumed!r} rows, which is no count"):
        other.restore(stream().state() | {"consumed": consumed})
    with pytest.raises(UserError, match="data fingerprint None"):
        other.restore({})
    assert other.consumed == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ranks=5), "rows=12 .* ranks=5"),
        (dict(micro=0), "micro=0"),
        (dict(rank=1), "rank 1 of ranks=1"),
        (dict(weights={"a": 1.0}), r"weights are for \['a'\] but sources are \['a', 'b'\]"),
        (dict(weights={"a": 1.0, "b": 0.0}), "source 'b' has weight 0"),
    ],
)
def test_a_stream_that_cannot_be_dealt_out_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stream(**changes)
