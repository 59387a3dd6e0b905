import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import nautilus.model.shards as shards
import nautilus.train.checkpoint as checkpoint
import nautilus.train.ranks as ranks
from nautilus.runtime import Run, UserError, read_metrics
from nautilus.train.checkpoint import Checkpoints, newest_sound, state_folders
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule

STEPS = 6
CLOCK = {"tokens_per_s", "memory_gb"}


@pytest.fixture(scope="module")
def train(small_model, small_stream):
    """train(run, ...) starts a fresh process's worth of objects and gives back everything that training changed."""

    def go(
        run, *, until=STEPS, every=2, lr=1e-2, clip=1.0, seed=1, settings=None, log=lambda line: None, objective=None
    ):
        torch.manual_seed(random.randrange(1000) if run else 0)  # what was drawn before must not matter
        model, optim = small_model(pattern_layers=2), OptimConfig(lr=lr, warmup=2)
        optimizer, stream = adamw(model, optim), small_stream(seed=seed, time=10)
        if run is None or not state_folders(run):
            torch.manual_seed(0)
        fit(
            model,
            stream,
            objective or noisy(pretrain(mtp_depths=1, aux_weight=1e-2)),
            optimizer,
            steps=until,
            schedule=schedule(optim, STEPS),
            clip=clip,
            checkpoints=None if run is None else Checkpoints(run=run, every=every, settings=settings or {}),
            health_every=3,
            log=log,
        )
        return everything(model, optimizer, stream)

    return go


@pytest.fixture(scope="module")
def untouched(train):
    """What all tests must arrive at: the end of a training that nothing ever disturbed or saved."""
    return train(None)


@pytest.fixture
def finished(tmp_path, trained_run):
    """A copy of a run that was trained to the end."""
    shutil.copytree(trained_run.folder, tmp_path / "finished")
    return Run.open(tmp_path / "finished")


@pytest.fixture(scope="module")
def partial(tmp_path_factory, train):
    """A run with three steps done; not for tests that go further."""
    run = new_run(tmp_path_factory.mktemp("partial"))
    train(run, until=3, settings={"optim": {"lr": 1}})
    return run


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, train):
    run = new_run(tmp_path_factory.mktemp("whole"))
    train(run, every=2)
    return run


def noisy(objective):
    """The objective with a draw from the global generator in it, as dropout would have."""

    def terms(model, batch):
        found, metrics = objective.terms(model, batch)
        total, count = found["next_token"]
        return found | {"next_token": (total * (1 + 0.1 * torch.rand(())), count)}, metrics

    return type(objective)(terms, objective.coefficients, objective.weigh)


def everything(model, optimizer, stream):
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    state |= checkpoint.moments(model, optimizer)
    return state | {"random": torch.get_rng_state(), "stream": torch.tensor(stream.state()["consumed"])}


def assert_no_bit_differs(got, want):
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def curve(run):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(run.metrics)]


def new_run(tmp_path, name="run"):
    return Run.create(tmp_path / name, {})


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_stopping_and_resuming_changes_no_bit(tmp_path, train, untouched, trained_run, cut):
    parts = new_run(tmp_path)
    train(parts, until=cut)
    assert_no_bit_differs(train(parts), untouched)
    assert any(value.any() for name, value in untouched.items() if name.endswith("e_score_correction_bias"))
    assert curve(parts) == curve(trained_run) and len(curve(parts)) == STEPS


def test_saving_changes_nothing(tmp_path, train, untouched):
    assert_no_bit_differs(train(new_run(tmp_path), every=1), untouched)


def test_a_finished_run_is_left_as_it_is(finished, train, untouched):
    assert_no_bit_differs(train(finished), untouched)
    assert len(curve(finished)) == STEPS


def test_the_newest_two_states_are_kept(finished):
    assert [folder.name for folder in state_folders(finished)] == ["step_000000004", "step_000000006"]


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json", "sha256.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_state_is_passed_over_out_loud(finished, caplog, name, harm):
    file = state_folders(finished)[-1] / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink() if harm == "remove" else file.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    assert newest_sound(finished).name == "step_000000004"
    assert "step_000000006 is damaged" in caplog.text
    assert newest_sound(finished).name == "step_000000004"


def test_training_goes_on_from_the_state_before_a_damaged_one(finished, train, untouched):
    (state_folders(finished)[-1] / "model.safetensors").write_bytes(b"")
    assert_no_bit_differs(train(finished), untouched)
    assert [folder.name for folder in state_folders(finished)] == ["step_000000004", "step_000000006"]


ODD = [None, "x", True, 1.5, []]
NOT_OURS = [(name, value) for name in ("step", "tokens", "stream", "settings") for value in ODD]


@pytest.mark.parametrize("name,value", [*NOT_OURS, ("step", -1), ("step", 4), ("step", 10**9), ("stream", {"seed": 1})])
def test_a_state_that_another_version_wrote_is_named_and_kept(finished, train, name, value):
    """Sound by its checksums, and still not what this version writes; None stands for an absent key."""
    folder = state_folders(finished)[-1]
    record = json.loads((folder / "state.json").read_text()) | {name: value}
    (folder / "state.json").write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    sums = json.loads((folder / "sha256.json").read_text()) | {"state.json": checkpoint.sha256(folder / "state.json")}
    (folder / "sha256.json").write_text(json.dumps(sums))
    before = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    told = "data fingerprint None" if value == {"seed": 1} else f"it has {name}=.*; restore"
    with pytest.raises(UserError, match=told):
        train(finished)
    assert {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()} == before


def test_a_resumed_run_says_where_it_goes_on(tmp_path, train, capfd):
    run = new_run(tmp_path)
    train(run, until=3)
    assert "resuming" not in capfd.readouterr().err
    train(run)
    assert f"resuming {run.folder} after step 3 of {STEPS}" in capfd.readouterr().err


def test_a_training_that_cannot_go_on_keeps_what_was_learnt(tmp_path, train, untouched):
    """As where the answers of a whole step are lost: also where nothing is saved on the way."""
    run, inner, calls = new_run(tmp_path), noisy(pretrain(mtp_depths=1, aux_weight=1e-2)), itertools.count()

    def terms(model, batch):
        if next(calls) == 9:
            raise UserError("the environment is gone")
        return inner.terms(model, batch)

    with pytest.raises(UserError, match="is gone"):
        train(run, every=0, objective=type(inner)(terms, inner.coefficients, inner.weigh))
    (kept,) = state_folders(run)
    assert 0 < int(kept.name.removeprefix("step_")) < STEPS
    assert_no_bit_differs(train(run, every=0), untouched)


def test_when_every_state_is_damaged_training_does_not_start_over_silently(finished, train):
    for folder in state_folders(finished):
        (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="every saved state is damaged.*step_000000006.*step_000000004"):
        train(finished)
    assert len(list(finished.state.glob("damaged_*"))) == 2
    with pytest.raises(UserError, match="every saved state is damaged.*damaged_0_step_"):
        train(finished)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"clip": 0.5}, r"fit\.clip was 1.0 and is now 0.5"),
        ({"settings": {"optim": {"lr": 2}}}, r"optim\.lr was 1 and is now 2"),
        ({"settings": {}}, r"optim\.lr was 1 and is now absent"),
        ({"objective": pretrain(mtp_depths=1, aux_weight=0.5)}, r"fit\.objective\.balance was 0\.01 and is now 0\.5"),
    ],
)
def test_resuming_under_other_settings_names_them(partial, train, change, named):
    usual = {"settings": {"optim": {"lr": 1}}}
    with pytest.raises(UserError, match=named):
        train(partial, **(usual | change))


def test_resuming_under_the_same_settings_or_on_other_data(partial, train):
    with pytest.raises(UserError, match="data seed 1"):
        train(partial, seed=2, settings={"optim": {"lr": 1}})
    train(partial, settings={"optim": {"lr": 1}})


def test_a_state_of_other_trained_parameters_is_refused(tmp_path, small_model, small_stream):
    run = new_run(tmp_path)

    def go(frozen):
        model = small_model()
        model.lm_head.requires_grad_(not frozen)
        optimizer = adamw(model, OptimConfig())
        fit(model, small_stream(), pretrain(), optimizer, steps=2, checkpoints=Checkpoints(run=run))

    go(frozen=False)
    with pytest.raises(UserError, match=r"lm_head\.weight was trained before"):
        go(frozen=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("module", "moment"), [(ranks, "write_file"), (checkpoint, "sha256"), (ranks, "atomic_folder")]
)
def test_a_crash_at_any_point_of_a_save_leaves_the_state_before(
    tmp_path, train, untouched, monkeypatch, module, moment
):
    run = new_run(tmp_path)
    usual, calls = vars(module)[moment], []

    def crash(*args, **named):
        calls.append(args)
        if len(calls) > 4:
            raise Killed
        return usual(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, moment, crash)
        with pytest.raises(Killed):
            train(run, every=1)
    assert 1 <= len(state_folders(run)) <= 2 and all(checkpoint.damage(folder) is None for folder in state_folders(run))
    assert_no_bit_differs(train(run), untouched)


def test_a_full_disk_ends_in_one_message_and_keeps_the_state_before(tmp_path, train, untouched, monkeypatch):
    run = new_run(tmp_path)
    train(run, until=3)
    before = [folder.name for folder in state_folders(run)]

    def full(tensors, path, metadata=None):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", full)
        with pytest.raises(UserError, match="the disk is full.*saved before is untouched"):
            train(run)
    assert [folder.name for folder in state_folders(run)] == before
    assert not list(run.state.glob(".*"))
    assert_no_bit_differs(train(run), untouched)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["between steps", "between micro-batches"])
def test_a_signal_saves_stops_with_a_message_and_loses_nothing(tmp_path, train, untouched, capfd, number, moment):
    run = new_run(tmp_path)
    objective = noisy(pretrain(mtp_depths=1, aux_weight=1e-2))
    batches_seen = []

    def send_after_seven(model, batch):  # two micro-batches a step: the seventh is the first of step 3
        batches_seen.append(batch)
        if len(batches_seen) == 7:
            os.kill(os.getpid(), number)
        return objective.terms(model, batch)

    def send_after_step_two(line):
        if line["step"] == 2:
            os.kill(os.getpid(), number)

    usual = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    watched = type(objective)(send_after_seven, objective.coefficients, objective.weigh)
    between = {"log": send_after_step_two} if moment == "between steps" else {"objective": watched}
    with pytest.raises(SystemExit, match=f"stopped by {number.name} after step 3; saved in"):
        train(run, every=0, **between)
    assert "finishing this micro-batch" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == usual
    assert [folder.name for folder in state_folders(run)] == ["step_000000003"]
    assert_no_bit_differs(train(run, every=0), untouched)


@pytest.fixture
def python_answers_interrupts():
    """A test run in the background of a shell has SIGINT ignored; here it is as in the foreground."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_exits_at_once(tmp_path, train, python_answers_interrupts):
    run = new_run(tmp_path)

    def twice(line):
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.001)  # two signals that are both pending count as one
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        train(run, every=0, log=twice)
    assert state_folders(run) == []


def test_signals_are_left_alone_without_checkpoints_and_outside_the_main_thread(tmp_path, train):
    seen = []

    def look(line):
        seen.append(signal.getsignal(signal.SIGINT))

    usual = signal.getsignal(signal.SIGINT)
    train(None, log=look)
    thread = threading.Thread(target=lambda: train(new_run(tmp_path), log=look))
    thread.start()
    thread.join()
    assert len(seen) == 2 * STEPS and set(seen) == {usual}


def test_numbers_of_steps_must_not_be_negative(tmp_path):
    with pytest.raises(ValueError, match="every=-1"):
        Checkpoints(run=new_run(tmp_path), every=-1)


CHILD = """
import sys, torch
from nautilus.data.batch import Batch
from nautilus.data.mix import Stream
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.runtime import Run
from nautilus.train.checkpoint import Checkpoints
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule

torch.set_num_threads(1)
torch.manual_seed(0)
model = Language(shrink(preset("toy"), layers=4, width=32)).initialise(0)
tokens = torch.randint(0, 97, (16, 16), generator=torch.Generator().manual_seed(0))
weights = torch.ones(16, 16)
weights[:, 0] = 0
stream = Stream({"text": Batch(tokens, {"next_token": weights})}, rows=2, micro=1, seed=0)
optim = OptimConfig(lr=1e-2)
steps = int(sys.argv[2])
fit(model, stream, pretrain(mtp_depths=1, aux_weight=1e-2), adamw(model, optim), steps=steps,
    schedule=schedule(optim, steps), checkpoints=Checkpoints(run=Run.open(sys.argv[1]), every=1),
    log=lambda line: print(line["step"], flush=True))
"""


def child(run, steps):
    """A process of its own that trains, saving after every step; it says the number of each step."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run.folder), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(checkpoint.__file__).parents[2],
    )


def run_to_the_end(run, steps):
    with child(run, steps) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors


def run_and_kill(run, steps, *, after, seconds):
    """Kills the process `seconds` after it has said `after` steps. The first and the last step it said."""
    with child(run, steps) as process:
        said = [int(process.stdout.readline()) for _ in range(after)]
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return said[0], said[-1]


def final(run):
    folder = state_folders(run)[-1]
    record = json.loads((folder / "state.json").read_text())
    return [(folder / name).read_bytes() for name in ("model.safetensors", "training.safetensors")] + [record]


@pytest.mark.slow
def test_killing_the_process_at_random_moments_loses_at_most_two_steps_and_changes_no_bit(tmp_path):
    steps, draw = 24, random.Random(0)
    whole, parts = new_run(tmp_path, "whole"), new_run(tmp_path, "parts")
    run_to_the_end(whole, steps)
    furthest = 0
    for after in (2, 5, 3, 4):
        # Saves take about half the time here, so that a random moment often falls into one.
        first, last = run_and_kill(parts, steps, after=after, seconds=draw.uniform(0, 0.03))
        # The state after step `furthest` may still have been under way.
        assert first >= furthest - 1, "a saved step was lost"
        furthest = last
    run_to_the_end(parts, steps)
    assert final(parts) == final(whole)
    assert curve(parts) == curve(whole)
    assert not list(parts.state.glob(".*"))


@pytest.mark.slow
def test_a_terminated_process_exits_cleanly_with_a_message(tmp_path):
    run = new_run(tmp_path)
    with child(run, 10_000) as process:
        process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped by SIGTERM after step" in errors and "Traceback" not in errors
    assert checkpoint.damage(state_folders(run)[-1]) is None
