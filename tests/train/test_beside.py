"""States are written while training goes on, and are the same bytes as those that it waited for."""

import errno
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import nautilus.train.ranks as ranks
from nautilus.runtime import Run, UserError, read_metrics
from nautilus.train.beside import Beside
from nautilus.train.checkpoint import Checkpoints, damage, newest_sound, state_folders
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule

FILE = pathlib.Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)

STEPS = 6
PATIENCE = 60


@pytest.fixture(scope="module")
def train(small_model, small_stream):
    """train(run) makes six updates and saves after every other; gives the numbers of the steps it made."""

    def go(run, *, beside=True, log=lambda line: None, stream=None, every=2):
        torch.manual_seed(0)
        model, optim, made = small_model(pattern_layers=2), OptimConfig(lr=1e-2, warmup=2), []

        def note(line):
            made.append(line["step"])
            log(line)

        fit(
            model,
            stream or small_stream(time=10),
            pretrain(mtp_depths=1, aux_weight=1e-2),
            adamw(model, optim),
            steps=STEPS,
            schedule=schedule(optim, STEPS),
            checkpoints=Checkpoints(run=run, every=every, beside=beside, hold=(2, 4)),
            log=note,
        )
        return made

    return go


def new_run(tmp_path, name="run"):
    return Run.create(tmp_path / name, {})


def contents(run):
    return {path.relative_to(run.state): path.read_bytes() for path in run.state.rglob("*") if path.is_file()}


def in_training():
    return threading.current_thread() is threading.main_thread()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "beside the training"]


def test_a_slow_disk_holds_no_step_up_and_gets_the_state_as_it_was(tmp_path, train, monkeypatch):
    """Here each state is written only after a further update; a training that waited for it would never make that."""
    waited_for, slow = new_run(tmp_path, "waited_for"), new_run(tmp_path, "slow")
    train(waited_for, beside=False)
    usual, further = ranks.write_file, {step: threading.Event() for step in range(STEPS)}
    seen = []

    def later(file, tensors):
        step = int(file.parent.name.removeprefix(".step_").partition(".")[0])
        seen.append((step, in_training()))
        assert in_training() or further[step].wait(PATIENCE), "the training waits for its state"
        usual(file, tensors)

    monkeypatch.setattr(ranks, "write_file", later)
    train(slow, log=lambda line: further[line["step"]].set())
    assert seen == [(2, False), (2, False), (4, False), (4, False), (6, True), (6, True)]
    assert contents(slow) == contents(waited_for) and len(state_folders(slow)) == 3
    assert read_metrics(slow.metrics)[-1]["loss"] == read_metrics(waited_for.metrics)[-1]["loss"]


def fail_at(monkeypatch, step, error):
    usual = ranks.write_file

    def write(file, tensors):
        if file.parent.name.startswith(f".step_{step:09}"):
            raise error
        usual(file, tensors)

    monkeypatch.setattr(ranks, "write_file", write)


def test_what_the_thread_fails_of_ends_the_training_at_the_next_step(tmp_path, train, monkeypatch):
    run, made = new_run(tmp_path), []
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))

    def wait_for_the_thread(line):
        made.append(line["step"])
        for thread in threads():
            thread.join()

    with pytest.raises(UserError, match="cannot write .*step_000000002: the disk is full.*saved before is untouched"):
        train(run, log=wait_for_the_thread)
    assert made == [0, 1, 2]
    assert contents(run) == {} and not threads()


def test_an_error_of_the_training_waits_for_the_state_and_is_the_one_that_is_told(
    tmp_path, train, small_stream, monkeypatch, caplog
):
    class Short:
        def __init__(self):
            self.stream = small_stream(time=10)
            self.state = self.stream.state

        def __iter__(self):
            return (next(self.stream) for _ in range(2))

    run, usual = new_run(tmp_path), ranks.write_file
    with monkeypatch.context() as patched:
        patched.setattr(ranks, "write_file", lambda *what: (time.sleep(0.3), usual(*what)))
        with pytest.raises(UserError, match="the stream ended before step 2"):
            train(run, stream=Short())
    assert newest_sound(run).name == "step_000000002" and not threads()
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match="the stream ended before step 2"):
        train(new_run(tmp_path, "full"), stream=Short())
    assert "could not be saved either: cannot write" in caplog.text


def test_one_call_at_a_time_and_its_error_is_raised_once():
    beside, order, go = Beside(), [], threading.Event()
    beside.begin(lambda: (go.wait(PATIENCE), order.append(1)))
    assert order == [] and not beside.failed
    go.set()
    beside.begin(lambda: order.append(2))
    beside.wait()
    assert order == [1, 2]
    beside.begin(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        beside.begin(lambda: order.append(3))
    beside.wait()
    assert order == [1, 2]


SLOW = """
import time
import nautilus.train.ranks as ranks
usual = ranks.write_file
ranks.write_file = lambda *what: (usual(*what), time.sleep(1.5))
"""


@pytest.mark.slow
def test_a_kill_while_a_state_is_written_leaves_the_one_before(tmp_path):
    """Killed when step 2 has been made: the state after one update is whole, that after two is being written."""
    child = [sys.executable, str(FILE), str(tmp_path)]
    run, undisturbed = new_run(tmp_path), new_run(tmp_path, "undisturbed")
    settings = lambda run: {"layout": {}, "every": 1, "steps": 4, "state": str(run.folder)}
    environment = os.environ | helper.ALIKE
    slow = f"{SLOW}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", slow, *child[1:], json.dumps(settings(run))]
    with subprocess.Popen(command, env=environment) as process:
        until = time.monotonic() + PATIENCE
        while not list(run.state.glob(".step_000000002.tmp-*/model.safetensors")) and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [folder.name for folder in run.state.glob("step_*")] == ["step_000000001"]
    assert damage(run.state / "step_000000001") is None
    for each in (run, undisturbed):
        subprocess.run([*child, json.dumps(settings(each))], env=environment, check=True)
    assert contents(run) == contents(undisturbed)
    assert [line["step"] for line in read_metrics(run.metrics)] == list(range(4))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp", "pp"])
def test_many_processes_write_beside_their_training_what_they_wrote_before_going_on(tmp_path, layout):
    """Here each process writes its part of a state only after a further update of its own."""
    common = {"layout": layout, "steps": 5, "every": 2}
    curves, states = [], []
    for name, how in {"waited_for": {"beside": False}, "slow": {"held_up": 1}}.items():
        run = new_run(tmp_path, name)
        curves.append(helper.together(tmp_path / f"{name}_ranks", 2, state=str(run.folder), **common, **how))
        assert [folder.name for folder in state_folders(run)] == ["step_000000004", "step_000000005"]
        assert all(damage(folder) is None for folder in state_folders(run))
        # The shards' own index names the folder that it was written in, so that its checksum differs too.
        states.append({path: data for path, data in contents(run).items() if path.match("*.distcp")})
    assert curves[0] == curves[1]
    assert states[0] == states[1] and len(states[0]) == 4


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_them_all_with_one_message(tmp_path):
    run = new_run(tmp_path)
    settings = {"layout": {"dp": 2, "ep": 2}, "state": str(run.folder), "every": 2}
    helper.together(tmp_path / "begun", 2, steps=2, **settings)
    before = contents(run)
    made = helper.together(tmp_path / "full", 2, steps=9, full=1, **settings)
    assert 2 <= len(made) <= 4
    told = [(tmp_path / "full" / f"told_{each}.txt").read_text() for each in range(2)]
    assert all("step_000000004: the disk is full" in words for words in told), told
    assert contents(run) == before and not list(run.state.glob(".*"))
