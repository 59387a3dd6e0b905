"""The native library is optional: what is missing, broken or not for this machine is refused with a reason."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from itertools import combinations
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from nautilus.model.language import Language
from nautilus.ops.cpu import library, mamba
from nautilus.ops.cpu.norm import rms_norm_native
from nautilus.ops.norm import rms_norm, rms_norm_fused
from nautilus.presets import preset, shrink

ROOT = Path(library.__file__).parents[3]


@pytest.fixture
def fresh(monkeypatch):
    """`native()` decides anew, now and after the test, whatever the environment asks for."""
    monkeypatch.delenv("NAUTILUS_NATIVE", raising=False)
    library.native.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.native.cache_clear()
    library.native()


def norm_runs_on_torch():
    x, weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(5)
    return torch.equal(rms_norm(x, weight, 1e-5), rms_norm_fused(x, weight, 1e-5))


def test_off_means_torch(fresh):
    fresh.setenv("NAUTILUS_NATIVE", "off")
    assert library.native().functions is None and "NAUTILUS_NATIVE=off" in library.native().reason
    assert norm_runs_on_torch()


@torch.no_grad()
def test_a_model_gives_the_same_logits_without_the_library(fresh):
    model = Language(shrink(preset("nano"))).initialise(0).eval()
    tokens_BT = torch.arange(70)[None]
    want, _ = model(tokens_BT)
    library.native.cache_clear()
    fresh.setenv("NAUTILUS_NATIVE", "off")
    torch.testing.assert_close(model(tokens_BT)[0], want, rtol=1e-4, atol=1e-4)


def test_a_library_that_was_not_built_says_what_to_do_and_says_it_once(fresh, tmp_path, caplog):
    fresh.setattr(library, "FILE", tmp_path / "libnautilus.so")
    assert library.native() is library.native() and caplog.text.count("install a C++17 compiler") == 1
    assert "compiler" in library.native().reason and norm_runs_on_torch()


@pytest.mark.parametrize("damage", ["cut off", "no library at all", "empty"])
def test_a_broken_library_is_refused_and_torch_runs(fresh, tmp_path, damage):
    if library.native().functions is None:
        pytest.skip(library.native().reason)
    good = library.FILE.read_bytes()
    broken = {"cut off": good[:5000], "no library at all": b"text, not code\n" * 99, "empty": b""}
    path = tmp_path / "libnautilus.so"
    path.write_bytes(broken[damage])
    path.with_suffix(".sha256").write_text(library.FILE.with_suffix(".sha256").read_text())
    library.native.cache_clear()
    fresh.setattr(library, "FILE", path)
    assert library.native().functions is None and "install nautilus again" in library.native().reason
    assert norm_runs_on_torch()


def test_a_file_that_is_no_library_is_refused_even_with_its_own_checksum(fresh, tmp_path):
    path = tmp_path / "libnautilus.so"
    path.write_bytes(b"text, not code\n" * 99)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    fresh.setattr(library, "FILE", path)
    assert "cannot be used" in library.native().reason and norm_runs_on_torch()


def test_a_library_of_another_version_is_refused(fresh):
    if library.native().functions is None:
        pytest.skip(library.native().reason)
    library.native.cache_clear()
    fresh.setattr(library, "INTERFACE", 10_000)
    reason = library.native().reason
    assert library.native().functions is None and "10000" in reason and "install nautilus again" in reason


def test_a_level_can_be_forced_and_an_unknown_one_names_those_there_are(fresh):
    if library.native().functions is None:
        pytest.skip(library.native().reason)
    library.native.cache_clear()
    fresh.setenv("NAUTILUS_NATIVE", "baseline")
    assert library.native().level == "baseline"
    library.native.cache_clear()
    fresh.setenv("NAUTILUS_NATIVE", "avx1024")
    with pytest.raises(ValueError, match="avx1024.*choose off,.* baseline"):
        library.native()


def test_the_best_level_comes_first_and_is_taken(fresh):
    fresh.delenv("NAUTILUS_NATIVE", raising=False)
    functions = library.native().functions
    if functions is None:
        pytest.skip(library.native().reason)
    names = [functions.nautilus_level_name(i).decode() for i in range(3) if functions.nautilus_level_name(i)]
    order = ("avx512", "avx2", "neon_dot", "neon", "baseline")
    assert names == [name for name in order if name in names] and names[-1] == "baseline"
    here = [name for i, name in enumerate(names) if functions.nautilus_level_is_here(i)]
    assert library.native().level == here[0] and library.native().reason == f"level {here[0]}"


def test_every_level_runs_code_of_its_own(fresh):
    """Sums are split among as many lanes as a vector has, so their last bits tell which code ran. Both levels in NEON
    have the same, by intention."""
    if library.native().functions is None:
        pytest.skip(library.native().reason)
    x, weight = torch.randn(64, 777, generator=torch.Generator().manual_seed(0)), torch.ones(777)
    results = []
    for level in ("avx512", "avx2", "neon", "baseline"):
        library.native.cache_clear()
        fresh.setenv("NAUTILUS_NATIVE", level)
        try:
            library.native()
        except ValueError:
            continue  # not on this machine
        results.append(rms_norm_native(x, weight, 1e-5))
    assert results and not any(torch.equal(*pair) for pair in combinations(results, 2))


def test_a_level_that_only_other_machines_have_is_named_as_missing():
    functions = MagicMock()
    functions.nautilus_level_name.side_effect = [b"wide", b"middle", b"baseline", None] * 2
    functions.nautilus_level_is_here.side_effect = lambda index: index > 0
    assert library.choose_level(functions, "").level == "middle"
    functions.nautilus_choose.assert_called_with(1)
    with pytest.raises(ValueError, match="'wide' is no level of this machine; choose off, middle or baseline"):
        library.choose_level(functions, "wide")


def test_scratch_that_no_memory_is_found_for_is_an_error_that_says_what_to_do():
    if library.native().functions is None:
        pytest.skip(library.native().reason)
    sizes = mamba.Sizes(rows=0, time=1, heads=1, head_width=16, groups=1, state=1 << 40, taps=2)
    with pytest.raises(MemoryError, match="no memory for its scratch; use fewer rows"):
        library.call("nautilus_mamba_forward", mamba.Forward(sizes))


def test_a_level_the_machine_lacks_is_not_chosen():
    functions = library.native().functions
    if functions is None:
        pytest.skip(library.native().reason)
    assert functions.nautilus_choose(-1) == functions.nautilus_choose(99) == 1
    assert rms_norm_native(torch.ones(1, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4]


def test_forcing_native_on_what_it_cannot_take_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "native")
    with pytest.raises(RuntimeError, match="native.*float64"):
        rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), 1e-5)


def copied(tmp_path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "*.sha256", "__pycache__")
    shutil.copytree(ROOT / "nautilus", tmp_path / "nautilus", ignore=ignored, dirs_exist_ok=True)


def build(tmp_path, **environment) -> subprocess.CompletedProcess:
    """The package's own build of the library, in a copy of the tree."""
    copied(tmp_path)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_compiler_the_build_goes_on_without_the_library(tmp_path):
    done = build(tmp_path, CC="/no/compiler", CXX="/no/compiler")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "nautilus/ops/cpu/libnautilus.so").exists()
    assert "libnautilus" in done.stderr


def test_a_build_that_fails_does_not_seal_what_lay_there(tmp_path):
    library_file = tmp_path / "nautilus/ops/cpu/libnautilus.so"
    library_file.parent.mkdir(parents=True)
    library_file.write_bytes(b"cut off")
    library_file.with_suffix(".sha256").write_text("of the whole file")
    assert build(tmp_path, CC="/no/compiler", CXX="/no/compiler").returncode == 0
    assert library_file.with_suffix(".sha256").read_text() == "of the whole file"


@pytest.mark.slow
def test_a_wheel_carries_the_library_and_its_seal(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    copied(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", "out"]
    subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"NAUTILUS_CXXFLAGS": "-O0"}, check=True, capture_output=True
    )
    with zipfile.ZipFile(*(tmp_path / "out").glob("*.whl")) as wheel:
        wheel.extractall(tmp_path / "installed")
    program = "from nautilus.ops.cpu.library import FILE, native; print(FILE, bool(native().functions))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "out", env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "installed/nautilus/ops/cpu/libnautilus.so"), "True"], done.stderr


@pytest.mark.parametrize("fault", ["no file", "a seal that is no text"])
def test_a_library_that_cannot_be_read_is_refused_and_torch_runs(fresh, tmp_path, fault):
    path = tmp_path / "libnautilus.so"
    path.mkdir() if fault == "no file" else path.write_bytes(b"code")
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe\n")
    library.native.cache_clear()
    fresh.setattr(library, "FILE", path)
    assert library.native().functions is None and "install nautilus again" in library.native().reason
    assert norm_runs_on_torch()
