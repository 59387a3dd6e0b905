import errno
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nautilus
from nautilus.cli import bench, command, doctor, info, main
from nautilus.cli.command import COMMANDS, Command
from nautilus.cli.settings import assignments, pasteable, resolve
from nautilus.config import Config, settings_of, to_dict
from nautilus.ops.cpu.library import native
from nautilus.presets import PRESETS, preset
from nautilus.runtime import Run, UserError, write_atomic


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    rate: float = 0.1
    warm_up: int = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Config = field(default_factory=lambda: preset("toy"), metadata={"help": "which model"})
    steps: int = field(default=10, metadata={"help": "how many updates"})
    verbose: bool = False
    name: str = "a name"
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None
    optim: Optimiser = Optimiser()
    hook: dict = field(default_factory=dict, metadata={"setting": False})


@pytest.fixture
def play(monkeypatch):
    """Makes `nautilus play` a command that does `action(settings)`, or notes its settings."""
    module = types.ModuleType("played")
    module.__doc__ = "Plays."
    module.Settings = Settings  # type: ignore[attr-defined]
    seen = []
    module.main = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "played", module)
    monkeypatch.setitem(COMMANDS, "play", Command("played", "for tests"))

    def with_action(action):
        module.main = action  # type: ignore[attr-defined]

    return types.SimpleNamespace(seen=seen, does=with_action)


# ----- words to settings ---------------------------------------------------------------------------------------------

NAME = st.from_regex(r"[a-z][a-z_]{0,5}(\.[a-z0-9_]{1,5}){0,2}", fullmatch=True).filter(lambda n: n != "model")
VALUE = st.from_regex(r"[A-Za-z0-9.+*/][A-Za-z0-9.=+*/-]{0,6}", fullmatch=True)


@given(
    pairs=st.lists(st.tuples(NAME, VALUE, st.sampled_from(["{}={}", "--{}={}", "--{} {}"]), st.booleans()), max_size=5)
)
def test_all_ways_of_writing_a_setting_mean_the_same(pairs):
    words = []
    for name, value, form, hyphens in pairs:
        words += form.format(name.replace("_", "-") if hyphens else name, value).split(" ")
    got = [(name.replace("-", "_"), value) for name, value in assignments(words, set())]
    assert got == [(name, value) for name, value, _, _ in pairs]


@pytest.mark.parametrize(
    "words",
    [
        "nano steps=3 verbose=true optim.warm_up=7",
        "--verbose nano --optim.warm-up 7 --steps=3",
        "--optim.warm_up=7 --steps 3 --model nano --verbose",
        "model=nano steps=3 verbose=yes optim.warm-up=7",
    ],
)
def test_settings_reach_the_command(play, words):
    assert main(["play", *words.split()]) == 0
    want = Settings(model=preset("nano"), steps=3, verbose=True, optim=Optimiser(warm_up=7))
    assert play.seen == [want]


def test_a_preset_is_changed_by_the_settings_after_it():
    got = resolve(Settings, ["super", "model.layers.E.active=4", "model.width=64", "model.layers.7.groups=4"])
    assert got.model.width == 64 and got.model.layers[1].active == 4 and got.model.layers[7].groups == 4
    assert got.model.layers[0] == preset("super").layers[0]


def test_values_may_hold_equals_signs_and_models_may_be_paths():
    assert list(assignments(["name=a=b", "runs/x=1"], set())) == [("name", "a=b"), ("model", "runs/x=1")]


@pytest.mark.parametrize(
    "words,message",
    [
        ("steps", "no preset 'steps'"),
        ("stpes=3", "did you mean 'steps'"),
        ("--optim.rte 3", "did you mean 'optim.rate'"),
        ("model.layers.Q.heads=3", "neither a layer number nor one of"),
        ("steps=many", "is not a whole number"),
        ("--steps", "without a value"),
        ("--steps --verbose", "without a value"),
        ("nano ultra", "two models were given"),
        ("model.width=0", "must be positive"),
        ("optim=3", "group of settings"),
    ],
)
def test_a_wrong_setting_is_one_message_and_status_2(play, capsys, words, message):
    assert main(["play", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert play.seen == []


def test_show_prints_settings_that_can_be_pasted_back(play, capsys):
    words = ["play", "--show", "steps=7", "sizes=3,4", "verbose=yes", "optim.rate=0.5", "model.layers=ME*"]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"steps=7", "sizes=3,4", "verbose=true", "optim.rate=0.5", "model.layers=ME*", "limit=none"} <= set(shown)
    assert play.seen == [] and resolve(Settings, shown) == resolve(Settings, words[2:])


def test_a_field_that_is_for_code_alone_is_no_setting(play, capsys):
    assert main(["play", "--help"]) == 0 and main(["play", "--show"]) == 0
    assert "hook" not in capsys.readouterr().out
    assert main(["play", "hook=3"]) == 2 and "no setting 'hook'" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_the_shown_settings_of_every_preset_build_it_again(name):
    assert resolve(Settings, [name, *pasteable(resolve(Settings, [name]))]).model == preset(name)


# ----- the command itself --------------------------------------------------------------------------------------------


def test_every_command_has_a_module():
    assert [name for name, entry in COMMANDS.items() if find_spec(entry.module) is None] == []


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and entry.help in text for name, entry in COMMANDS.items())


def test_help_of_a_command_lists_its_settings(play, capsys):
    assert main(["play", "--help"]) == 0
    text = capsys.readouterr().out
    assert "nautilus play [MODEL]" in text and "Plays." in text
    assert "steps" in text and "how many updates" in text and "optim.warm_up" in text and "model.layers" in text


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nautilus {nautilus.__version__}\n"


def test_a_misspelt_command_gets_a_suggestion(capsys):
    assert main(["docter"]) == 2
    assert capsys.readouterr().err == "nautilus: no command 'docter'; did you mean 'doctor'?\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_says_what_it_is(name):
    def dumb(record, path=""):
        for one in settings_of(record):
            value, place = getattr(record, one.name), f"{path}{one.name}"
            if is_dataclass(value):
                yield from dumb(value, f"{place}.")
            elif not one.metadata.get("help"):
                yield place

    assert [*dumb(import_module(COMMANDS[name].module).Settings())] == []


def test_help_and_version_load_no_torch():
    script = "import sys; from nautilus.cli import main; main(['--help']); main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "nautilus.cli.command" in loaded and not {"torch", "numpy", "nautilus.model"} & set(loaded)


def test_the_package_lists_its_public_names():
    assert dir(nautilus) == sorted(nautilus.__all__) and all(getattr(nautilus, name).__doc__ for name in dir(nautilus))


def test_python_m_nautilus_is_the_command():
    done = subprocess.run([sys.executable, "-m", "nautilus", "inof"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'info'?" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "error,status,message",
    [
        (UserError("a wish; a clash; a way out"), 2, "nautilus: a wish; a clash; a way out\n"),
        (ValueError("width=0 must be positive"), 2, "width=0 must be positive (add --traceback to see where)"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied: '/x'"),
        (ModuleNotFoundError("No module named 'datasets'"), 2, "No module named 'datasets'"),
        (KeyboardInterrupt(), 130, "nautilus: interrupted.\n"),
        (SystemExit("stopped by SIGINT after step 3"), 130, "nautilus: stopped by SIGINT after step 3\n"),
        (type("PanicException", (BaseException,), {})("index out of bounds"), 1, "PanicException: index out of"),
        (AssertionError("ours"), 1, "AssertionError: ours"),
        (UserError("no tensor \x1b[31mred"), 2, r"no tensor \x1b[31mred"),
    ],
)
def test_an_error_ends_in_one_message(play, capsys, error, status, message):
    def fail(settings):
        raise error

    play.does(fail)
    assert main(["play"]) == status
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1
    with pytest.raises(type(error)):
        main(["play", "--traceback"])


def test_a_bug_of_ours_is_one_line_too_and_says_how_to_see_more(play, capsys):
    def fail(settings):
        raise KeyError("ours")

    play.does(fail)
    assert main(["play"]) == 1
    shown = capsys.readouterr().err
    assert "failed: KeyError: 'ours'" in shown and "--traceback" in shown and len(shown.splitlines()) == 1
    with pytest.raises(KeyError):
        main(["play", "--traceback"])


def test_words_that_are_no_utf_8_are_refused_at_once(play, capsys):
    play.does(lambda settings: pytest.fail("began"))
    assert main(["play", "out=o\udcff"]) == 2
    assert "no UTF-8" in capsys.readouterr().err


def test_a_failing_command_gives_its_status(play):
    play.does(lambda settings: 3)
    assert main(["play"]) == 3


def test_a_reader_that_leaves_early_is_no_error():
    shell = f"{sys.executable} -m nautilus info ultra --json | head -1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert done.stdout == "{\n" and done.stderr == ""


# ----- info ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_the_layers_of_info_add_up_to_the_parameters(name):
    config = preset(name)
    facts = info.examine(name, config)
    mtp = sum(row["all"] for row in facts["layers"] if row["kind"].startswith("mtp"))
    main_stack = sum(row["all"] for row in facts["layers"]) - mtp
    ends = config.width + config.vocab * config.width * (1 if config.tied else 2)
    assert main_stack + ends == facts["parameters"]["main"]
    assert facts["parameters"]["total"] == facts["parameters"]["main"] + facts["parameters"]["mtp"]
    assert sum(len(row["where"]) for row in facts["layers"]) == len(config.layers) + len(config.mtp)
    busy = sum(row["active"] * len(row["where"]) for row in facts["layers"] if not row["kind"].startswith("mtp"))
    assert busy + config.width + config.vocab * config.width == facts["parameters"]["active"]


def test_info_agrees_with_the_published_sizes(capsys):
    assert main(["info", "nano", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == 31_577_940_288
    assert facts["parameters"]["active"] / 1e9 == pytest.approx(3.228, abs=5e-4)
    assert facts["parameters"]["active_with_embedding"] / 1e9 == pytest.approx(3.580, abs=5e-4)
    assert facts["weight_bytes"]["BF16"] == 63_155_880_576
    # 6 attention layers of 2 groups of 128, keys and values of 2 bytes.
    assert facts["kv_bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    # 23 Mamba layers: 64 heads x 64 x 128 of 4 bytes, and 3 x 6144 of 2 bytes.
    assert facts["state_bytes"] == 23 * (64 * 64 * 128 * 4 + 3 * 6144 * 2)


def test_info_prints_tables(capsys):
    assert main(["info", "super"]) == 0
    text = capsys.readouterr().out
    assert "40 x M Mamba" in text and "latent=1024" in text and "247.2 GB" in text
    facts = info.examine("super", preset("super"))
    counts = [count for name, count in info.totals_of(facts) if name.startswith("parameters")]
    assert counts == ["123,611,033,088", f"{facts['parameters']['main']:,}"] and all(count in text for count in counts)
    assert [name for name, _ in info.totals_of(info.examine("nano", preset("nano")))][0] == "parameters"


def test_info_reads_folders_runs_and_files(tmp_path):
    from nautilus.config.released import write_config

    config = preset("lightning")
    run = Run.create(tmp_path / "run", {})
    run.model.mkdir()
    write_atomic(run.model / "config.json", json.dumps(write_config(config)))
    for source in (run.folder, run.model, run.model / "config.json"):
        assert to_dict(info.config_of(str(source)))["layers"] == to_dict(config)["layers"]


def test_info_shows_the_formats_of_a_quantised_folder_by_role(tmp_path, capsys):
    from nautilus.model.held import Held, put
    from nautilus.model.language import Language
    from nautilus.ops.encode import encode
    from nautilus.presets import shrink

    model = Language(shrink(preset("nano"))).initialise(0)
    up = model.backbone.layers[1].mixer.experts.up_proj.detach()
    put(model, {("backbone.layers.1.mixer.experts.up_proj", e): Held(encode(up[e], "nvfp4")) for e in range(8)})
    model.save(tmp_path / "plain", precision="bf16")
    model.save(tmp_path / "quantised")
    assert main(["info", str(tmp_path / "plain"), "--json"]) == 0
    assert "formats" not in json.loads(capsys.readouterr().out)
    assert main(["info", str(tmp_path / "quantised"), "--json"]) == 0
    rows = {(row["role"], row["format"]): row for row in json.loads(capsys.readouterr().out)["formats"]}
    size = 8 * (24 * 48 // 2 + 24 * 3 + 4)  # codes, a scale for 16 of them, and one for each matrix
    assert rows["experts.up_proj", "W4A16_NVFP4"] == {
        "role": "experts.up_proj", "format": "W4A16_NVFP4", "count": 8, "bytes": size
    }  # fmt: skip
    assert rows["experts.up_proj", "F32"]["count"] == 8 * 2  # of the other two layers
    files = sum(row["bytes"] for row in rows.values())
    assert abs(files - (tmp_path / "quantised" / "model.safetensors").stat().st_size) < 40_000
    assert main(["info", str(tmp_path / "quantised")]) == 0
    shown = capsys.readouterr().out
    assert "W4A16_NVFP4" in shown
    (line,) = [line for line in shown.splitlines() if "all weights as stored" in line]
    assert info.bytes_text(files) in line


def test_info_explains_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "young", {})
    for source, message in {
        "supre": "did you mean 'super'?",
        str(tmp_path / "nowhere"): "no hub id",
        str(tmp_path / "empty"): "no config.json in the folder",
        str(tmp_path / "broken"): "is not valid JSON",
        str(tmp_path / "deep"): "is not valid JSON",
        str(tmp_path / "young"): "has no model yet",
        "someone/something": "check the name and the network",
    }.items():
        assert main(["info", source]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def nano_file(folder, **changes):
    from nautilus.config.released import write_config

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(preset("nano")) | changes))
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 10**8},
        {"vocab_size": 2**40, "bos_token_id": 2**31, "eos_token_id": [2**31, 2**39], "pad_token_id": 2**31},
        {"hidden_size": 2**61, "vocab_size": 2**61, "n_routed_experts": 2**61},
        {"hybrid_override_pattern": "ME*E" * 2499},
    ],
)
def test_info_of_a_model_of_any_size_takes_no_time(tmp_path, capsys, changes):
    begin = time.monotonic()
    assert main(["info", nano_file(tmp_path / "huge", **changes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 10**9
    assert time.monotonic() - begin < 3


def test_info_of_many_layers_that_all_differ_takes_seconds(tmp_path):
    blocks = [{"block_type": "mlp", "intermediate_size": size} for size in range(1, 10_001)]
    own = {"model_type": "nemotron_h_puzzle", "block_configs": blocks, "hybrid_override_pattern": None}
    config, begin = info.config_of(nano_file(tmp_path / "puzzle", **own)), time.monotonic()
    assert len(info.examine("puzzle", config)["layers"]) == 10_000
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"hybrid_override_pattern": "M" * 3_000_000}, "config.json has 3,000,000 layers; at most 10,000"),
        ({"n_routed_experts": 10**400}, "a whole number (below 2**62) is needed"),
        ({"x" * 3_000_000: "y" * 3_000_000}, "has the unknown key 'xxx"),
        ({"model_type": "x" * 3_000_000}, "has model_type='xxx"),
        ({"eos_token_id": ["x" * 3_000_000]}, "must be token ids"),
        ({"hidden_size": [[1] * 1000] * 1000}, "a whole number"),
    ],
)
def test_info_of_what_cannot_be_is_one_short_message(tmp_path, capsys, changes, message):
    begin = time.monotonic()
    assert main(["info", nano_file(tmp_path / "huge", **changes)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and len(error) < 1000
    assert error.startswith(f"nautilus: {tmp_path / 'huge' / 'config.json'}: ") and "--traceback" not in error
    assert time.monotonic() - begin < 5


def test_info_of_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(tmp_path, capsys):
    run = Run.create(tmp_path / "run", {"steps": 560})
    (run.state / "step_000000120").mkdir(parents=True)
    assert main(["info", str(run.folder)]) == 2
    error = capsys.readouterr().err
    assert "unfinished and has no model yet: 120 of 560 steps are saved" in error
    assert "the command that began it, given again, resumes it" in error and len(error.splitlines()) == 1


def test_a_message_has_an_end(play, capsys):
    def fail(settings):
        raise UserError("x" * 10**6)

    play.does(fail)
    assert main(["play"]) == 2
    assert len(capsys.readouterr().err) < 6000


# ----- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_measures_and_explains(capsys):
    assert main(["doctor", "--json", "size=64", "seconds=0.01"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(rate is None or rate > 0 for rate in facts["speed"].values())
    assert facts["versions"]["nautilus"] == nautilus.__version__ and "torch" in facts["versions"]
    assert facts["machine"]["cores"] == os.cpu_count() and facts["machine"]["disk_free_gb"] > 0
    assert facts["faster_paths"]["native CPU kernels"] in (f"{word}: {native().reason}" for word in ("on", "off"))


def test_doctor_prints_every_section(capsys):
    assert main(["doctor", "size=64", "seconds=0.01"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "machine", "speed", "faster paths", "extras", "GFLOP/s", "GB/s"):
        assert word in text


BUSY = "speeds measured now are too low"


def test_a_busy_machine_is_remarked_upon_and_an_idle_one_is_not(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, busy in ((2.9, False), (3.2, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        assert main(["doctor", "size=64", "seconds=0.01"]) == 0
        assert (f"load average {load} on 2 cores: {BUSY}" in capsys.readouterr().out) == busy
        facts = {"native": {"on": True}, "machine": doctor.machine(pathlib.Path(".")), "works": []}
        assert (f"load average {load} on 2 cores: {BUSY}" in "".join(bench.remarks(facts))) == busy
    monkeypatch.setattr(os, "getloadavg", unknown)
    assert doctor.load_average() is None and doctor.busy({"load_average": None, "cores": 2}) == ""
    assert doctor.busy({"load_average": 1.6, "cores": 1}) == f"load average 1.6 on 1 core: {BUSY}"


def unknown():
    raise OSError("load average is unobtainable")


def test_doctor_says_what_set_the_number_of_threads(monkeypatch):
    import torch

    threads = torch.get_num_threads()
    for written, said in ((f"{threads}", True), (f"{threads},2", True), (f"{threads + 1}", False), ("", False)):
        monkeypatch.setenv("OMP_NUM_THREADS", written)
        machine = doctor.machine(pathlib.Path("."))
        assert machine["torch_threads_from"] == (f"OMP_NUM_THREADS={written}" if said else None)
        speeds = dict.fromkeys(("matmul_float32_gflops", "matmul_bfloat16_gflops", "memory_gb_per_s"), 1.0)
        facts = {"machine": machine, "versions": {}, "speed": speeds | {"memory_read_gb_per_s": None}}
        shown = dict(doctor.sections(facts | {"faster_paths": {}, "extras": {}})["machine"])
        assert shown.get("torch threads from") == machine["torch_threads_from"] and shown["gpu"]


def test_the_largest_cache_is_found_or_unknown(monkeypatch):
    monkeypatch.setattr(doctor.Path, "glob", lambda *_: ["a", "b"])
    monkeypatch.setattr(doctor, "read", {"a": "48K\n", "b": "32768K\n"}.get)
    assert doctor.largest_cache("") == 33.6
    monkeypatch.setattr(doctor.Path, "glob", lambda *_: [])
    assert doctor.largest_cache("cache size\t: 1024 KB\n") == 1.0 and doctor.largest_cache("") is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "words, bound",
    [
        ("seconds=inf", "finite"), ("seconds=nan", "finite"), ("seconds=0", "not above 600"),
        ("seconds=1e9", "not above 600"), ("size=1e6", "between 1 and 8192"), ("size=0", "between 1 and 8192"),
    ],
)  # fmt: skip
def test_doctor_refuses_measurements_that_never_end(capsys, words, bound):
    assert main(["doctor", words]) == 2
    error = capsys.readouterr().err
    name = words.split("=")[0]
    assert error.startswith(f"nautilus: {name}=") and bound in error and len(error.splitlines()) == 1


def test_doctor_shows_the_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert doctor.machine(tmp_path / "not" / "yet")["disk_free_gb"] == doctor.machine(tmp_path)["disk_free_gb"] > 0


def test_doctor_says_what_an_extra_lacks():
    extra = doctor.Extra("something", ("json", "no_such_module_here"))
    assert doctor.missing(extra) == ["no_such_module_here"]
    lines = dict(doctor.extra_lines({"serve": ["fastapi"], "report": []}))
    assert (
        lines["serve"].endswith("lacks fastapi")
        and "\\[NAME]'" in lines["install one"]
        and lines["report"].endswith("installed")
    )


def test_doctor_knows_every_extra_of_the_package():
    import tomllib

    root = pathlib.Path(nautilus.__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"all"}


def test_the_best_time_is_the_shortest_of_at_least_three(monkeypatch):
    now = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(now))
    assert doctor.best(lambda: None, seconds=1.0) == 2.0


def test_the_explanation_of_an_error_without_words_is_its_kind():
    assert command.explain(ValueError()).startswith("ValueError")


# ----- bench ---------------------------------------------------------------------------------------------------------

QUICK = "context=16,40 sequences=2 prefill=20 steps=3 repeats=2".split()


def test_a_command_of_two_words_is_found_and_suggested(capsys):
    for words in (["bench", "speed", "--help"], ["bench", "speed", "toy", "--help"]):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith("nautilus bench speed [MODEL] setting=value")
    for words in (["bench"], ["bench", "sped"], ["bench", "--help"]):
        assert main(words) == 2
        assert "bench is a group of commands: bench speed; nautilus bench speed --help" in capsys.readouterr().err


def test_bench_speed_measures_a_preset_with_random_weights(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    words = ["super", "shrink=true", "format=nvfp4", "where=true", "json=true", f"metrics={rows}", *QUICK]
    assert main(["bench", "speed", *words]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert (facts["model"], facts["weights"]) == ("super", "random, in nvfp4")
    assert facts["pattern"] == preset("super").pattern[:8] and facts["vocab"] == 97
    names = ["decode after 16", "decode after 40", "2 sequences after 16", "prefill 20"]
    assert [work["work"] for work in facts["works"]] == names
    assert [work["bytes_per_step"] is None for work in facts["works"]] == [False, False, False, True]
    for work in facts["works"]:
        speed = work["tokens_per_s"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"] and len(speed["all"]) == 2
        measured = facts["native"]["on"] and work["steps"] > 0
        assert (work["share_of_roofline"] is not None) == (work["bandwidth_gb_per_s"] is not None) == measured
        assert bool(work.get("where")) == measured
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(8)]
    assert [line["work"] for line in lines] == [name for name in names for _ in range(2)]
    assert "making random weights in nvfp4" in err and "8/8  tokens_per_s" in err
    assert "turn" in err and "step" not in err


def test_bench_speed_prints_tables(capsys):
    assert main(["bench", "speed", "toy", "shrink=true", "where=true", *QUICK]) == 0
    text = capsys.readouterr().out
    assert "toy: 8 layers MEM*EMEM, width 48" in text or "toy: 7 layers MEM*EME, width 48" in text
    for word in ("decode after 40", "2 sequences after 16", "prefill 20", "tokens/s", "range"):
        assert word in text
    if native().functions is not None:
        assert "GB/s" in text and "Mamba in_proj" in text and "outside the kernels" in text and " %" in text
        assert "are of one step" in text and "outside the kernels: what Python does" in text
        assert "\u2026" not in text  # nothing is cut off in 80 columns


def test_the_first_turn_of_each_work_is_not_counted(monkeypatch, capsys):
    from nautilus.eval.speed import Ready, Turn

    turns = []

    def turn(self):
        turns.append(self.work.name)
        return Turn(tokens_per_s=1e9 if turns.count(self.work.name) == 1 else 5.0)

    monkeypatch.setattr(Ready, "turn", turn)
    assert main(["bench", "speed", "toy", "shrink=true", "json=true", *QUICK]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [work["tokens_per_s"]["all"] for work in facts["works"]] == [[5.0, 5.0]] * 4 and len(turns) == 4 * 3


def test_one_thread_is_no_threads():
    assert [doctor.counted(count, "thread") for count in (1, 2)] == ["1 thread", "2 threads"]


def test_bench_speed_opens_a_run_and_a_checkpoint(tmp_path, capsys):
    from nautilus.model.language import Language
    from nautilus.presets import shrink

    run = Run.create(tmp_path / "run", {})
    Language(shrink(preset("nano"))).initialise(0).save(run.model)
    for source in (run.folder, run.model):
        assert main(["bench", "speed", str(source), "json=true", *QUICK]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["weights"] == "as they are stored" and facts["works"][0]["tokens_per_s"]["median"] > 0
    assert main(["bench", "speed", str(run.folder), "format=nvfp4"]) == 2
    assert "has weights of its own; leave them out, or give a preset" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["vocab=1 layers=_", "layers=M format=nvfp4"])
def test_bench_speed_measures_what_is_nearly_nothing(capsys, words):
    quick = "context= sequences=2 prefill= steps=2 repeats=1".split()
    assert main(["bench", "speed", "toy", "json=true", *quick, *words.split()]) == 0
    (work,) = json.loads(capsys.readouterr().out)["works"]
    assert work["sequences"] == 2 and work["tokens_per_s"]["median"] > 0


@pytest.mark.parametrize(
    "words,message",
    [
        ("ultra format=nvfp4", "vocabulary 131,072) with random weights in nvfp4 was asked for; it takes 6"),
        ("nano layers=MEX", "has 'X' at position 2"),
        ("toy shrink=true format=nvfp5", "choose one of bf16, f32, "),
        ("supre", "did you mean 'super'?"),
        ("toy context=0", "must be at least 1"),
        ("toy context= sequences= prefill=", "no work to time was asked for"),
        ("toy state=fp17", "there is none called 'fp17'; did you mean"),
        ("toy cache=fp9", "pages of 'fp9' for heads of width 16 do not exist; take one of f32, bf16"),
        (f"toy metrics={__file__}", "that file is there; give a new name"),
        ("toy metrics=/no/where", "metrics=/no/where were asked for, but /no is no folder; make it first"),
        ("llama_3_1_8b layers=* vocab=99 context=131073", "131,105 positions; the model has 131,072"),
    ],
)
def test_bench_speed_refuses_what_cannot_be(capsys, monkeypatch, words, message):
    monkeypatch.setattr("nautilus.eval.random_model.free_bytes", lambda: int(24e9))
    begin = time.monotonic()
    assert main(["bench", "speed", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and time.monotonic() - begin < 5


@pytest.mark.slow
def test_bench_speed_without_native_kernels_says_what_it_cannot_tell():
    script = f"from nautilus.cli import main; main(['bench', 'speed', 'toy', 'shrink=true', 'where=true', *{QUICK}])"
    environment = os.environ | {"NAUTILUS_NATIVE": "off"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert "decode after 16" in done.stdout and "GB/s" not in done.stdout
    assert "no roofline, no time by part: they take native kernels, which are off: NAUTILUS_NATIVE=off" in done.stdout


def test_a_model_faster_than_memory_and_one_that_is_not_replayed_are_remarked_upon():
    machine = {"largest_cache_mb": 2.0, "load_average": 0.5, "cores": 2}
    fast = {"share_of_roofline": {"median": 1.2}, "bytes_per_step": 2_000_001}
    facts = {"native": {"on": True, "reason": "level x"}, "machine": machine, "works": [fast]}
    assert [*bench.remarks(facts)] == [
        "above 100 %: what a step reads lies in the caches, which are faster than memory"
    ]
    slow = {"share_of_roofline": {"median": 0.9}, "bytes_per_step": 2_000_001}
    facts["works"] = [{"share_of_roofline": None, "where": []}, slow]
    assert [*bench.remarks(facts)] == [
        "no time by part: a step of this model is not replayed, since PyTorch computes some of it"
    ]


def test_of_a_model_in_the_caches_it_is_said_what_its_share_of_the_roofline_means():
    machine = {"largest_cache_mb": 2.0, "load_average": 0.5, "cores": 2}
    small = {"share_of_roofline": {"median": 0.3}, "bytes_per_step": 1_500_000}
    facts = {"native": {"on": True, "reason": "level x"}, "machine": machine, "works": [small]}
    (line,) = bench.remarks(facts)
    assert "a step that reads 1.5 MB finds it in the caches (the largest has 2 MB)" in line and "\n" not in line
    machine["largest_cache_mb"] = None
    assert [*bench.remarks(facts)] == []
