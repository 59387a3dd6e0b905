import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.model.state import MambaState, State, advance, place, start_cache

ROWS, GROUPS, WIDTH = 2, 1, 3
quick = settings(max_examples=60, deadline=None, derandomize=True)


def fresh(draw, amount):
    """Keys of `amount` new tokens, no two alike, and values that are told from keys."""
    k = torch.randn(ROWS, amount, GROUPS, WIDTH, generator=draw, dtype=torch.float64)
    return k, -2 * k


def same_tokens(cache, k_list):
    k, v = cache.keys_values
    want = torch.cat(k_list, 1)
    return torch.equal(k, want) and torch.equal(v, -2 * want) and cache.length == want.shape[1]


@quick
@given(tree=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 6)), min_size=1, max_size=25), grad=st.booleans())
def test_any_tree_of_appends_from_shared_prefixes_holds_what_lists_would(tree, grad):
    """Each step appends to some earlier cache. In the end every cache ever made still says what it said."""
    draw = torch.Generator().manual_seed(0)
    first = fresh(draw, tree[0][1])
    caches, lists = [start_cache(*first)], [[first[0]]]
    for parent, amount in tree[1:]:
        parent %= len(caches)
        k, v = fresh(draw, amount)
        if grad:
            k.requires_grad_()
        caches.append(caches[parent].append(k, v))
        lists.append([*lists[parent], k])
        assert all(same_tokens(cache, k_list) for cache, k_list in zip(caches, lists, strict=True))


@quick
@given(amounts=st.lists(st.integers(1, 5), min_size=1, max_size=20), rows=st.lists(st.integers(0, 1), max_size=4))
def test_rows_of_a_cache_are_caches_of_their_own(amounts, rows):
    draw = torch.Generator().manual_seed(0)
    cache, k_list = start_cache(*fresh(draw, 2)), []
    k_list.append(cache.keys_values[0])
    for amount in amounts:
        k, v = fresh(draw, amount)
        cache, k_list = cache.append(k, v), [*k_list, k]
    index = torch.tensor(rows, dtype=torch.int64)
    picked = cache.rows(index)
    assert same_tokens(picked, [k[index] for k in k_list])
    k, v = fresh(draw, 3)
    grown = picked.append(k[index], v[index])
    assert same_tokens(grown, [k[index] for k in [*k_list, k]]) and same_tokens(cache, k_list)


@torch.no_grad()
def test_a_long_chain_of_single_tokens_moves_a_few_times_only():
    """Doubling: 200 appends of one token copy the past at most log2(200) + 1 times, not 200 times."""
    draw = torch.Generator().manual_seed(0)
    cache, buffers = start_cache(*fresh(draw, 1)), []
    for _ in range(200):
        cache = cache.append(*fresh(draw, 1))
        if not buffers or cache.k_buffer is not buffers[-1]:
            buffers.append(cache.k_buffer)
    assert len(buffers) <= 9


def test_a_gradient_reaches_every_token_ever_appended():
    draw = torch.Generator().manual_seed(0)
    parts = [fresh(draw, amount)[0].requires_grad_() for amount in (2, 1, 3)]
    cache = start_cache(parts[0], 2 * parts[0])
    for part in parts[1:]:
        cache = cache.append(part, 2 * part)
    k, v = cache.keys_values
    for grad in torch.autograd.grad(k.sum() + v.sum(), parts):
        assert torch.equal(grad, torch.full_like(grad, 3.0))


def documents_by_hand(rows, before_rows):
    """For each row: first position of each token's document, whether the token begins one; over all tokens so far."""
    first, start = [], []
    for past, new in zip(before_rows, rows, strict=True):
        line, f, s = [*past, *new], [], []
        for position, number in enumerate(line):
            begins = position == 0 or number != line[position - 1]
            s.append(begins)
            f.append(position if begins else f[-1])
        first.append(f[len(past) :])
        start.append(s[len(past) :])
    return torch.tensor(first), torch.tensor(start)


numbers = st.lists(st.integers(0, 2), min_size=9, max_size=9)


@quick
@given(rows=st.lists(numbers, min_size=2, max_size=2), cuts=st.sets(st.integers(1, 8), max_size=4))
def test_spans_tell_where_documents_begin_however_the_tokens_are_cut(rows, cuts):
    document_BT, state, edges = torch.tensor(rows), None, [0, *sorted(cuts), 9]
    for lo, hi in zip(edges, edges[1:], strict=False):
        span = place(state, document_BT[:, lo:hi], 2, hi - lo, document_BT.device)
        first, start = documents_by_hand([r[lo:hi] for r in rows], [r[:lo] for r in rows])
        position = torch.arange(lo, hi)
        assert span.before == lo and torch.equal(span.position_T, position)
        if span.first_BT is None:  # all one document so far: nothing to reset but what is empty anyway
            assert span.start_BT is None and span.reach_BT is None and not first.any()
        else:
            assert torch.equal(span.first_BT, first) and torch.equal(span.start_BT, start)
            assert torch.equal(span.reach_BT, position - first)
        assert torch.equal(span.rotary_BT.expand(2, -1), position - first)
        state = advance(state, span, document_BT[:, lo:hi], [])
        assert state.length == hi and torch.equal(state.document_B, document_BT[:, hi - 1])


def test_tokens_without_numbers_belong_to_the_document_before_them():
    document_BT = torch.tensor([[0, 0, 1], [4, 4, 4]])
    span = place(None, document_BT, 2, 3, document_BT.device)
    state = advance(None, span, document_BT, [])
    span = place(state, None, 2, 2, document_BT.device)
    assert span.first_BT.tolist() == [[2, 2], [0, 0]] and span.start_BT is None
    state = advance(state, span, None, [])
    span = place(state, torch.tensor([[1, 2], [4, 4]]), 2, 2, document_BT.device)
    assert span.first_BT.tolist() == [[2, 6], [0, 0]] and span.start_BT.tolist() == [[False, True], [False, False]]


def test_no_documents_at_all_leave_the_span_plain():
    span = place(None, None, 2, 4, torch.device("cpu"))
    assert span.first_BT is None and span.start_BT is None and span.rotary_BT.tolist() == [[0, 1, 2, 3]]
    state = advance(None, span, None, [])
    assert (state.length, state.first_B, state.document_B) == (4, None, None)
    assert place(state, None, 2, 2, torch.device("cpu")).position_T.tolist() == [4, 5]


def test_bad_document_numbers_are_refused_with_both_values_named():
    with pytest.raises(ValueError, match=r"document_BT has shape \(2, 3\), the tokens \(2, 4\); make them equal"):
        place(None, torch.zeros(2, 3, dtype=torch.int64), 2, 4, torch.device("cpu"))
    plain = advance(None, place(None, None, 1, 2, torch.device("cpu")), None, [])
    with pytest.raises(ValueError, match="began without; give document_BT from the first call on"):
        place(plain, torch.zeros(1, 1, dtype=torch.int64), 1, 1, torch.device("cpu"))


def test_rows_of_a_state_take_every_part_of_it_along():
    draw = torch.Generator().manual_seed(0)
    mamba = MambaState(torch.randn(3, 2, 5, generator=draw), torch.randn(3, 2, 2, 4, generator=draw))
    k = torch.randn(3, 4, 1, 2, generator=draw)
    state = State(4, (mamba, start_cache(k, -k), None), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7]))
    index = torch.tensor([2, 0, 0, 1])
    picked = state.rows(index)
    assert picked.length == 4 and picked.layers[2] is None
    assert picked.first_B.tolist() == [2, 0, 0, 1] and picked.document_B.tolist() == [7, 5, 5, 6]
    assert torch.equal(picked.layers[0].tail_BRC, mamba.tail_BRC[index])
    assert torch.equal(picked.layers[0].ssm_BHPN, mamba.ssm_BHPN[index])
    assert torch.equal(picked.layers[1].keys_values[1], -k[index])
    plain = State(4, (None,)).rows(index)
    assert plain.first_B is None and plain.document_B is None
