"""The store of saved states against brute force; what goes first, what may not, and that no reference is ever lost."""

import random
import tempfile
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.serve.saved import Saved
from nautilus.serve.spill import Folder
from nautilus.serve.worth import ALPHA, ranks, seconds_per_mib, worth
from tests.serve.disagreements import disagreements
from tests.serve.shelf import PAGE, Pool, compute, contents_of, state_after

torch.set_num_threads(1)
AMPLE = 1 << 30
RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=4)
TOKENS = RUNS.map(lambda runs: tuple(token for token, length in runs for _ in range(length)))
SPACES = st.sampled_from(["alice", "bob"])


def is_sound(saved, requests=()):
    assert disagreements(saved, saved.pool.counted(requests=requests)) == []
    assert saved.counts.bytes <= saved.budget
    assert saved.folder is None or saved.folder.bytes <= saved.folder.limit


def entry_after(saved, tokens, space=""):
    found = saved.find(space, tokens, len(tokens))
    if found.entry is not None:
        saved.unlock(found.entry)
    return found.entry if found.length == len(tokens) else None


def keep(saved, tokens, *, seconds=1.0, space=""):
    """Keep what is in mind after these tokens, in pages of their own that nobody else holds afterwards."""
    pages = saved.pool.take(-(-len(tokens) // PAGE))
    saved.pool.write(pages, contents_of(tokens))
    kept = saved.keep(space, tokens, pages, state_after(tokens), seconds)
    saved.pool.release(pages)
    return kept


# ----- against brute force -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [False, True])
@given(st.lists(st.tuples(SPACES, TOKENS, st.integers(0, 16)), max_size=20))
def test_with_room_for_all_the_longest_is_always_found(everywhere, prompts):
    saved, known = Saved(Pool(512), budget=AMPLE, everywhere=everywhere), []
    for space, tokens, most in prompts:
        found = compute(saved, space, tokens, most=most)
        mine = [key for where, key in known if where == space]
        common = max((shared(key, tokens) for key in mine), default=0)
        ends = (len(key) for key in mine if tokens[: len(key)] == key and len(key) <= most)
        assert found.length == (min(common, most) if everywhere else max(ends, default=0))
        assert found.common == common
        known.append((space, tokens))
        is_sound(saved)
    saved.clear()
    assert saved.pool.free() == 512 and saved.counts.bytes == 0 and not saved.tree.roots


def shared(one, other):
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


OPERATION = st.one_of(
    st.tuples(st.just("prompt"), SPACES, TOKENS, st.integers(0, 16)),
    st.tuples(st.just("prompt"), SPACES, TOKENS, st.integers(0, 16)),
    st.tuples(st.sampled_from(["lock", "unlock", "spill", "room", "restart"]), SPACES, TOKENS, st.integers(0, 16)),
)


@pytest.mark.parametrize("everywhere", [False, True])
@settings(max_examples=60)
@given(st.lists(OPERATION, max_size=30), st.booleans())
def test_short_of_everything_what_is_found_is_right_and_nothing_is_lost(everywhere, operations, disk):
    with tempfile.TemporaryDirectory() as place:
        start = lambda: Saved(
            Pool(24),
            budget=200,
            everywhere=everywhere,
            folder=Folder(f"{place}/states", model="m", numerics="1", limit=30_000) if disk else None,
        )
        saved, locked = start(), []
        for what, space, tokens, number in operations:
            if what == "prompt":
                compute(saved, space, tokens, marks=[number] if 0 < number < len(tokens) else [])
            elif what == "lock" and (entry := saved.find(space, tokens, len(tokens)).entry) is not None:
                locked.append((entry, list(entry.pages)))
            elif what == "unlock" and locked:
                saved.unlock(locked.pop()[0])
            elif what == "spill":
                saved.spill()
            elif what == "room" and saved.make_room(number):
                assert saved.pool.free() >= number
            elif what == "restart" and disk:
                locked.clear()
                saved.folder.close()
                saved = start()
            assert all(entry.here and entry.pages == pages for entry, pages in locked)
            is_sound(saved)
        while locked:
            saved.unlock(locked.pop()[0])
        assert saved.make_room(24)  # nothing holds a page that cannot be had back
        saved.clear()
        is_sound(saved)
        assert saved.pool.free() == 24 and not saved.tree.roots and (not disk or saved.folder.bytes == 0)
        if disk:
            saved.folder.close()


# ----- what is found -------------------------------------------------------------------------------------------------


def test_a_branch_is_told_before_a_state_is_there():
    saved = Saved(Pool(), budget=AMPLE)
    compute(saved, "", [1, 2, 3, 4, 5])
    found = compute(saved, "", [1, 2, 3, 9], marks=[3])
    assert (found.entry, found.length, found.common) == (None, 0, 3)
    found = compute(saved, "", [1, 2, 3, 7, 7])
    assert (found.length, found.common) == (3, 3)
    counts = saved.counts
    assert (counts.queries, counts.hits, counts.tokens_asked, counts.tokens_found) == (3, 1, 14, 3)


def test_tenants_do_not_see_each_other():
    saved = Saved(Pool(), budget=AMPLE)
    compute(saved, "alice", [1, 2, 3])
    assert compute(saved, "bob", [1, 2, 3, 4])[:] == (None, 0, 0)
    assert compute(saved, "alice", [1, 2, 3, 4]).length == 3
    assert not any("alice" in repr(vars(saved)[name]) for name in ("tree", "counts", "key"))
    assert "alice" not in saved.tree.roots


def test_what_is_there_already_stays_and_is_the_newest_again():
    saved = Saved(Pool(), budget=AMPLE)
    keep(saved, [1, 2]), keep(saved, [3, 4])
    entry = entry_after(saved, [3, 4])
    first = next(one for one in saved.entries() if one is not entry)
    pages, used = list(first.pages), entry.used
    assert keep(saved, [1, 2]) and first.pages == pages and first.used > used
    is_sound(saved)


def test_keys_and_values_that_serve_everywhere_are_kept_once():
    saved = Saved(Pool(), budget=AMPLE, everywhere=True)
    compute(saved, "", [1, 2, 3, 4])
    found = compute(saved, "", [1, 2, 3, 9, 9, 9])
    assert found.length == 3 and len(saved.tree) == 2
    compute(saved, "", [1, 2, 3, 4, 5, 6])  # continues the first, whose place it takes
    assert sorted(entry.length for entry in saved.entries()) == [6, 6]
    compute(saved, "", [1, 2, 3])  # known inside another
    assert len(saved.tree) == 2
    is_sound(saved)


# ----- what goes first -----------------------------------------------------------------------------------------------


def test_of_equals_the_one_unused_the_longest_goes():
    saved = Saved(Pool(), budget=5 * 18)  # an entry of two tokens takes 8 + 8 + 2 bytes
    for first in range(5):
        keep(saved, [first, 0])
    assert entry_after(saved, [0, 0])
    keep(saved, [9, 0])
    assert [first for first in (0, 1, 2, 3, 4, 9) if entry_after(saved, [first, 0])] == [0, 2, 3, 4, 9]
    assert saved.counts.evictions == 1


def test_of_the_same_age_the_one_that_saves_most_outlives_the_rest():
    saved = Saved(Pool(), budget=AMPLE)
    for first, seconds in ((1, 5.0), (2, 0.1), (3, 40.0)):
        keep(saved, [first, 0], seconds=seconds)
    for entry in saved.entries():
        entry.used = 7
    for gone in (2, 1):
        saved.evict()
        assert entry_after(saved, [gone, 0]) is None
    assert entry_after(saved, [3, 0])


def test_a_state_half_way_is_worth_what_it_adds():
    saved = Saved(Pool(), budget=AMPLE)
    keep(saved, [1] * 10, seconds=10)
    keep(saved, [1] * 12, seconds=12)
    long, short = sorted(saved.entries(), key=lambda entry: -entry.length)
    mib = (48 + 10 + Pool.page_bytes) / (1 << 20)  # its states, its tokens, one page more than the other has
    assert seconds_per_mib(long, Pool.page_bytes) == pytest.approx(2 / mib)
    saved.forget(short)
    mib = (48 + 10 + 6 * Pool.page_bytes) / (1 << 20)
    assert seconds_per_mib(long, Pool.page_bytes) == pytest.approx(12 / mib)


def test_worth_has_no_unit():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [1, 0, 1, 0.5] and ranks([4.0]) == [0] and ranks([]) == []
    facts = {"bytes": 1 << 20, "count": 0, "shorter": None}
    entries = [Mock(used=used, seconds=seconds, **facts) for used, seconds in ((5, 1), (9, 0), (2, 80))]
    values = worth(entries, alpha=1.5, page_bytes=0)
    assert values == [0.5 + 1.5 * 0.5, 1.0, 1.5]
    for entry in entries:
        entry.seconds *= 1000
        entry.used *= 10
    assert worth(entries, alpha=1.5, page_bytes=0) == values


def saved_share(alpha, seed=4):
    """The share of prefill that a store of eight states saves: a few agents with long instructions come back among
    many prompts that are asked once, and after a while there are other agents."""
    draw = random.Random(seed)
    saved, asked, had = Saved(Mock(page_bytes=16), budget=8 * 1100_000, alpha=alpha), 0, 0
    state = [torch.empty(1_000_000, dtype=torch.uint8, device="meta")]
    text = lambda length: [draw.randrange(100) for _ in range(length)]
    for _ in range(2):
        agents = [text(draw.choice([400, 800, 1600])) for _ in range(5)]
        for _ in range(120):
            head = draw.choice(agents) if draw.random() < 0.4 else text(30)
            tokens = head + text(20)
            found = saved.find("", tokens, len(tokens) - 1)
            for end in (len(head), len(tokens)):
                saved.keep("", tokens[:end], [], state, float(end))
            asked, had = asked + len(tokens), had + found.length
            if found.entry is not None:
                saved.unlock(found.entry)
    return had / asked


def test_the_default_alpha_saves_more_than_age_alone_and_about_as_much_as_any():
    shares = {alpha: saved_share(alpha) for alpha in (0.0, ALPHA, 4.0)}
    assert shares[ALPHA] > 1.5 * shares[0.0] and shares[ALPHA] > 0.9 * shares[4.0], shares


# ----- room ----------------------------------------------------------------------------------------------------------


def test_a_locked_entry_stays():
    saved = Saved(Pool(4), budget=AMPLE)
    keep(saved, [1] * 4)
    keep(saved, [2] * 4)
    found = saved.find("", [1] * 5, 4)
    assert saved.make_room(2) and entry_after(saved, [2] * 4) is None and found.entry.here
    assert not saved.make_room(3) and not saved.evict()
    with pytest.raises(ValueError, match="1 are in use"):
        saved.clear()
    saved.unlock(found.entry)
    with pytest.raises(ValueError, match="unlock each find once"):
        saved.unlock(found.entry)
    assert saved.make_room(4)


def test_a_vain_wish_costs_nothing():
    saved = Saved(Pool(4), budget=60)
    keep(saved, [1] * 4)
    running = saved.pool.take(1)
    assert not saved.make_room(4) and not saved.keep("", [5] * 2, [], [torch.zeros(60)], 1.0)
    assert entry_after(saved, [1] * 4) and saved.counts.evictions == 0
    assert not entry_after(saved, [5] * 2)
    is_sound(saved, requests=[running])


def test_the_audit_sees_what_is_lost():
    saved = Saved(Pool(), budget=AMPLE)
    keep(saved, [1, 2, 3])
    saved.pool.hold([5])
    assert disagreements(saved, saved.pool.counted()) == ["page 5 is held 0 times, the pool counts 1"]
    saved.pool.release([5])
    saved.counts.bytes += 1
    assert len(disagreements(saved, {})) == 3  # two pages and the bytes
    saved.counts.bytes -= 1
    (entry,) = saved.entries()
    entry.here = False
    assert any("neither" in line for line in disagreements(saved, saved.pool.counted()))
