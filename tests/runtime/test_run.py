import json
import os
import subprocess
import sys

import pytest

from nautilus.runtime import Run, UserError, atomic_folder, continue_or_create, is_run, repair, write_atomic
from nautilus.runtime.files import old_name


def everything_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def save(path, text):
    with atomic_folder(path) as fresh:
        (fresh / "weights").write_text(text)


def test_a_run_is_created_opened_and_told_from_a_checkpoint_folder(tmp_path):
    run = Run.create(tmp_path / "deep" / "run", {"steps": 3, "layers": ["M", "E"]})
    assert is_run(run.folder) and Run.open(run.folder).settings == {"steps": 3, "layers": ["M", "E"]}
    assert (run.model, run.metrics) == (run.folder / "model", run.folder / "metrics.jsonl")
    save(run.model, "weights")
    write_atomic(run.model / "config.json", json.dumps({"model_type": "nemotron_h"}))
    assert not is_run(run.model) and not is_run(tmp_path / "nothing") and not is_run(run.config)


def test_a_new_run_does_not_overwrite_what_is_there(tmp_path):
    Run.create(tmp_path / "run", {"a": 1})
    with pytest.raises(UserError, match="already holds config.json; choose another folder"):
        Run.create(tmp_path / "run", {"a": 2})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file"):
        Run.create(tmp_path / "file", {})
    assert Run.open(tmp_path / "run").settings == {"a": 1}


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="no run in .*check the path"):
        Run.open(tmp_path)


def test_opening_a_run_puts_back_what_a_killed_save_left(tmp_path):
    run = Run.create(tmp_path / "run", {})
    for path in (run.model, run.state):
        save(path, "old")
        path.rename(old_name(path))
        path.with_name(f".{path.name}.tmp-1").mkdir()
    Run.open(run.folder)
    kept = everything_in(run.folder)
    assert kept.pop("config.json") and set(kept.values()) == {"old"} and len(kept) == 2
    assert not list(run.folder.glob(".*"))


def test_the_same_command_again_continues_and_another_one_is_refused(tmp_path):
    settings = {"steps": 3, "optim": {"lr": 0.1}, "layers": [{"kind": "M"}], "out": "runs/a"}
    run = continue_or_create(tmp_path / "run", settings)
    changed = continue_or_create(tmp_path / "run", settings | {"steps": 4})
    assert changed.settings["steps"] == 4  # nothing was trained yet, so nothing is lost
    run = continue_or_create(tmp_path / "run", settings)
    write_atomic(run.metrics, "kept")
    run.state.mkdir()
    again = continue_or_create(tmp_path / "run", settings | {"out": "./runs/a"})
    assert again.metrics.read_text() == "kept"
    other = settings | {"optim": {"lr": 0.2}, "layers": [{"kind": "E"}]}
    with pytest.raises(
        UserError, match=r"layers.0.kind .begun with M, now E., optim.lr .begun with 0.1, now 0.2.;.*out="
    ):
        continue_or_create(tmp_path / "run", other)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    script = (
        "import sys; from nautilus.runtime import continue_or_create\n"
        "try: continue_or_create(sys.argv[1], {'steps': 1})\n"
        "except ValueError as bad: sys.exit(str(bad))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    continue_or_create(tmp_path / "run", {"steps": 1})
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "another process" in refused.stderr


def test_only_what_atomic_folder_left_is_cleared_away(tmp_path):
    for name in (".my.tmp-backup", ".model.tmp-mine"):
        (tmp_path / name).mkdir()
    for name in ("*", "model"):
        Run(tmp_path / name)
        repair(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.tmp-mine", ".my.tmp-backup"]


@pytest.mark.timeout(30)
def test_a_pipe_named_like_a_run_is_none(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert not is_run(tmp_path)


def test_a_run_knows_its_newest_saved_step(tmp_path):
    run = Run.create(tmp_path / "run", {})
    assert run.saved_step == 0
    for name in ("step_000000004", "step_000000012", "damaged_0_step_000000030", "step_x", ".step_000000040.tmp-1"):
        (run.state / name).mkdir(parents=True)
    assert run.saved_step == 12


def test_settings_are_written_only_by_whom_the_folder_belongs_to(tmp_path, monkeypatch):
    """Of two that begin at the same moment one comes too late: it must not leave its settings in the other's run."""

    def too_late(self):
        raise UserError("is being trained by another process")

    monkeypatch.setattr(Run, "claim", too_late)
    with pytest.raises(UserError, match="another process"):
        continue_or_create(tmp_path / "run", {"steps": 1})
    assert not (tmp_path / "run" / "config.json").exists()


def test_settings_that_are_free_may_be_others_and_a_run_of_another_kind_is_told_so(tmp_path):
    old = {"steps": 3, "stage": {"lr": 1.0}, "out": "x"}
    run = continue_or_create(tmp_path / "run", old, free=("stage",))
    run.state.mkdir()
    new = {**old, "stage": {"lr": 2.0}}
    assert continue_or_create(tmp_path / "run", new, free=("stage",)).settings == old, "until it has come to its end"
    with pytest.raises(UserError, match=r"steps \(begun with 3, now 4\)"):
        continue_or_create(tmp_path / "run", {**new, "steps": 4}, free=("stage",))
    with pytest.raises(UserError, match="another command or version began it") as told:
        continue_or_create(tmp_path / "run", {"rows": 1, "width": 2, "depth": 3})
    assert len(str(told.value)) < 200
    (tmp_path / "run" / "config.json").write_text('{"naut')
    with pytest.raises(UserError, match="already holds config.json.*Its config.json is damaged"):
        continue_or_create(tmp_path / "run", new)
