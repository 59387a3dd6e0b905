"""A predictor says what its numbers say, and refuses what it was not made for."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nautilus.runtime import UserError
from nautilus.serve.draft.features import NAMES, VERSION
from nautilus.serve.draft.predictor import Header, Predictor, load_predictor, on_line

GRID = (1, 2, 4, 8)


def predictor(mode="survival", hidden=16, seed=0, outputs=None):
    draw = np.random.default_rng(seed)
    widths = [len(NAMES), hidden, hidden, outputs or (1 if mode == "paper" else len(GRID))]
    tensors = {"means": draw.normal(size=widths[0]), "scales": draw.uniform(0.5, 2, size=widths[0])}
    for at, (inside, out) in enumerate(zip(widths, widths[1:], strict=False)):
        tensors |= {f"weight_{at}": draw.normal(size=(out, inside)) / 4, f"bias_{at}": draw.normal(size=out) / 4}
    if mode == "survival":
        heights = np.sort(draw.uniform(size=(len(GRID), 5)), axis=1)
        tensors["knots"] = np.stack([np.tile([0.1, 0.2, 0.4, 0.5, 0.9], (len(GRID), 1)), heights], axis=2)
    header = Header(mode=mode, target="a model", tokenizer="a tokenizer", grid=GRID)
    return Predictor(header, tensors)


def features(seed):
    return np.random.default_rng(seed).normal(size=len(NAMES)).astype(np.float32)


def by_torch(one, values):
    tensors = {name: torch.from_numpy(tensor).double() for name, tensor in one.tensors.items()}
    hidden = (torch.from_numpy(values).double() - tensors["means"]) / tensors["scales"]
    for at in range(3):
        hidden = tensors[f"weight_{at}"] @ hidden + tensors[f"bias_{at}"]
        hidden = hidden.relu() if at < 2 else hidden
    return hidden


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_those_of_the_network(seed):
    for mode in ("paper", "survival"):
        one = predictor(mode, seed=seed)
        torch.testing.assert_close(
            torch.from_numpy(one.outputs(features(seed))).double(), by_torch(one, features(seed)), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("seed", range(20))
def test_survival_is_that_of_the_grid_calibrated_and_falls(seed):
    one, values = predictor(seed=seed), features(seed)
    raw = torch.cumprod(torch.sigmoid(-by_torch(one, values)), 0).tolist()
    want, knots = {0: 1.0}, one.tensors["knots"]
    for at, size in enumerate(GRID):
        want[size] = min([*want.values(), float(np.interp(raw[at], knots[at, :, 0], knots[at, :, 1]))])
    found = one.survival(values, 8)
    assert found == pytest.approx([np.interp(size, [*want], [*want.values()]) for size in range(1, 9)], abs=1e-5)
    assert found == sorted(found, reverse=True) and 0 <= found[-1] <= found[0] <= 1
    for length in (1, 3, 5, 8):
        assert one.survival(values, length) == found[:length]
        assert one.expected(values, length) == pytest.approx(sum(found[:length]))
    assert one.survival(values, 99) == found, "nothing is known beyond the grid"


def test_the_paper_mode_expects_tokens_between_none_and_all():
    one = predictor("paper")
    for seed in range(9):
        got = float(by_torch(one, features(seed))[0])
        assert one.expected(features(seed), 1) == pytest.approx(min(max(got, 0), 1), abs=1e-5)


def test_a_line_between_knots():
    knots, heights = (0.1, 0.2, 0.2, 0.4), (0.0, 0.5, 0.6, 0.8)
    assert on_line(0.05, knots, heights) == 0.0 and on_line(0.9, knots, heights) == 0.8
    assert on_line(0.15, knots, heights) == pytest.approx(0.25) and on_line(0.3, knots, heights) == pytest.approx(0.7)
    assert on_line(0.2, knots, heights) == 0.6 and on_line(0.4, knots, heights) == 0.8
    assert on_line(0.3, (0.5,), (0.7,)) == 0.7


def asked(path, **other):
    return load_predictor(path, **{"target": "a model", "tokenizer": "a tokenizer"} | other)


@pytest.mark.parametrize("mode", ["paper", "survival"])
def test_a_predictor_that_was_saved_is_the_same(mode, tmp_path):
    one = predictor(mode)
    one.save(tmp_path / "payoff.safetensors")
    again = asked(tmp_path / "payoff.safetensors")
    assert again.header == one.header and again.expected(features(3), 7) == one.expected(features(3), 7)


def test_a_predictor_of_something_else_is_refused(tmp_path):
    path = tmp_path / "payoff.safetensors"
    predictor().save(path)
    with pytest.raises(UserError, match="for another model .a model, this one is another"):
        asked(path, target="another")
    with pytest.raises(UserError, match="for another tokenizer"):
        asked(path, tokenizer="another")
    for change in ({"version": VERSION + 1}, {"version": None}):
        rewrite(path, header=change)
        with pytest.raises(UserError, match=f"here they have version {VERSION}; train one"):
            asked(path)
    save_file(load_file(path), path)
    with pytest.raises(UserError, match="no predictor of pay-off"):
        asked(path)


def rewrite(path, header=(), **tensors):
    one = predictor()
    one.save(path)
    said = {**vars(one.header), **dict(header)}
    kept = {name: tensor for name, tensor in (one.tensors | tensors).items() if tensor is not None}
    save_file(kept, path, {"payoff": json.dumps(said)})


@pytest.mark.parametrize(
    "change",
    [
        {"weight_1": np.zeros((3, 3), np.float32)}, {"bias_2": np.zeros(5, np.float32)}, {"means": None},
        {"knots": None}, {"knots": np.zeros((4, 0, 2), np.float32)}, 
        {"knots": np.array([[[1, 0], [0, 1]]] * 4, np.float32)}, {"scales": np.zeros(len(NAMES), np.float32)},
        {"bias_0": np.full(16, np.nan, np.float32)},
        {"means": np.zeros(len(NAMES))}, {"header": {"mode": "other"}}, {"header": {"grid": [1, 2, 4, 4]}},
        {"header": {"grid": []}}, {"header": {"grid": [1, 2, 4, "8"]}}, {"header": {"grid": None}},
        {"header": {"more": 1}}, {"bias_0": np.array(3, np.float32)}, {"header": {"mode": "paper"}},
    ],
)  # fmt: skip
def test_a_damaged_predictor_is_one_message(change, tmp_path):
    rewrite(tmp_path / "payoff.safetensors", **change)
    with pytest.raises(UserError, match="damaged"):
        asked(tmp_path / "payoff.safetensors")


def test_cut_and_missing_files_are_one_message(tmp_path):
    path = tmp_path / "payoff.safetensors"
    predictor().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged"):
            asked(path)
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="no predictor"):
            asked(place)
