"""A comparison goes through, survives being killed, loses nothing to a variant that fails, and says what it cannot."""

import fcntl
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import pytest

import nautilus
from nautilus.cli import main
from nautilus.recipes.compare import Settings
from nautilus.runtime import Run, UserError
from nautilus.studies.gathered import text_of
from nautilus.studies.trials import Trial

ROOT = pathlib.Path(nautilus.__file__).parent.parent
STEPS = 40
STUDY = f"""
model = "toy"
base = ["steps={STEPS}", "data=TEXT", "rows=2", "length=32", "model.width=32", "model.vocab=300", "model.layers=ME",
  "model.layers.M.heads=2", "model.layers.M.head_width=16", "model.layers.M.state=8", "model.layers.M.chunk=16",
  "model.layers.E.experts=4", "model.layers.E.hidden=16", "model.layers.E.shared=16", "model.layers.E.latent=0",
  "model.mtp=", "mtp_depths=0", "optim.warmup=0", "save_every=2", "compute=fp32", "prompts=a"]

[variants]
control = []
slower = ["optim.lr=1e-3"]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    here = tmp_path_factory.mktemp("study")
    (here / "text").mkdir()
    for number in range(20):
        counting = " ".join(f"{n} comes before {n + 1}." for n in range(number, number + 60))
        (here / "text" / f"{number}.txt").write_text(f"Part {number}. {counting}\n")
    (here / "mine.toml").write_text(STUDY.replace("TEXT", str(here / "text")))
    return here / "mine.toml"


def words(study, out, *more):
    return ["compare", f"study={study}", f"out={out}", "seeds=2", *more]


def results(out):
    return {
        path.relative_to(out).as_posix(): json.loads(path.read_text())["scores"] for path in out.rglob("result.json")
    }


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(words(study, out, "jobs=2", f"record={out.parent / 'rows.jsonl'}")) == 0
    return out


@pytest.mark.slow
def test_a_comparison_leaves_a_page_and_a_row(whole):
    found = results(whole)
    assert sorted(found) == [f"{v}/seed_{s}/result.json" for v in ("control", "slower") for s in (0, 1)]
    page = (whole / "report.html").read_text()
    (line,) = (whole.parent / "rows.jsonl").read_text().splitlines()
    control, slower = json.loads(line)["rows"]
    for row, name in ((control, "control"), (slower, "slower")):
        for seed in (0, 1):
            bits = found[f"{name}/seed_{seed}/result.json"]["bits_per_byte"]
            assert row["bits_per_byte"]["by_seed"][str(seed)] == pytest.approx(bits, abs=1e-6) and f"{bits:.4f}" in page
            lines = (whole / name / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
            losses = [each["next_token"] for each in map(json.loads, lines) if "next_token" in each]
            last = statistics.fmean(losses[-STEPS // 5 :])
            assert len(losses) == STEPS and row["last_loss"]["by_seed"][str(seed)] == pytest.approx(last, abs=1e-6)
    assert control["tokens"] == STEPS * 2 * 32 and "optim.lr=1e-3" in page and slower["bits_per_byte"]["interval_95"]


@pytest.mark.slow
def test_seeds_differ_and_curves_of_a_seed_begin_alike(whole):
    rows = lambda where: (whole / where / "metrics.jsonl").read_text().splitlines()
    first = lambda where: json.loads(rows(where)[0])["loss"]
    assert first("control/seed_0") == first("slower/seed_0") != first("control/seed_1")


@pytest.mark.slow
def test_killed_and_gone_on_with_it_comes_to_the_same(study, whole, tmp_path):
    out, given = tmp_path / "out", words(study, tmp_path / "out", "jobs=1", "seeds=1")
    command = [sys.executable, "-m", "nautilus", *given]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    second = out / "slower" / "seed_0"
    try:
        wait_for(lambda: list(second.glob("state/step_*")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = out / "control" / "seed_0" / "result.json"
    before, stamp = results(out), done.stat().st_mtime_ns
    assert [*before] == ["control/seed_0/result.json"]
    # The training that is left behind sees that its parent has gone, saves and ends: its folder is free again.
    wait_for(lambda: "stopped by SIGTERM" in (second.parent / "seed_0.log").read_text())
    wait_for(lambda: free(second / ".lock"))
    assert main(given) == 0
    assert "resuming" in (second.parent / "seed_0.log").read_text()
    assert (
        len(results(out)) == 2 and results(out).items() <= results(whole).items() and done.stat().st_mtime_ns == stamp
    )


def free(lock: pathlib.Path) -> bool:
    """No process trains there."""
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_for(holds, process=None, seconds=500):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.02)


@pytest.mark.slow
def test_one_variant_that_fails_leaves_the_others(study, tmp_path, capsys):
    path, out = tmp_path / "bad.toml", tmp_path / "out"
    path.write_text(study.read_text() + 'lost = ["data=no/such/place"]\n')
    assert main(["compare", f"study={path}", f"out={out}", "seeds=1", "variants=lost", "jobs=2"]) == 1
    shown = capsys.readouterr().out
    assert "lost seed 0 failed: no text at 'no/such/place'" in shown and "no pair" in shown
    assert [*results(out)] == ["control/seed_0/result.json"] and "no/such/place" in (out / "report.html").read_text()


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(study, whole, capsys):
    assert main(words(study, whole, "base=optim.lr=2e-3")) == 2
    assert "was trained with other settings: optim.lr" in capsys.readouterr().err


@pytest.mark.slow
def test_needles_are_hidden_trained_on_and_looked_for(study, tmp_path):
    path, out = tmp_path / "needle.toml", tmp_path / "out"
    path.write_text('measure = "needle"\nneedles = 2\n' + study.read_text().replace("vocab=300", "vocab=274"))
    assert main(["compare", f"study={path}", f"out={out}", "seeds=1", "variants=slower", "jobs=2"]) == 0
    for scores in results(out).values():
        assert [*scores] == ["bits_per_byte", "near", *(f"found_at_{times}x" for times in (1, 2, 4, 8))]
    assert "Needles found at 8 times" in (out / "report.html").read_text()


def test_mistakes_are_told_before_anything_is_trained(study, tmp_path, capsys):
    for given, said in (
        (["study=nvfp5"], "did you mean 'nvfp4'"),
        (["variants=fastest"], "has no variant 'fastest'"),
        (["base=step=3"], "variant control: no setting 'step'; did you mean 'steps'"),
        (["seeds=0"], "seeds=0 must be at least 1"),
    ):
        assert main(["compare", f"study={study}", f"out={tmp_path / 'out'}", *given]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_study(study, tmp_path, capsys):
    run = Run.create(tmp_path / "out", {"study": "other"})
    before = (run.folder / "config.json").read_bytes()
    assert main(words(study, run.folder)) == 2
    assert "holds the study 'other'" in capsys.readouterr().err
    assert (run.folder / "config.json").read_bytes() == before


def test_seeds_and_jobs_are_checked():
    with pytest.raises(UserError, match="jobs=-1"):
        Settings(jobs=-1)


@pytest.mark.parametrize("result", ["{}", '{"settings": [], "scores": {}}'])
def test_a_damaged_result_is_named_and_kept(study, tmp_path, capsys, result):
    path = tmp_path / "out" / "control" / "seed_0" / "result.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text('{"nautilus_run": 1, "settings": {}}')
    path.write_text(result)
    assert main(words(study, tmp_path / "out", "jobs=1")) == 2
    assert "result.json is no result of a training; remove it" in capsys.readouterr().err
    assert path.read_text() == result


def test_the_hash_of_the_text_is_that_of_the_tokenizer_whatever_sources_are_called(tmp_path):
    for name in ("tokenizer-400-abcd1234-ef", "tokenizer-0123456789ab"):  # the second: text from a folder `tokenizer`
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "tokenizer-400-abcd1234-ef" / "tokenizer.json").touch()
    assert text_of([Trial(variant="a", seed=0, settings=Settings(out=tmp_path))]) == {"text": "abcd1234-ef"}
