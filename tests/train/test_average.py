import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautilus.model.shards import write_file
from nautilus.runtime import Run, UserError
from nautilus.train.average import average_checkpoints, merge_coefficients
from nautilus.train.checkpoint import Checkpoints, snapshots
from nautilus.train.loop import fit
from nautilus.train.objective import next_token
from nautilus.train.optim import OptimConfig, adamw


def test_coefficients_of_one_and_two_checkpoints_are_those_of_the_formula():
    assert merge_coefficients(1) == [1.0]
    assert merge_coefficients(2) == pytest.approx([math.sqrt(1 / 2), 1 - math.sqrt(1 / 2)])


@given(st.integers(2, 40))
def test_coefficients_sum_to_one_and_follow_the_published_rule(count):
    c = merge_coefficients(count)
    s = [1 - math.sqrt(i / count) for i in range(count)]
    assert math.fsum(c) == pytest.approx(1, abs=1e-12)
    assert c[0] == pytest.approx(math.sqrt(1 / count))
    assert c[-1] == pytest.approx(s[-1])
    for i in range(1, count - 1):
        assert c[i] == pytest.approx(s[i] - s[i + 1])
    assert merge_coefficients(count, "uniform") == [1 / count] * count


def test_twenty_checkpoints_weigh_the_update_of_each_interval_as_the_decayed_rate_would():
    """theta = sum_i c_i theta_i moves by step j in proportion to the sum of c_i from j on, which is 1 - sqrt(j/n)."""
    c = merge_coefficients(20)
    for j in range(1, 20):
        assert math.fsum(c[j:]) == pytest.approx(1 - math.sqrt(j / 20))


def test_the_order_of_the_coefficients_can_be_reversed_or_shuffled_by_a_seed():
    c = merge_coefficients(20)
    assert merge_coefficients(20, order="reversed") == c[::-1]
    shuffles = [merge_coefficients(20, order="random", seed=seed) for seed in (0, 0, 1)]
    assert shuffles[0] == shuffles[1] != shuffles[2] and all(sorted(s) == sorted(c) for s in shuffles)
    assert shuffles[0] not in (c, c[::-1])
    with pytest.raises(ValueError, match="order='backwards'"):
        merge_coefficients(2, order="backwards")


def folders(tmp_path, values):
    made = []
    for i, tensors in enumerate(values):
        made.append(tmp_path / f"{i}")
        made[-1].mkdir()
        write_file(made[-1] / "model.safetensors", tensors)
    return made


def test_the_average_is_taken_in_float32_whatever_the_files_hold(tmp_path):
    g = torch.Generator().manual_seed(0)
    kept = [torch.randn(5, 3, generator=g).bfloat16() for _ in range(4)]
    got = average_checkpoints(folders(tmp_path, [{"w": w} for w in kept]))["w"]
    want = sum(c * w.double() for c, w in zip(merge_coefficients(4), kept, strict=True))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "second, message",
    [
        ({"w": torch.zeros(3)}, "cannot average w"),
        ({"w": torch.zeros(2, dtype=torch.uint8)}, "plain checkpoints"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "only one of the two has v"),
    ],
)
def test_checkpoints_that_do_not_go_together_are_refused(tmp_path, second, message):
    with pytest.raises(UserError, match=message):
        average_checkpoints(folders(tmp_path, [{"w": torch.zeros(2)}, second]))


@pytest.mark.parametrize("count, kind, message", [(0, "uniform", "at least one"), (2, "median", "median")])
def test_impossible_averages_are_refused(count, kind, message):
    with pytest.raises(ValueError, match=message):
        merge_coefficients(count, kind)


def test_snapshots_of_a_run_average_into_a_model_that_loads(tmp_path, small_model, small_stream):
    model, run = small_model(), Run.create(tmp_path / "run", {})
    kept = []
    fit(
        model,
        small_stream(),
        next_token,
        adamw(model, OptimConfig()),
        steps=7,
        checkpoints=Checkpoints(run=run, snapshots=2),
        log=lambda line: kept.append({name: value.clone() for name, value in model.state_dict().items()}),
    )
    assert [folder.name for folder in snapshots(run)] == [f"step_{step:09}" for step in (2, 4, 6)]
    averaged = average_checkpoints(snapshots(run), kind="uniform")
    want = {name: (kept[1][name] + kept[3][name] + kept[5][name]) / 3 for name in kept[0]}
    for name, value in averaged.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
    model.load_state_dict(averaged)
