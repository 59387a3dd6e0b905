"""Shared by the tests of native code: skipped where there is none, or no sanitizer."""

import os
import shutil
import subprocess

import pytest

from nautilus.ops.cpu.library import native


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
