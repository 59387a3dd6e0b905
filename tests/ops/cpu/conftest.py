"""Every native kernel is tested at every instruction level that this machine can run."""

import os
import shutil
import subprocess

import pytest

from nautilus.ops.cpu.library import FILE, native

LEVELS = ("avx512", "avx2", "baseline")


@pytest.fixture(params=LEVELS)
def level(request):
    """Runs the test at one level, and leaves the best one behind."""
    library = native()
    if library.functions is None:
        # One that is there and refused, an old build for example, would otherwise hide all these tests.
        (pytest.fail if FILE.exists() and os.environ.get("NAUTILUS_NATIVE") != "off" else pytest.skip)(library.reason)
    names = [library.functions.nautilus_level_name(index) for index in range(len(LEVELS))]
    index = next((i for i, name in enumerate(names) if name and name.decode() == request.param), None)
    if index is None or not library.functions.nautilus_level_is_here(index):
        pytest.skip(f"this machine cannot run {request.param}")
    library.functions.nautilus_choose(index)
    yield request.param
    library.functions.nautilus_choose(names.index(library.level.encode()))


@pytest.fixture
def built():
    """For tests of what native code itself takes: skipped where there is none, which is a sound way to run."""
    if native().functions is None:
        pytest.skip(native().reason)


@pytest.fixture
def sanitizer():
    """sanitizer("asan"): the compiler that has it, and the library it brings; skips where there is none."""

    def find(name: str) -> tuple[str, str]:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip(f"no g++: {name} comes with it")
        asked = [compiler, f"-print-file-name=lib{name}.so"]
        runtime = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(runtime):
            pytest.skip(f"this g++ has no lib{name}.so")
        return compiler, runtime

    return find
