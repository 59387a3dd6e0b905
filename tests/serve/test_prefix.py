"""The tree of prefixes against a dict of tuples, and what its look-ups cost."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.serve import prefix
from nautilus.serve.prefix import PrefixTree

# Few tokens and long runs of one of them, so that sequences share much and part inside edges.
TOKENS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=0, max_size=4).map(
    lambda runs: tuple(token for token, length in runs for _ in range(length))
)
SPACES = st.sampled_from(["a", "b"])


def found_by_looking_at_all(known, space, tokens, most):
    """Match of PrefixTree.find, but for `beyond`: all the entries that it may be."""
    keys = [key for where, key in known if where == space]
    ends = [key for key in keys if tokens[: len(key)] == key and len(key) <= most]
    deepest = max(ends, key=len, default=())
    common = max((shared(key, tokens) for key in keys), default=0)
    beyond = [known[space, key] for key in keys if common and key[:common] == tokens[:common]]
    return known.get((space, deepest)), len(deepest), common, beyond


def shared(one, other):
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def is_sound(tree):
    """No node is there without need, none is out of place, and nothing is counted that is not there."""
    nodes, entries = list(tree.roots.values()), 0
    assert all(root.below and root.above is None and root.depth == 0 for root in nodes)
    while nodes:
        node = nodes.pop()
        entries += node.entry is not None
        assert node.above is None or node.entry is not None or len(node.below) > 1
        for first, below in node.below.items():
            assert first == below.edge_T[0] and below.above is node and below.space == node.space
            assert below.depth == node.depth + len(below.edge_T)
            assert below.edge_T.base is None or below.edge_T.base.nbytes == below.edge_T.nbytes
        nodes.extend(node.below.values())
    assert entries == len(tree)


OPERATION = st.tuples(st.sampled_from(["put", "put", "drop", "find"]), SPACES, TOKENS, st.integers(0, 16))


@given(st.lists(OPERATION, max_size=40))
def test_a_tree_knows_what_a_dict_of_tuples_knows(operations):
    tree, known, places = PrefixTree(), {}, {}
    for number, (what, space, tokens, most) in enumerate(operations):
        if what == "put" and tokens:
            known[space, tokens] = number
            places[space, tokens] = tree.put(space, tokens, number)
        elif what == "drop" and known:
            key = sorted(known)[most % len(known)]
            del known[key]
            tree.drop(places.pop(key))
        entry, length, common, beyond = found_by_looking_at_all(known, space, tokens, most)
        match = tree.find(space, tokens, most)
        assert match[:3] == (entry, length, common)
        assert match.beyond in beyond if beyond else match.beyond is None
        is_sound(tree)
        assert {(node.space, tuple(node.tokens())): node.entry for node in tree} == known
        for (_, key), node in places.items():  # the places handed out still are what they were
            assert tuple(node.tokens()) == key and node.depth == len(key)
            ends = [n for where, other in known if where == node.space and (n := len(other)) < len(key)
                    and key[:n] == other]  # fmt: skip
            above = node.shorter()
            assert (above.depth if above else 0) == max(ends, default=0)
    for place in places.values():
        tree.drop(place)
    assert tree.roots == {} and len(tree) == 0


def test_a_branch_inside_an_edge_is_seen_before_anything_is_stored_there():
    tree = PrefixTree()
    tree.put("", [1, 2, 3, 4, 5], "five")
    tree.put("", [1, 2], "two")
    assert tree.find("", [1, 2, 3, 9], 3) == ("two", 2, 3, "five")
    assert tree.find("", [1, 2, 3, 4, 5], 4) == ("two", 2, 5, "five")  # one token is always computed again
    assert tree.find("", [1, 2, 3, 4, 5, 6], 5) == ("five", 5, 5, "five")
    assert tree.find("", [7]) == tree.find("elsewhere", [1, 2]) == (None, 0, 0, None)


def test_what_is_no_sequence_of_tokens_is_refused():
    tree = PrefixTree()
    for tokens, entry, error in [([], 1, ValueError), ([1], None, ValueError), ([1.5], 1, TypeError),
                                 ([1 << 31], 1, OverflowError), ("ab", 1, TypeError)]:  # fmt: skip
        with pytest.raises(error):
            tree.put("", tokens, entry)
    assert tree.roots == {} and tree.find("", []) == (None, 0, 0, None)
    place = tree.put("", [1], 1)
    tree.drop(place)
    with pytest.raises(ValueError, match="drop each once"):
        tree.drop(place)


def steps_of(call):
    """Lines of Python that a call runs: what it costs, but for what numpy does in one go."""
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def test_a_look_up_takes_no_more_steps_for_more_tokens(monkeypatch):
    """And compares each token once: whatever the length, on the way through as many edges."""
    compared = []
    agreeing = prefix.agreeing
    monkeypatch.setattr(prefix, "agreeing", lambda a, b: compared.append(min(len(a), len(b))) or agreeing(a, b))
    costs = {}
    for length in (1000, 100_000):
        tree, tokens = PrefixTree(), np.arange(length).tolist()
        for end in range(length // 10, length + 1, length // 10):
            tree.put("", tokens[:end], end)
        compared.clear()
        costs[length] = steps_of(lambda tree=tree, tokens=tokens: tree.find("", [*tokens[:-1], -1], len(tokens) - 1))
        assert len(compared) == 10 and sum(compared) == length
    assert costs[1000] == costs[100_000] < 200


def test_a_chain_may_be_deeper_than_calls_may_nest():
    tree, tokens = PrefixTree(), list(range(3 * sys.getrecursionlimit()))
    # From the deepest on, so that each is put on the first edge.
    places = [tree.put("", tokens[:end], end) for end in range(len(tokens), 0, -1)][::-1]
    assert tree.find("", tokens) == (len(tokens), len(tokens), len(tokens), len(tokens))
    assert sum(1 for _ in tree) == len(tokens) and len(places[-1].tokens()) == len(tokens)
    for place in places[:-1]:
        tree.drop(place)
    is_sound(tree)
    (root,) = tree.roots.values()
    assert list(root.below.values()) == [places[-1]]
