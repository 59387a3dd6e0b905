"""The kernels under the address and undefined-behaviour sanitizers, at sizes beside every vector width."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nautilus.ops.cpu import library

ROOT = Path(library.__file__).parents[3]
PROGRAM = Path(__file__).with_name("exercise.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # most of it compiles
def test_no_kernel_touches_memory_that_is_not_its_own_or_reads_what_nobody_wrote(tmp_path, sanitizer):
    _, runtime = sanitizer("asan")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nautilus/ops").mkdir(parents=True)
    shutil.copy(ROOT / "nautilus/__init__.py", tmp_path / "nautilus")
    shutil.copytree(ROOT / "nautilus/ops/cpu", tmp_path / "nautilus/ops/cpu", ignore=shutil.ignore_patterns("*.so"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    made = subprocess.run(
        build, cwd=tmp_path, env=os.environ | {"NAUTILUS_CXXFLAGS": flags}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    found = tmp_path / "nautilus/ops/cpu/libnautilus.so"
    options = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824"
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, str(PROGRAM), str(found)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split()[-1] == "baseline" and "runtime error" not in ran.stderr
