"""Many processes train as one does: in every layout the same curve, saved in one and resumed in another."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import nautilus
from nautilus.data.batch import Batch
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError, read_metrics
from nautilus.train.layout import Layout, Work
from nautilus.train.objective import pretrain
from nautilus.train.parallel import start
from nautilus.train.ranks import ALONE

FILE = pathlib.Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)
assert_same_curve = helper.assert_same_curve


def new_run(folder: pathlib.Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"nautilus_run": 1, "settings": {}}')
    return str(folder)


def size(layout: dict) -> int:
    return Layout(**layout).size


def test_two_processes_with_half_the_rows_and_experts_each_train_as_one(tmp_path, alone):
    got = helper.together(tmp_path, 2, layout={"dp": 2, "ep": 2}, steps=3)
    assert_same_curve(got, alone(steps=3))


# micro: rows of a micro-batch; with all of a rank's rows in one, health too is of the same rows as a single process's.
LAYOUTS = [
    ({"dp": 2}, {"micro": 1}),
    ({"dp": 2, "ep": 2}, {"micro": 1, "documents": True}),
    ({"tp": 2}, {"health": 4, "documents": True}),
    ({"tp": 2, "ep": 2}, {"health": 4}),
    ({"cp": 2}, {"health": 4, "documents": True}),
    ({"cp": 2, "ep": 2}, {"health": 4}),
]
PRODUCTS = [
    ({"dp": 4, "ep": 2}, {"micro": 1, "documents": True}),
    ({"dp": 4, "ep": 2, "replicas": 2}, {"micro": 1}),
    ({"dp": 2, "cp": 2, "ep": 4}, {"micro": 1, "documents": True}),
    ({"dp": 2, "tp": 2, "ep": 2}, {"micro": 1, "documents": True}),
    ({"tp": 2, "cp": 2, "ep": 2}, {"health": 4, "documents": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "settings"), LAYOUTS + PRODUCTS, ids=lambda value: "-".join(map(str, value)))
def test_every_layout_gives_the_curve_of_one_process(tmp_path, alone, layout, settings):
    got = helper.together(tmp_path, size(layout), layout=layout, steps=20, **settings)
    assert_same_curve(got, alone(steps=20, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2}, {"cp": 2}], ids=["tp", "cp"])
@pytest.mark.parametrize("like", ["qwen3_30b_a3b", "gpt_oss_20b"])
def test_head_norms_rotary_positions_windows_and_gates_survive_it(tmp_path, alone, like, layout):
    settings = {"like": like, "steps": 4, "health": 2, "documents": True}
    assert_same_curve(helper.together(tmp_path, 2, layout=layout, **settings), alone(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"dp": 2, "ep": 2}, {"tp": 2, "ep": 2}, {"cp": 2}], ids=["dp", "tp", "cp"])
def test_bf16_activations_give_the_same_first_step_up_to_their_rounding(tmp_path, alone, layout):
    """Only the first: Adam makes full steps of gradients that are all rounding, so that later ones drift apart."""
    settings = {"compute": "bfloat16", "steps": 1}
    got, want = helper.together(tmp_path, 2, layout=layout, **settings), alone(**settings)
    assert_same_curve(got, want, rel=2**-8)


@pytest.mark.slow
def test_a_state_of_any_layout_is_resumed_in_any_other(tmp_path, alone):
    layouts = [{"tp": 2}, {"dp": 2, "ep": 2}, {}, {"cp": 2, "ep": 2}, {"dp": 4, "replicas": 2, "ep": 2}, {}]
    state, got = new_run(tmp_path / "run"), []
    for number, layout in enumerate(layouts):
        folder = tmp_path / str(number)
        got += helper.together(folder, size(layout), layout=layout, steps=3 * (number + 1), state=state)
    assert_same_curve(got, alone(steps=3 * len(layouts)))
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(3 * len(layouts)))


@pytest.mark.slow
def test_a_killed_rank_costs_the_steps_since_the_last_state_and_nothing_else(tmp_path, alone):
    settings = {"layout": {"dp": 2, "ep": 2}, "steps": 7, "every": 2, "die": 4, "state": new_run(tmp_path / "run")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(FILE), str(tmp_path), json.dumps(settings)]
    environment = os.environ | helper.ALIKE
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=helper.PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    want = alone(steps=7)
    again = helper.curve_of(tmp_path)
    assert [line["step"] for line in again] == [4, 5, 6]
    assert_same_curve(again, want[4:])
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(7))


@pytest.mark.parametrize(
    "change", [{"dp": 0}, {"dp": 3, "replicas": 2}, {"dp": 2, "ep": 3}, {"dp": 4, "ep": 4, "replicas": 2}]
)
def test_a_layout_that_cannot_be_says_why(change):
    with pytest.raises(ValueError, match="layout"):
        Layout(**change)


def test_a_layout_of_one_needs_no_processes_and_another_number_of_them_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start(Layout(), shrink(preset("toy")), Work()) is ALONE
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 were started"):
        start(Layout(tp=2), replace(shrink(preset("toy")), vocab=96), Work())


def test_a_layout_is_part_of_the_settings_but_not_of_the_run(monkeypatch):
    """Without torchrun, the command starts itself once for each process."""
    called = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["nautilus", "pretrain", "layout.dp=2"])
    monkeypatch.setattr(os, "execv", lambda program, words: called.append(words) or sys.exit(0))
    with pytest.raises(SystemExit):
        start(Layout(dp=2), shrink(preset("toy")), Work())
    assert called[0][-5:] == ["2", "-m", "nautilus", "pretrain", "layout.dp=2"]


class Group:
    """As much of a process group as cutting rows needs."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.size = lambda: rank, lambda: ranks


def test_stretches_of_a_row_hold_each_target_once_on_the_rank_that_predicts_it():
    from nautilus.train.parallel.context import HALO, stretch

    tokens, weight = torch.arange(48).view(2, 24), torch.rand(2, 24)
    weight[:, 0] = 0
    whole = pretrain(mtp_depths=2, aux_weight=1.0).weigh(Batch(tokens, {"next_token": weight}))
    parts = [stretch(whole, Group(rank, 2)) for rank in range(2)]
    for term, ahead in {"next_token": 1, "mtp_1": 2, "mtp_2": 3, "balance": 0}.items():
        total = torch.zeros(2, 24 + HALO)
        for rank, part in enumerate(parts):
            total[:, 12 * rank : 12 * rank + 12 + HALO] += part.weights[term]
            predicted_from = part.weights[term].nonzero()[:, 1] - ahead
            assert ((predicted_from >= 0) & (predicted_from < 12)).all()
        assert torch.equal(total[:, :24], whole.weights[term]) and total[:, 24:].sum() == 0
    assert torch.equal(parts[0].tokens[:, : 12 + HALO], tokens[:, : 12 + HALO])
    with pytest.raises(UserError, match="cannot be dealt"):
        stretch(whole, Group(0, 5))
    with pytest.raises(UserError, match="not those of policy"):
        stretch(Batch(tokens, {"policy": weight}), Group(0, 2))


def test_a_cut_by_sections_is_undone_by_joining():
    from nautilus.train.parallel.cuts import Cut

    class Mesh:
        def __init__(self, rank):
            self.size, self.get_local_rank = lambda: 2, lambda: rank

        def __getitem__(self, axis):
            return self

    whole = torch.arange(24).view(12, 2)
    cuts = [Cut(mesh=Mesh(rank), axis="tp", dim=0, sections=(4, 2, 6)) for rank in range(2)]
    pieces = [cut.take(whole) for cut in cuts]
    assert pieces[0][:, 0].tolist() == [0, 2, 8, 12, 14, 16]
    assert torch.equal(cuts[0].join(pieces), whole)


@pytest.mark.slow
def test_the_command_starts_its_processes_and_another_layout_goes_on_with_its_run(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        counting = " ".join(f"{n} comes before {n + 1}." for n in range(number, number + 60))
        (tmp_path / "text" / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    small = "rows=2 length=48 steps=4 save_every=2 optim.warmup=0 model.vocab=400 prompts=a compute=fp32"
    run = [sys.executable, "-m", "nautilus", "pretrain", "toy", f"data={tmp_path}/text", f"out={tmp_path}/run"]
    environment = os.environ | helper.ALIKE

    def call(*words: str) -> None:
        done = subprocess.run(
            [*run, *small.split(), *words], env=environment, capture_output=True, text=True, timeout=helper.PATIENCE
        )
        assert done.returncode == 0, done.stderr[-3000:]

    call("layout.dp=2", "layout.ep=2", "average=2", "average_every=2")
    assert (tmp_path / "run" / "state" / "step_000000004" / "shards").is_dir()
    call("average=2", "average_every=2")
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(4))
    assert "layout" not in json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert nautilus.load(tmp_path / "run")[0].config.vocab == 400
