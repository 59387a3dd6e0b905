import json
import math
import random

import pytest

from nautilus.eval.suite import Cell, Evaluation, share, summary, wilson, write
from nautilus.runtime import Run

CELLS = [
    share("single", "4,096", [1.0] * 20),
    share("single", "8,192", [1.0, 0.0, 0.5]),
    share("variables", "4,096", []),
    Cell(task="text", column="perplexity", count=3, score=12.5, low=math.nan, high=math.nan),
]


def test_the_interval_is_wilsons():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert all(map(math.isnan, wilson(math.nan, 0)))


def test_the_interval_holds_the_mean_often_enough():
    """Of scores between 0 and 1, more often than of shares."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        scores = [draw.choice([0, 0.25, 0.5, 1, 1, 1]) for _ in range(20)]
        cell = share("a", "b", scores)
        held += cell.low <= 3.75 / 6 <= cell.high
    assert held >= 0.95 * 400


def test_the_report_has_every_cell(tmp_path):
    found = Evaluation(
        title="m: ruler", about="About.", command="nautilus eval m", cells=CELLS,
        facts={"model": "m"}, examples=[["single", "4,096", "<7>", "8"]],
    )  # fmt: skip
    write(Run(tmp_path), found)
    page = (tmp_path / "report.html").read_text()
    assert "1.000 (0.839–1.000) n 20" in page and "12.500 n 3" in page and "&lt;7&gt;" in page and "nan n 0" in page
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cells[0]["score"] == 1 and cells[0]["low"] == pytest.approx(0.839, abs=1e-3) and cells[3]["low"] is None
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert found.rows[0] == ["single", CELLS[0].shown, CELLS[1].shown, "–"] and summary(found).row_count == 3
