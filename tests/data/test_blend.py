"""Blend files, the published mixtures, and what phases do to the order of rows."""

import json

import pytest
import torch

from nautilus.cli import main
from nautilus.data.batch import Batch
from nautilus.data.blend import read_blend, sources_of
from nautilus.data.mix import Mix, Phase, Stream
from nautilus.data.mixtures import BORDERS, PERCENT, mixture
from nautilus.runtime import UserError

TWO = """\
[sources]
a = "a.txt"
b = "b"

[[phases]]
until = 0.25
weights = { a = 3, b = 1 }

[[phases]]
weights = { b = 1 }
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.txt", "b/one.txt", "b/two.txt"):
        (tmp_path / name).write_text("Some text.\n")
    (tmp_path / "two.toml").write_text(TWO)
    return tmp_path


def test_a_blend_names_sources_beside_it_and_phases_in_rows(place):
    blend = place / "two.toml"
    assert [(s.name, s.kind) for s in sources_of(["embedded"], blend)] == [("a", "files"), ("b", "files")]
    assert read_blend(blend).rows(length=64, total=1000) == (Phase(0, {"a": 3, "b": 1}), Phase(250, {"b": 1}))
    assert len(sources_of(["embedded"], None)) == 3


def test_borders_in_tokens_do_not_move_with_the_length_of_the_run(place):
    (place / "two.toml").write_text('unit = "tokens"\n' + TWO.replace("0.25", "6400"))
    for total in (101, 1000):
        assert [p.start for p in read_blend(place / "two.toml").rows(length=64, total=total)] == [0, 100]
    assert [p.start for p in read_blend(place / "two.toml").rows(length=64, total=100)] == [0]


def test_json_says_the_same(place):
    plan = {"sources": {"a": "a.txt", "b": "b"}}
    plan["phases"] = [{"until": 0.25, "weights": {"a": 3, "b": 1}}, {"weights": {"b": 1}}]
    (place / "two.json").write_text(json.dumps(plan))
    one, two = (read_blend(place / name) for name in ("two.toml", "two.json"))
    assert (one.places, one.phases) == (two.places, two.phases)


@pytest.mark.parametrize("name", BORDERS)
def test_the_published_columns_sum_to_a_hundred_and_can_be_mapped(name, place):
    for _, weights in mixture(name):
        assert sum(weights.values()) == pytest.approx(100, abs=0.11)
    used = {source for _, weights in mixture(name) for source in weights}
    text = f'base = "{name}"\n[sources]\n' + "".join(f'"{source}" = "b"\n' for source in used)
    (place / "mapped.toml").write_text(text)
    blend = read_blend(place / "mapped.toml")
    assert blend.phases == tuple(mixture(name)) and {s.name for s in blend.sources()} == used <= set(PERCENT)
    assert [p.start for p in blend.rows(length=8192, total=10_000)] == [0, round(10_000 * BORDERS[name])]


def test_sources_without_a_place_are_an_error_or_left_out(place):
    text = 'base = "super"\n[sources]\ncode = "a.txt"\nfinepdfs-high = "b"\n'
    (place / "some.toml").write_text(text)
    with pytest.raises(UserError, match="no place for academic, code-sft"):
        read_blend(place / "some.toml")
    (place / "some.toml").write_text('missing = "drop"\n' + text)
    assert read_blend(place / "some.toml").phases == (
        (0.8, {"code": 14.0}),
        (1.0, {"code": 14.0, "finepdfs-high": 14.3}),
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        (("until = 0.25", "until = 1.5"), "ends at until=1.5"),
        (("until = 0.25\n", ""), "it needs weights and, but for the last, until"),
        (("weights = { b = 1 }", "until = 0.5\nweights = { b = 1 }"), "goes to the end"),
        (("b = 1 }\n\n[[", 'b = "much" }\n\n[['), "numbers from 0 on"),
        (("{ b = 1 }", "{ b = 0 }"), "sum must be positive"),
        (("a = 3, ", ""), "no phase gives weight to a"),
        (('b = "b"\n', ""), "no place for b"),
        (("[sources]", "kind = 1\n[sources]"), "has kind"),
        (("[sources]", 'base = "nano"\n[sources]'), "both"),
        (("[sources]", 'unit = "steps"\n[sources]'), "neither share nor tokens"),
        (("[sources]", "[sources"), "is no TOML"),
        (("a = 3", "a = nan"), "numbers from 0 on"),
        (("a = 3", "a = 1" + "0" * 400), "numbers from 0 on"),
        (("[sources]", '[sources]\n"../../a" = "a.txt"'), "names a folder of the run"),
        (("[sources]", '[sources]\n"" = "a.txt"'), "names a folder of the run"),
    ],
)
def test_what_cannot_be_is_said(place, change, complaint):
    assert change[0] in TWO
    (place / "two.toml").write_text(TWO.replace(*change))
    with pytest.raises(UserError, match=complaint):
        read_blend(place / "two.toml")


def test_a_model_name_alone_says_what_to_write_and_an_empty_phase_is_refused(place):
    with pytest.raises(UserError, match='base = "nano"'):
        read_blend("nano")
    with pytest.raises(UserError, match="has no rows"):
        read_blend(place / "two.toml").rows(length=64, total=1)
    (place / "two.toml").write_text(TWO.replace('"b"', '"embedded"'))
    with pytest.raises(UserError, match="stands for python, docstrings, reference"):
        sources_of([], place / "two.toml")


# ----- the order of rows ---------------------------------------------------------------------------------------------

LATER = (Phase(1000, {"b": 1.0, "c": 1.0}), Phase(1500, {"a": 1.0}))
MIX = Mix({"a": (3.0, 50), "b": (1.0, 40), "c": (0.0, 30)}, 3, LATER)


def test_each_phase_gives_its_sources_their_shares_and_no_others():
    places = MIX.places(0, 2500)
    for (first, last), shares in {
        (0, 1000): {"a": 0.75, "b": 0.25},
        (1000, 1500): {"b": 0.5, "c": 0.5},
        (1500, 2500): {"a": 1.0},
    }.items():
        drawn = [place.source for place in places[first:last]]
        assert set(drawn) == set(shares)
        for name, share in shares.items():
            assert abs(drawn.count(name) - share * (last - first)) < 12


@pytest.mark.parametrize("start", [0, 1, 990, 999, 1000, 1001, 1400, 1500, 2222])
def test_a_row_does_not_depend_on_where_counting_began_with_phases(start):
    assert MIX.places(start, start + 300) == MIX.places(0, start + 300)[start:]
    for name in MIX.names:
        assert MIX.counts(start)[name] == sum(place.source == name for place in MIX.places(0, start))


def test_a_source_goes_on_in_its_pass_over_a_border():
    rows = [place.row for place in MIX.places(0, 2500) if place.source == "b"]
    assert all(sorted(rows[i : i + 40]) == list(range(40)) for i in range(0, len(rows) - 39, 40))


def numbered(rows: int, first: int) -> Batch:
    """Rows that can be told apart: row r holds first + r."""
    tokens = (first + torch.arange(rows))[:, None].expand(rows, 4).contiguous()
    return Batch(tokens, {"next_token": torch.ones(rows, 4)})


def phased(**how) -> Stream:
    sources = {"a": numbered(30, 1), "b": numbered(20, 1000)}
    plan = {"rows": 12, "micro": 2, "seed": 5, "weights": {"a": 1.0, "b": 0.0}, "later": [Phase(30, {"b": 1.0})]}
    return Stream(sources, **(plan | how))


def test_a_border_inside_a_step_is_the_same_on_any_number_of_ranks_and_after_a_resume():
    whole = [
        [row for batch in step for row in batch.tokens[:, 0].tolist()]
        for step, _ in zip(phased(), range(5), strict=False)
    ]
    flat = [row for step in whole for row in step]
    assert all(row < 1000 for row in flat[:30]) and all(row >= 1000 for row in flat[30:])
    parts = [phased(rank=rank, ranks=3, micro=4) for rank in range(3)]
    dealt = [[row for part in parts for batch in next(part) for row in batch.tokens[:, 0].tolist()] for _ in range(5)]
    assert dealt == whole
    first, second = phased(), phased()
    next(first), next(first)
    second.restore(first.state())
    assert [batch.tokens.tolist() for batch in next(second)] == [batch.tokens.tolist() for batch in next(first)]
    with pytest.raises(UserError, match="fingerprint"):
        phased(later=[Phase(31, {"b": 1.0})]).restore(first.state())


@pytest.mark.slow
def test_a_model_is_trained_by_a_blend(place, tmp_path, capsys):
    for name in ("a.txt", "b/one.txt", "b/two.txt", "b/three.txt"):
        (place / name).write_text("".join(f"Line {i} of {name} comes before {i + 1}.\n" for i in range(900)))
    small = "toy steps=4 rows=2 micro=1 length=48 optim.warmup=0 optim.decay=0.5 model.vocab=400 prompts=a"
    words = ["pretrain", *small.split(), f"out={tmp_path / 'out'}", f"blend={place / 'two.toml'}"]
    assert main(words) == 0
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "| text: a |" in card and "## Training" in card and "| steps | 4 |" in card and "## Measures" in card
    assert main(words) == 0  # the same again, resumed
    assert (tmp_path / "out" / "model" / "README.md").read_text().count("## Training") == 1
    assert main([*words, f"blend={place / 'none.toml'}"]) == 2


def test_phases_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="must begin after row"):
        Mix({"a": (1.0, 5)}, 0, (Phase(0, {"a": 1.0}),))
    with pytest.raises(UserError, match="name only"):
        Mix({"a": (1.0, 5)}, 0, (Phase(3, {"z": 1.0}),))
    with pytest.raises(UserError, match="weight to no source"):
        Mix({"a": (1.0, 5)}, 0, (Phase(3, {"a": 0.0}),))
