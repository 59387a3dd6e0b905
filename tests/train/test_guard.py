"""Faults are injected into training; what follows must be exactly a training that never saw the text in between."""

import logging
import math
import os
import signal

import pytest
import torch

import nautilus.train.checkpoint as checkpoint
from nautilus.runtime import Run, UserError, read_metrics
from nautilus.train.checkpoint import Checkpoints, state_folders
from nautilus.train.guard import Guard, Spike, Watch, incidents, note
from nautilus.train.interrupt import stop_signals
from nautilus.train.loop import fit
from nautilus.train.objective import Objective, pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule

STEPS = 12
OPTIM = OptimConfig(lr=1e-2, warmup=2)


def faulty(bad, factor):
    """The objective, but the loss of the batches named in `bad` is multiplied by `factor`."""
    whole = pretrain(mtp_depths=1, aux_weight=1e-2)

    def terms(model, batch):
        found, metrics = whole.terms(model, batch)
        total, count = found["next_token"]
        return found | {"next_token": (total * (factor if batch.fingerprint in bad else 1.0), count)}, metrics

    return Objective(terms, whole.coefficients, whole.weigh)


@pytest.fixture(scope="module")
def train(small_model, small_stream):
    """train(run) with faults in the steps `at`; gives everything that training changed, and the metrics."""

    def go(run, *, at=(), factor=math.nan, guard=None, until=STEPS, stream=None, health=0):
        weigh = pretrain(mtp_depths=1, aux_weight=1e-2).weigh
        order = [weigh(step[0]).fingerprint for step, _ in zip(small_stream(time=10), range(40), strict=False)]
        torch.manual_seed(0)
        model, stream = small_model(pattern_layers=2), stream or small_stream(time=10)
        optimizer, lines = adamw(model, OPTIM), []
        fit(
            model,
            stream,
            faulty({order[step] for step in at}, factor),
            optimizer,
            steps=until,
            schedule=schedule(OPTIM, STEPS),
            checkpoints=run and Checkpoints(run=run, every=3, first=True),
            guard=guard,
            log=lines.append,
        )
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return state | checkpoint.moments(model, optimizer), lines

    return go


class Jumping:
    """A stream that leaves out `skipped` steps of rows before its step number `at`."""

    def __init__(self, stream, at, skipped):
        self.stream, self.at, self.skipped, self.given = stream, at, skipped, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.given == self.at:
            self.stream.consumed += self.skipped * self.stream.rows
        self.given += 1
        return next(self.stream)


def new_run(tmp_path, name="run"):
    return Run.create(tmp_path / name, {})


@pytest.mark.parametrize("factor, at", [(math.nan, 7), (math.inf, 7), (50.0, 10)])
def test_a_spike_leads_back_to_the_last_state_and_skips_the_text_since(
    tmp_path, train, small_stream, caplog, factor, at
):
    caplog.set_level(logging.WARNING)
    run, guard = new_run(tmp_path), Guard(spike=3.0, window=16, rollbacks=2)
    got, _ = train(run, at=(at,), factor=factor, guard=guard)
    back = at // 3 * 3
    want, _ = train(None, stream=Jumping(small_stream(time=10), back, at + 1 - back))
    assert got.keys() == want.keys() and not [name for name in want if not torch.equal(got[name], want[name])]
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(STEPS))
    (line,) = incidents(run.incidents)
    assert (line["step"], line["back_to"], len(line["batches"])) == (at, back, 2)
    assert (line["skipped"]["from"]["consumed"], line["skipped"]["to"]["consumed"]) == (back * 4, (at + 1) * 4)
    assert f"Going back to step {back}" in caplog.text


def test_a_spike_before_the_first_save_leads_back_to_the_start(tmp_path, train):
    run = new_run(tmp_path)
    train(run, at=(1,), guard=Guard(rollbacks=1))
    assert [line["back_to"] for line in incidents(run.incidents)] == [0]


def test_a_run_goes_back_only_so_often_and_counts_over_restarts(tmp_path, train):
    run = new_run(tmp_path)
    with pytest.raises(UserError, match="guard.rollbacks=2.*spikes at steps 4, 3"):
        train(run, at=(4, 5, 6, 7), guard=Guard(rollbacks=2))
    assert len(incidents(run.incidents)) == 2
    with pytest.raises(UserError, match="gone back guard.rollbacks=2 times"):
        train(run, at=(4, 5, 6, 7, 8, 9, 10, 11), guard=Guard(rollbacks=2))
    assert len(incidents(run.incidents)) == 2


def test_being_killed_after_going_back_repeats_nothing(tmp_path, train):
    """The state to go on from is saved with the stream behind the spike before the first step after it."""
    run, guard = new_run(tmp_path), Guard(rollbacks=1)
    want, _ = train(new_run(tmp_path, "whole"), at=(7,), guard=guard)
    train(run, at=(7,), guard=guard, until=8)
    got, _ = train(run, at=(7,), guard=guard)
    assert len(incidents(run.incidents)) == 1
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def test_without_leave_to_go_back_a_spike_stops_the_run_and_spares_the_state(tmp_path, train):
    run = new_run(tmp_path)
    with pytest.raises(UserError, match=r"step 10: loss .* is over guard.spike=3 times its median.*guard.rollbacks=3"):
        train(run, at=(10,), factor=50.0, guard=Guard(spike=3.0))
    assert [folder.name for folder in state_folders(run)] == ["step_000000006", "step_000000009"]
    with pytest.raises(UserError, match="step 7: the loss is not finite"):
        train(new_run(tmp_path, "other"), at=(7,))


def test_going_on_after_a_stop_gives_the_verdicts_of_a_run_without_one(tmp_path, train):
    """The medians are read back from the metrics."""
    run, guard = new_run(tmp_path), Guard(spike=3.0, window=8, rollbacks=1)
    train(run, until=9, guard=guard)
    train(run, at=(9,), factor=50.0, guard=guard)
    assert [line["step"] for line in incidents(run.incidents)] == [9]


def test_watching_changes_nothing_while_all_is_well(tmp_path, train):
    want, got = train(None)[0], train(new_run(tmp_path), guard=Guard(spike=5.0, rollbacks=3))[0]
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def test_a_median_needs_a_few_steps_and_forgets_old_ones():
    watch = Watch(Guard(spike=2.0, window=8))
    for step in range(7):
        watch.add({"step": step, "loss": 1.0, "grad_norm": 1.0})
    assert not watch.fault({"loss": 9.0, "grad_norm": 1.0})
    watch.add({"step": 7, "loss": 1.0, "grad_norm": 1.0})
    assert "grad_norm 2.1 is over" in watch.fault({"loss": 1.0, "grad_norm": 2.1})
    assert not watch.fault({"loss": 2.0, "grad_norm": 2.0})
    for step in range(8, 16):
        watch.add({"step": step, "loss": 5.0, "grad_norm": 5.0})
    assert not watch.fault({"loss": 9.0, "grad_norm": 9.0})


@pytest.mark.parametrize("wrong", [{"spike": 0.5}, {"spike": math.nan}, {"window": 3}, {"rollbacks": -1}])
def test_impossible_guards_are_refused(wrong):
    with pytest.raises(ValueError, match=f"guard.{next(iter(wrong))}"):
        Guard(**wrong)


def test_a_note_torn_by_a_crash_is_left_out_and_the_next_one_stands(tmp_path):
    path, spike = tmp_path / "incidents.jsonl", Spike("too much", 9, ["a"], {"loss": math.inf})
    note(path, spike, 6, ({}, {}))
    with path.open("a") as file:
        file.write('{"step": 11, "why": "to')
    assert [line["step"] for line in incidents(path)] == [9]
    note(path, spike, 8, ({}, {}))
    assert [line["back_to"] for line in incidents(path)] == [6, 8]


def test_a_signal_is_heard_where_nobody_reads_what_is_said():
    """Ctrl-C ends `tee`, too, which read the messages."""
    reads, writes = os.pipe()
    os.close(reads)
    stderr = os.dup(2)
    os.dup2(writes, 2)
    try:
        with stop_signals(True) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.dup2(stderr, 2)
        os.close(writes)
        os.close(stderr)
    assert stop.asked == "SIGTERM"
