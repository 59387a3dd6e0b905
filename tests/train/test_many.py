"""Few bits, layers computed again, rows in pieces, spikes and phases on many processes: as on one."""

import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from nautilus.cli import main
from nautilus.runtime import Run, read_metrics
from nautilus.runtime.files import is_locked
from nautilus.train.guard import incidents
from nautilus.train.layout import Layout

FILE = pathlib.Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("ranks", FILE)
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)
CLOCK, assert_same_curve = helper.CLOCK, helper.assert_same_curve
NVFP4 = {"format": "nvfp4", "last_layers": 1}
MXFP8 = {"format": "mxfp8", "last_layers": 1}
DP, EP, TP, CP, PP = {"dp": 2}, {"dp": 2, "ep": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}
TP_EP, CP_EP = {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2}


def together(folder, layout, **settings):
    return helper.together(folder, Layout(**layout).size, layout=layout, **settings)


def new_run(folder: pathlib.Path) -> str:
    return str(Run.create(folder, {}).folder)


def assert_same_bits(got: list[dict], want: list[dict]):
    """Of the losses, which each depend on all updates before."""
    assert [line["loss"] for line in got] == [line["loss"] for line in want]
    assert_same_curve(without_health(got), without_health(want))


def without_health(curve: list[dict]) -> list[dict]:
    """Residuals are of the first micro-batch of each process, which are other rows."""
    return [{name: v for name, v in line.items() if not name.startswith("residual_rms")} for line in curve]


def test_few_bits_where_rows_are_dealt_are_those_of_the_same_micro_batches(tmp_path, alone):
    settings = {"precision": NVFP4, "steps": 6, "documents": True, "depths": 0, "health": 3}
    assert_same_bits(together(tmp_path, EP, **settings), alone(**settings))


EVERYWHERE = NVFP4 | {"last_layers": 0, "mamba_out": "nvfp4", "attention": "nvfp4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, settings",
    [
        (DP, {"precision": MXFP8, "documents": True}),
        (EP, {"precision": MXFP8}),
        (EP, {"precision": NVFP4 | {"schedule": ["960:mxfp8", "1440:table_backward"]}, "documents": True}),
        (EP, {"precision": NVFP4, "checkpointing": True, "documents": True}),
        (EP, {"precision": NVFP4, "chunk": 7, "documents": True}),
        (PP, {"precision": NVFP4, "checkpointing": True, "documents": True}),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_few_bits_on_many_processes_are_the_bits_of_one(tmp_path, alone, layout, settings):
    """Of one that has the same micro-batches."""
    settings = settings | {"steps": 20, "depths": 0}
    assert_same_bits(together(tmp_path, layout, **settings), alone(**settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, settings, steps",
    [
        (EP, {"precision": NVFP4}, 20),
        (TP, {"precision": EVERYWHERE, "roomy": True}, 2),
        (TP_EP, {"precision": EVERYWHERE, "roomy": True, "micro": 4, "health": 1, "checkpointing": True}, 2),
        (TP, {"precision": MXFP8, "roomy": True}, 2),
        (TP, {"precision": NVFP4, "roomy": True, "chunk": 7}, 2),
        (CP, {"precision": NVFP4, "checkpointing": True}, 3),
        (CP_EP, {"precision": MXFP8}, 3),
        ({"dp": 4, "ep": 2, "replicas": 2}, {"precision": NVFP4, "micro": 1}, 3),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_few_bits_differ_by_the_rounding_of_sums_where_sums_are_cut(tmp_path, alone, layout, settings, steps):
    """Few steps where such a difference, of 1e-7, soon turns one rounding to few bits, which is a thousand times it. A
    rank's stretch of rows is a product of its own: as one process computes in pieces of that length."""
    settings = settings | {"steps": steps, "documents": True}
    as_pieces = {"chunk": 12} if "cp" in layout else {}
    assert_same_curve(together(tmp_path, layout, **settings), alone(**settings | as_pieces))


@pytest.mark.slow
@pytest.mark.parametrize("thrift", [{"checkpointing": True}, {"chunk": 7}, {"chunk": 8, "documents": True}])
@pytest.mark.parametrize("layout", [DP, EP, TP, TP_EP, PP], ids=["dp", "ep", "tp", "tp_ep", "pp"])
def test_layers_computed_again_and_in_pieces_give_the_curve_of_whole_rows(tmp_path, alone, layout, thrift):
    settings = {"steps": 20} | ({"documents": True} if "documents" in thrift else {})
    assert_same_curve(together(tmp_path, layout, **settings | thrift), alone(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [CP, CP_EP], ids=["cp", "cp_ep"])
def test_stretches_of_rows_are_computed_again(tmp_path, alone, layout):
    settings = {"steps": 20, "documents": True}
    assert_same_curve(together(tmp_path, layout, checkpointing=True, **settings), alone(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DP, EP, TP, CP, PP], ids=["dp", "ep", "tp", "cp", "pp"])
def test_all_ranks_go_back_before_a_spike_alike(tmp_path, alone, layout):
    """Row 5 makes the loss no number on the one rank that has it; the text since the last state is skipped on all."""
    settings = {"steps": 12, "every": 3, "guard": {"rollbacks": 4}, "poison": 5}
    want = alone(**settings, state=new_run(tmp_path / "want"))
    got = together(tmp_path / "ranks", layout, **settings, state=new_run(tmp_path / "run"))
    assert_same_curve(got, want)
    theirs, ours = (incidents(Run(tmp_path / name).incidents) for name in ("want", "run"))
    places = lambda lines: [(line["step"], line["back_to"], line["skipped"]) for line in lines]
    assert places(ours) == places(theirs) and theirs
    assert all("the loss is not finite" in line["why"] for line in ours)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(12))


# ----- through the command --------------------------------------------------------------------------------------------

SMALL = (
    "toy rows=4 micro=2 length=48 save_every=3 optim.warmup=2 optim.lr=1e-2 optim.min_lr=1e-4 model.vocab=300 "
    "prompts=a compute=fp32 model.layers=ME*M model.width=32 model.layers.M.heads=4 model.layers.M.head_width=16 "
    "model.layers.M.state=16 model.layers.*.head_width=8 model.layers.E.hidden=32 model.layers.E.shared=32 "
    "model.layers.E.latent=16"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    here = tmp_path_factory.mktemp("text")
    for name in ("web", "maths"):
        (here / name).mkdir()
        for number in range(12):
            counting = " ".join(f"{n} comes before {n + 1} in {name}." for n in range(number, number + 60))
            (here / name / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    return here


@pytest.fixture(scope="module")
def begun(tmp_path_factory, text):
    """A run of six updates on one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nautilus.recipes.pretrain.examine", lambda *given, **named: (None, []))
        yield one(tmp_path_factory.mktemp("begun") / "run", *SMALL.split(), f"data={text}/web", "steps=6")


def one(out, *words) -> Run:
    assert main(["pretrain", f"out={out}", *words]) == 0
    return Run(out)


def start_many(out, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "nautilus", "pretrain", f"out={out}", *words]
    environment = os.environ | helper.ALIKE
    with (out.parent / f"{out.name}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def processes(word: str) -> list[int]:
    """With this word in their command: ranks have sessions of their own and may outlive their launcher."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (place / "cmdline").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def kill_all(word: str) -> None:
    for process in processes(word):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def wait_for_lines(process: subprocess.Popen, metrics: pathlib.Path, count: int) -> None:
    waited = time.monotonic()
    while time.monotonic() - waited < helper.PATIENCE and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= count:
            break
        time.sleep(0.02)


def many(out, *words) -> Run:
    assert start_many(out, *words).wait(helper.PATIENCE) == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]
    return Run(out)


def lines(run: Run) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(run.metrics)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, words",
    [
        ("layout.dp=2 layout.ep=2", "from={run} anneal=4"),
        ("layout.tp=2", "from={run} steps=4"),
        ("layout.tp=2 layout.ep=2", "from={run}/model steps=4 rows=4 micro=2 length=48 compute=fp32 data={text}/web"),
    ],
    ids=["anneal-ep", "phase-tp", "weights-tp_ep"],
)
def test_any_layout_follows_a_run_as_one_process_does(tmp_path, begun, text, layout, words):
    given = words.format(run=begun.folder, text=text).split()
    want, got = one(tmp_path / "one", *given), many(tmp_path / "many", *given, *layout.split())
    assert_same_curve(without_health(lines(got)), without_health(lines(want)))


@pytest.mark.slow
def test_everything_at_once_is_killed_and_goes_on_as_if_nothing_had_happened(tmp_path, begun, text):
    """A new phase of another run, in NVFP4 with prediction ahead, of a blend whose shares change, in rows of two
    lengths, layers computed again, spikes watched for: on two processes that share rows and experts, killed midway."""
    blend = tmp_path / "blend.toml"
    phases = "[[phases]]\nuntil = 0.4\nweights = { web = 3, maths = 1 }\n[[phases]]\nweights = { maths = 1 }\n"
    blend.write_text(f'[sources]\nweb = "{text}/web"\nmaths = "{text}/maths"\n{phases}')
    words = (
        f"from={begun.folder} blend={blend} lengths=0.5*48,0.5*24 steps=24 save_every=4 checkpointing=true "
        f"guard.rollbacks=2 guard.spike=50 precision.format=nvfp4 precision.last_layers=1 mtp_depths=2"
    ).split()
    want = one(tmp_path / "one", *words)
    layout = ["layout.dp=2", "layout.ep=2"]
    killed = start_many(tmp_path / "many", *words, *layout)
    metrics = tmp_path / "many" / "metrics.jsonl"
    waited = time.monotonic()
    try:
        wait_for_lines(killed, metrics, 10)
    finally:
        kill_all(f"out={tmp_path / 'many'}")
    assert killed.wait() == -signal.SIGKILL
    while is_locked(tmp_path / "many" / ".lock") and time.monotonic() - waited < helper.PATIENCE:
        time.sleep(0.02)
    assert 8 <= Run(tmp_path / "many").saved_step < 24
    got = many(tmp_path / "many", *words, *layout)
    assert lines(got) == lines(many(tmp_path / "undisturbed", *words, *layout))
    first = 3  # steps, before a sum in another order has turned a rounding to few bits
    assert_same_curve(without_health(lines(got))[:first], without_health(lines(want))[:first])
    assert [line["step"] for line in lines(got)] == [*range(24)] and not got.incidents.exists()
    assert any(name.startswith("flush.experts") for name in lines(got)[0])


@pytest.mark.slow
def test_a_killed_launcher_takes_its_training_with_it_and_nothing_is_lost(tmp_path, text):
    run = tmp_path / "run"
    words = [*SMALL.split(), f"data={text}/web", "steps=3000", "layout.dp=2"]
    launcher = start_many(run, *words)
    try:
        wait_for_lines(launcher, run / "metrics.jsonl", 5)
        launcher.kill()
        launcher.wait()
        waited = time.monotonic()
        while (left := processes(f"out={run}")) and time.monotonic() - waited < helper.PATIENCE:
            time.sleep(0.02)
        assert not left
    finally:
        kill_all(f"out={run}")
    steps = len(read_metrics(run / "metrics.jsonl"))
    assert 5 <= steps < 3000 and Run(run).saved_step == steps  # saved as it ended
