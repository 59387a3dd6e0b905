"""What the benchmark of the pipeline makes of results, without running any."""

import json

import pytest

from tests.benchmarks.program import program

TASKS = "sort", "sum"


@pytest.fixture(scope="module")
def benchmark_module():
    with program("posttrain") as module:
        yield module


def results(**other):
    """Of a pipeline in which all is as it should be, but for other rewards: model=(of sort, of sum)."""
    rewards = {
        "sft": (0.4, 0.5), "sort specialist 1": (0.8, 0.45), "sum specialist 1": (0.35, 0.9), "student 1": (0.7, 0.8),
        "sort specialist 2": (0.85, 0.7), "sum specialist 2": (0.6, 0.95), "student 2": (0.78, 0.88),
    }  # fmt: skip
    rewards |= {name.replace("_", " "): pair for name, pair in other.items()}
    scores = {
        name: {task: {"reward": value} for task, value in zip(TASKS, pair, strict=True)}
        for name, pair in rewards.items()
    }
    line = {str(at): {"sum": {"reward": 0.5, "longest": at, "rises": True, "within": True}} for at in (0, 8)}
    return {"scores": scores, "curve": line}


def test_a_seed_whose_numbers_are_as_they_should_be_holds(benchmark_module):
    *tasks, whole = benchmark_module.rows_of(3, results())
    assert [(row["task"], row["gain"], row["recovered"]) for row in tasks] == [("sort", 40, 0.95), ("sum", 40, 0.95)]
    assert whole["holds"] is True and whole["fails"] == [] and whole["seed"] == 3
    assert whole["least"]["student 2"] == 78 and whole["least"]["sum specialist 2"] == 60
    assert whole["budgets"] == {
        "sum": {"points": {"0": 50, "8": 50}, "longest": {"0": 0, "8": 8}, "rises": True, "within": True}
    }


@pytest.mark.parametrize(
    "other, fails",
    [
        ({"sort_specialist_1": (0.54, 0.45)}, ["sort: gain 14.0"]),
        ({"student_2": (0.75, 0.88)}, ["sort: recovered 0.875"]),
        ({"sort_specialist_1": (0.4, 0.45)}, ["sort: gain 0.0", "sort: recovered None"]),
        ({"sort_specialist_1": (0.8, 0.78)}, ["least 78.0: sort specialist 1 78.0"]),
        ({"sort_specialist_2": (0.85, 0.78)}, ["least 78.0: sort specialist 2 78.0"]),
    ],
)  # fmt: skip
def test_what_fails_is_named(benchmark_module, other, fails):
    whole = benchmark_module.rows_of(0, results(**other))[-1]
    assert whole["holds"] is False and whole["fails"] == fails


def test_budgets_that_fall_or_are_broken_fail(benchmark_module, tmp_path, monkeypatch, capsys):
    found = results()
    found["curve"]["8"]["sum"] |= {"rises": False}
    found["curve"]["0"]["sum"] |= {"within": False}
    assert benchmark_module.rows_of(0, found)[-1]["fails"] == ["sum: not rises", "sum: not within"]
    assert benchmark_module.rows_of(0, {**found, "curve": {}})[-1]["fails"] == ["no task thinks"]
    for seed, one in enumerate((results(), found)):
        place = tmp_path / f"seed-{seed}" / "posttrain" / "results.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(one))
    benchmark_module.main(["--out", str(tmp_path), "--seeds", "0", "1"])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "seed 0: holds true", "seed 1: holds false  sum: not rises; sum: not within",
    ]  # fmt: skip
