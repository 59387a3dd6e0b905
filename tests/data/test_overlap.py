"""Windows of bytes, against the obvious way."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data import overlap
from nautilus.data.overlap import BASE, SPREAD, Windows, window_hashes

quick = settings(max_examples=50, deadline=None)


@quick
@given(st.binary(max_size=80), st.integers(1, 20))
def test_hashes_of_windows_are_what_the_formula_says(raw, width):
    plain = [
        sum((raw[i + j] + 1) * BASE**j for j in range(width)) * int(SPREAD) % (1 << 64)
        for i in range(len(raw) - width + 1)
    ]
    assert window_hashes(raw, width).tolist() == plain


@quick
@given(st.text("ab \n", max_size=60), st.lists(st.text("abAB ", max_size=40), max_size=4), st.integers(3, 9))
def test_a_shared_window_is_found_exactly_where_there_is_one(text, known, width):
    windows = Windows([known[:2], known[2:]], width)
    parts = [overlap.plain(each) for each in known]
    mine = overlap.plain(text)
    shared = [mine[i : i + width] for i in range(len(mine) - width + 1) if any(mine[i : i + width] in p for p in parts)]
    found = windows.find(text)
    assert (found is None) == (not shared)
    if found:
        number, stretch = found
        assert stretch == shared[0] and any(stretch in part for part in (parts[:2], parts[2:])[number])


def test_windows_over_the_edge_of_a_piece_are_found(monkeypatch):
    monkeypatch.setattr(overlap, "PIECE", 16)
    overlap.powers.cache_clear()
    secret = "the quick brown fox jumps"
    windows = Windows([[f"x {secret} y"]], 20)
    for ahead in range(40):
        assert windows.find("z" * ahead + f" {secret.upper()}  z")[1] in f" {secret} "
    assert windows.find("the quick brown cat jumps" * 3) is None
    overlap.powers.cache_clear()
