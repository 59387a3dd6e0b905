"""The report of training on tasks."""

import json
import math

import pytest

from nautilus.eval import practice
from nautilus.eval.practice import Practised, draw_scores, interval, kept, summary, write
from nautilus.eval.suite import Z
from nautilus.posttrain.profile import Score
from nautilus.runtime import Run


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(practice, "picture", lambda draw, *data, height=0: "<svg></svg>")
    monkeypatch.setattr(practice.charts, "png", lambda *given: None)


def score(right, longest, most, count=100):
    """So many of the answers are right; one turn thinks longest."""
    rewards = [float(number < right) for number in range(count)]
    return Score(rewards=rewards, thought=[2 * longest] * count, longest=[0] * (count - 1) + [longest], most=most)


def by_budget(**asked):
    """Asked in another order than that of the budgets."""
    found = {8: score(50, 8, 8), 0: score(20, 0, 0), 32: score(80, 32, 32), **{int(k[1:]): v for k, v in asked.items()}}
    return {budget: {"sum": one} for budget, one in found.items()}


@pytest.mark.parametrize(
    "asked, broken",
    [
        ({}, []), ({"b32": score(45, 30, 32)}, []), ({"b32": score(20, 30, 32)}, ["rises for sum at 32"]),
        ({"b8": score(50, 9, 8)}, ["within for sum at 8"]), ({"b8": score(50, 9, 10)}, []),
        ({"b0": score(90, 3, 0)}, ["rises for sum at 8", "within for sum at 0"]),
        ({"b32": score(0, 5, 32, count=1)}, []),
    ],
)  # fmt: skip
def test_a_curve_says_where_it_falls_and_where_a_budget_is_broken(tmp_path, asked, broken):
    """Beyond the intervals only, and by the longest turn: an answer of several turns may think more."""
    curve = by_budget(**asked)
    found = Practised(title="t", command="c", scores={"after": curve[8]}, curve=curve)
    run = Run.create(tmp_path / "run", {})
    write(run, found)
    told = json.loads((run.folder / "results.json").read_text())["curve"]
    said = [f"{key} for sum at {at}" for key in ("rises", "within") for at in told if not told[at]["sum"][key]]
    assert said == broken and told["8"]["sum"] == told["8"]["sum"] | kept(curve, 8, "sum")
    words = f"Not so: {', '.join(broken)}." if broken else "Both are so for every budget."
    assert words in run.report.read_text()
    assert {row[-2:] == ["yes", "yes"] for row in found.by_budget} == ({True, False} if broken else {True})
    assert summary(found)[1].title == "Thinking budget"


def test_parts_of_verdicts_are_told_beside_the_reward(tmp_path, outline):
    """By task and part, each over the answers of which it is known."""
    before = {"abstain": Score(rewards=[0.5, 1.0], parts={"right": [0.0, 1.0], "invented": [1.0]})}
    after = {"sort": Score(rewards=[1.0]), "abstain": Score(rewards=[1.0, 1.0], parts={"right": [1.0, 1.0]})}
    found = Practised(title="t", command="c", scores={"before": before, "after": after})
    assert found.parts == [
        ["abstain", "right", "before", "0.500", "2"], ["abstain", "right", "after", "1.000", "2"],
        ["abstain", "invented", "before", "1.000", "1"],
    ]  # fmt: skip
    run = Run.create(tmp_path / "run", {})
    write(run, found)
    told = json.loads((run.folder / "results.json").read_text())["scores"]
    assert (
        told["before"]["abstain"]["parts"] == {"right": 0.5, "invented": 1.0} and "parts" not in told["after"]["sort"]
    )
    assert "invented" in outline(run.report.read_text()).text


def test_the_lead_of_each_teacher_has_a_line_of_its_own(monkeypatch):
    drawn = {}
    monkeypatch.setattr(practice, "lines_chart", lambda title, says, lines, unit: drawn.setdefault(title, lines))
    rows = [{"step": at, "surprise": 0.5, "teacher_gap": -0.2, "teacher_gap_sort": -0.1} for at in range(3)]
    practice.on_the_way([{**row, "teacher_gap_count": -0.3} for row in rows])
    assert [line.name for line in drawn["Teacher's lead"]] == ["sort", "count"] and len(drawn["Surprise"]) == 1
    drawn.clear()
    practice.on_the_way([{"step": 0, "teacher_gap": -0.2}])
    assert [line.values for line in drawn["Teacher's lead"]] == [[-0.2]], "of a run that did not tell them apart"


@pytest.mark.parametrize("models, down", [(2, "task"), (7, "model")])
def test_the_longer_of_models_and_tasks_has_the_lines_and_the_other_is_told_apart(models, down):
    figures = pytest.importorskip("matplotlib.figure")
    scores = {f"model {m}": {f"task {t}": Score(rewards=[0.0, 1.0]) for t in range(3)} for m in range(models)}
    del scores["model 1"]["task 2"]  # which was not asked
    figure = figures.Figure()
    draw_scores(figure, Practised(title="", command="", scores=scores))
    (axes,), (legend,) = figure.axes, figure.legends
    lines, apart = ([f"model {m}" for m in range(models)], [f"task {t}" for t in range(3)])
    lines, apart = (lines, apart) if down == "model" else (apart, lines)
    assert [label.get_text() for label in axes.get_yticklabels()] == lines
    assert [label.get_text() for label in legend.get_texts()] == apart
    assert sum(len(points.lines[0].get_xdata()) for points in axes.containers) == 3 * models - 1


def test_intervals_stay_within_what_can_be_and_few_answers_say_little():
    low, high = interval(Score(rewards=[1.0] * 4))
    assert high == pytest.approx(1) and low == pytest.approx(4 / (4 + Z**2))
    low, high = interval(Score(rewards=[1.0] * 800 + [0.0] * 200))
    assert (low, high) == pytest.approx((0.774, 0.824), abs=1e-3)  # of Wilson
    low, high = interval(Score(rewards=[0.9, 1.0, 0.5]))
    assert high == 1 and 0 < low < 0.8
    assert interval(Score(rewards=[-3.0, 5.0]))[0] < -3
    assert all(math.isnan(end) for end in interval(Score(rewards=[0.5])))
    assert practice.ends([Score(rewards=[0.5])]) == [[0], [0]]
