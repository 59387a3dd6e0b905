"""`torchrun -m nautilus pretrain`: started from outside, and started again from outside when a process is killed."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import nautilus
from nautilus.runtime import read_metrics

FILE = pathlib.Path(__file__).parents[1] / "ranks.py"
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)

STEPS = 60
SMALL = (
    f"toy rows=4 length=32 steps={STEPS} save_every=4 optim.warmup=2 model.vocab=400 model.width=48 model.layers=ME*E "
    "prompts=a compute=fp32 layout.dp=2 layout.ep=2"
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="no /proc")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    here = tmp_path_factory.mktemp("text")
    for number in range(20):
        counting = " ".join(f"{n} comes before {n + 1}." for n in range(number, number + 60))
        (here / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    return here


@pytest.fixture(scope="module")
def pretrain(text):
    """A function that starts two processes with torchrun, and gives the process of torchrun."""

    def start(out, log, *words):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
        command = [*torchrun, "-m", "nautilus", "pretrain", *SMALL.split(), f"data={text}", f"out={out}"]
        with log.open("w") as file:
            how = {"env": os.environ | helper.ALIKE, "stdout": file, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(command, start_new_session=True, **how))
        return started[-1]

    started: list[subprocess.Popen] = []
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def untouched(pretrain, tmp_path_factory):
    """The curve of a run that nobody disturbs."""
    here = tmp_path_factory.mktemp("untouched")
    done = pretrain(here / "run", here / "log")
    assert done.wait(helper.PATIENCE) == 0, (here / "log").read_text()[-3000:]
    return curve(here / "run")


def curve(run):
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


def children(parent: int) -> dict[str, int]:
    """RANK → process number of the processes that torchrun has started."""
    found = {}
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            father = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            told = dict(word.partition("=")[::2] for word in (place / "environ").read_text().split("\0"))
        except (OSError, ValueError):
            continue
        if father == parent and "RANK" in told:
            found[told["RANK"]] = int(place.name)
    return found


def steps_made(run) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_the_command_under_torchrun_trains_and_leaves_a_model(untouched):
    assert [step for step, *_ in untouched] == list(range(STEPS))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_is_started_again_and_the_curve_is_the_undisturbed_one(rank, untouched, pretrain, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    torchrun = pretrain(run, log, "--max-restarts", "1")
    until = time.monotonic() + helper.PATIENCE
    while steps_made(run) < 10 and torchrun.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(children(torchrun.pid)[rank], signal.SIGKILL)
    killed_at = steps_made(run)
    assert torchrun.wait(helper.PATIENCE) == 0, log.read_text()[-3000:]
    assert killed_at < STEPS, "it was killed too late to show anything"
    assert "resuming" in log.read_text()
    assert curve(run) == untouched
    assert nautilus.load(run)[0].config.vocab == 400
