"""The native library is optional: what is missing, broken or not for this machine is refused with a reason."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nautilus.ops.cpu import library
from nautilus.ops.cpu.norm import rms_norm_native
from nautilus.ops.norm import rms_norm, rms_norm_fused

ROOT = Path(library.__file__).parents[3]


@pytest.fixture
def fresh(monkeypatch):
    """`native()` decides anew, now and after the test."""
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


def test_a_library_that_was_not_built_says_what_to_do(fresh, tmp_path):
    fresh.setattr(library, "FILE", tmp_path / "libnautilus.so")
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


def build(tmp_path, **environment) -> subprocess.CompletedProcess:
    """The package's own build of the library, in a copy of the tree."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nautilus/ops").mkdir(parents=True)
    shutil.copy(ROOT / "nautilus/__init__.py", tmp_path / "nautilus")
    shutil.copytree(ROOT / "nautilus/ops/cpu", tmp_path / "nautilus/ops/cpu", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_compiler_the_build_goes_on_without_the_library(tmp_path):
    done = build(tmp_path, CC="/no/compiler", CXX="/no/compiler")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "nautilus/ops/cpu/libnautilus.so").exists()
    assert "libnautilus" in done.stderr
