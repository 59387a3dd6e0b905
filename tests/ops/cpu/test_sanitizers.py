"""The kernels under the address and undefined-behaviour sanitizers, at sizes beside every vector width."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nautilus.ops.cpu import library

ROOT = Path(library.__file__).parents[3]
PROGRAM = """
import sys, pathlib, ctypes, torch
from nautilus.ops.cpu import library
library.FILE = pathlib.Path(sys.argv[1])
functions = library.native().functions
assert functions is not None, library.native().reason
from nautilus.ops.cpu.experts import experts_native
from nautilus.ops.cpu.mamba import mamba_native
from nautilus.ops.cpu.norm import rms_norm_native
MIXERS = ((2, 65, 4, 5, 2, 7, 4), (1, 1, 2, 16, 1, 3, 2), (1, 130, 2, 33, 2, 8, 4))
EXPERTS = ((5, 18, 34, 4, 2), (230, 66, 130, 3, 2), (1, 2, 2, 5, 1))
draw = lambda *shape: torch.randn(*shape).requires_grad_()


def mixer(dtype, rows, time, heads, width, groups, state, taps):
    inner, channels = heads * width, heads * width + 2 * groups * state
    parameters = draw(channels, taps), draw(channels), draw(heads), draw(heads), draw(heads), draw(inner)
    x, tail = (torch.randn(*shape).to(dtype).requires_grad_()
               for shape in ((rows, time, inner + channels + heads), (rows, taps - 1, channels)))
    out, last = mamba_native(x, *parameters, groups=groups, eps=1e-5, tail_BRC=tail,
                             state_BHPN=draw(rows, heads, width, state), reach_BT=torch.arange(time)[None] % 9)
    (out.sum() + last.sum()).backward()


def experts(tokens, width, hidden, count, active):
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    choice = torch.rand(tokens, count).topk(active).indices
    up, down = draw(count, hidden, width), draw(count, width, hidden)
    experts_native(x, choice, draw(tokens, active), up, down).sum().backward()


index = 0
while (name := functions.nautilus_level_name(index)) is not None:
    if functions.nautilus_choose(index) == 0:
        for size in MIXERS:
            mixer(torch.float32, *size)
            mixer(torch.bfloat16, *size)
        for size in EXPERTS:
            experts(*size)
        rms_norm_native(draw(131, 19), draw(19), 1e-5).sum().backward()
        print(name.decode())
    index += 1
"""


@pytest.mark.slow
def test_no_kernel_touches_memory_that_is_not_its_own(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the sanitizers come with it")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this g++ has no libasan.so")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nautilus/ops").mkdir(parents=True)
    shutil.copy(ROOT / "nautilus/__init__.py", tmp_path / "nautilus")
    shutil.copytree(ROOT / "nautilus/ops/cpu", tmp_path / "nautilus/ops/cpu", ignore=shutil.ignore_patterns("*.so"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    made = subprocess.run(
        build, cwd=tmp_path, env=os.environ | {"NAUTILUS_CXXFLAGS": flags}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    found = tmp_path / "nautilus/ops/cpu/libnautilus.so"
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(found)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split()[-1] == "baseline" and "runtime error" not in ran.stderr
