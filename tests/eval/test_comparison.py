"""A comparison's table, page and record, also where runs are missing."""

import json
import math

import pytest

from nautilus.eval.comparison import Arm, Comparison, Measure, curves, gaps, record, render, rows_of, summary, write
from nautilus.eval.material import Line
from nautilus.eval.techniques import Demonstration
from nautilus.runtime import Run

WORK = {"parameters": 1000, "active": 500, "tokens": 64}


def arm(name, scores, **others):
    lines = {seed: Line(name, [0, 1, 2, 3], [5.0, 4.0, 3.0 + seed / 10, 2.0 + seed / 10]) for seed in scores}
    seconds = dict.fromkeys(scores, 90.0)
    return Arm(name=name, changes="a=1", work=WORK, scores={"bits": scores}, curves=lines, seconds=seconds, **others)


def comparison(*arms, **others):
    return Comparison(
        title="a <study>",
        about="Why & what.",
        command="nautilus compare",
        arms=arms,
        measures={"bits": Measure("Bits per byte", "lower")},
        **others,
    )


WHOLE = comparison(arm("bf16", {0: 2.0, 1: 2.2, 2: 2.1}), arm("nvfp4", {0: 2.01, 1: 2.22, 2: 2.13}))
ONE = comparison(arm("bf16", {0: 2.0}), arm("nvfp4", {0: 2.01}), arm("lost", {}, failed={0: "no <room>"}))


def test_the_rows_are_worked_by_hand():
    """Differences 0.01, 0.02, 0.03: 0.02 with half width 4.302653 * 0.01 / sqrt 3."""
    control, variant = rows_of(WHOLE, "bits")
    assert control == ["bf16", "2.1000", "control", "", "3", ""]
    assert variant == ["nvfp4", "2.1200", "+0.0200 ± 0.0248", "+0.95 %", "3", "inside noise"]


def test_one_seed_has_a_difference_and_no_interval_and_no_run_has_neither():
    _, variant, lost = rows_of(ONE, "bits")
    assert variant[2:] == ["+0.0100", "+0.50 %", "1", "no interval"]
    assert lost == ["lost", "–", "–", "–", "0", "no pair"]


def test_curves_are_means_with_the_range_of_the_seeds():
    first, _ = curves(WHOLE)
    ends = first.middle.values[-1], first.low[-1], first.high[-1]  # of the mean of the last two steps
    assert ends == pytest.approx((2.6, 2.5, 2.7))
    assert len(curves(ONE)) == 2
    (apart,) = gaps(WHOLE)
    assert apart.middle.values == [0, 0, 0, 0] and apart.middle.name == "nvfp4" and len(gaps(ONE)) == 1


@pytest.mark.parametrize("found", [WHOLE, ONE], ids=["whole", "one"])
def test_a_page_and_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    write(Run(tmp_path), found)
    page = (tmp_path / "report.html").read_text()
    assert page == render(found) and "a &lt;study&gt;" in page and "<script" not in page and "://" not in page
    assert page.count("<svg") == 3 and "± 0.0248" in page or found is ONE
    assert "no &lt;room&gt;" in page or found is WHOLE
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [table.title for table in summary(found)] == ["Bits per byte (lower is better)", "Work"]


def test_without_any_run_the_page_still_is_one(tmp_path):
    found = comparison(arm("bf16", {}, failed={0: "x"}), arm("nvfp4", {}, failed={0: "x"}))
    write(Run(tmp_path), found)
    assert found.seeds == 1 and "no pair" in (tmp_path / "report.html").read_text()


def test_without_matplotlib_there_are_tables(monkeypatch):
    monkeypatch.setattr("nautilus.eval.charts.missing", lambda: "no pictures here")
    page = render(WHOLE)
    assert "<svg" not in page and "+0.0200 ± 0.0248" in page


def test_demonstrations_are_shown():
    shown = Demonstration("Rotation", "Says.", ["outliers", "error"], [[4.0, 0.125]])
    assert "0.125" in render(comparison(*WHOLE.arms, demonstrations=[shown])) and "Techniques" not in render(WHOLE)


def test_a_record_has_every_seed_and_is_strict_json():
    row = json.loads(json.dumps(record(ONE), allow_nan=False))
    assert row["rows"][1]["bits"] == {"by_seed": {"0": 2.01}, "difference": pytest.approx(0.01), "interval_95": None}
    assert row["rows"][2]["failed"] == 1 and row["rows"][2]["bits"] == {"by_seed": {}}
    low, high = record(WHOLE)["rows"][1]["bits"]["interval_95"]
    assert math.isclose(low + high, 0.04) and {"command", "machine", "date", "study", "shared"} <= row.keys()
