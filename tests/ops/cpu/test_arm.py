"""The kernels for ARM, cross-compiled and emulated: the bits of the same calls on x86.

NEON has as many lanes as AVX2 has here and the same chains of multiply-adds, and plain C++ is plain C++ everywhere: the
levels `neon` and `neon_dot` are held to AVX2, `baseline` to the baseline of x86, bit by bit.
"""

import bisect
import contextlib
import ctypes
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nautilus.ops.cpu import library, linear, quant
from nautilus.ops.cpu.attention import Rows, attention_paged, kv_write, new_pool
from nautilus.ops.encode import encode

ROOT = Path(library.__file__).parents[3]
HERE = Path(__file__).parent
TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}  # and Debian's packages of them
# A processor without the dot product of bytes, and one that has everything.
OLD, NEW = "cortex-a53", "max"
# What replay.cpp itself asks the library.
ASKED = {"interface", "level_name", "level_is_here", "choose", "borrow_team", "replay"}


def need_tools():
    """Installs what is missing where that is possible, and skips where it is not."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, timeout=300)
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"a cross-compiler and an emulator are needed: apt-get install {' '.join(missing)}")


# ----- recording -----------------------------------------------------------------------------------------------------


def pointers(structure: ctypes.Structure, at: int = 0):
    """(place, address) of each pointer in it that is not null."""
    for name, kind, *_ in structure._fields_:
        place, value = at + getattr(type(structure), name).offset, getattr(structure, name)
        if isinstance(value, ctypes.Structure):
            yield from pointers(value, place)
        elif kind is ctypes.c_void_p and value is not None:
            yield place, value


def tables(arguments: ctypes.Structure):
    """(place, addresses) of each list of pointers in the arguments of a packing call; 0 where a matrix has none."""
    for name, kind, *_ in arguments._fields_:
        if kind is ctypes.POINTER(ctypes.c_void_p) and (listed := getattr(arguments, name)):
            yield getattr(type(arguments), name).offset, [listed[i] or 0 for i in range(arguments.to.count)]


def text(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


class Recorder:
    """The library's functions, which write every call with the memory it read and left as replay.cpp wants it; and the
    tape that is told which memory that is."""

    def __init__(self, functions, file):
        self.functions, self.file, self.names = functions, file, []
        self.begins, self.storages = [], []

    def touch(self, tensor):
        storage = tensor.untyped_storage()
        place = bisect.bisect_left(self.begins, storage.data_ptr())
        if self.begins[place : place + 1] != [storage.data_ptr()]:
            self.begins.insert(place, storage.data_ptr())
            self.storages.insert(place, storage)  # kept, so that no other gets its address

    def add(self, name, arguments):
        pass  # known already

    def __getitem__(self, name):
        return lambda arguments, other=None: self.call(name, arguments._obj, other)

    __getattr__ = __getitem__

    def call(self, name, arguments, other):
        found = [(place, value, bisect.bisect_right(self.begins, value) - 1) for place, value in pointers(arguments)]
        index_of = lambda address: bisect.bisect_right(self.begins, address) - 1 if address else -1
        lists = [(place, [(index_of(each), each) for each in listed]) for place, listed in tables(arguments)]
        used = sorted({index for *_, index in found} | {i for _, listed in lists for i, each in listed if each})
        memory = lambda: [ctypes.string_at(self.begins[i], self.storages[i].nbytes()) for i in used]
        given, before = bytes(arguments), memory()
        result = self.functions[name](*(a for a in (ctypes.byref(arguments), other) if a is not None))
        more = 0 if other is None or isinstance(other, int) else other._obj.value
        parts = [text(name.encode()), text(given), text(bytes(arguments)), struct.pack("<qqq", result, more, len(used))]
        for old, new in zip(before, memory(), strict=True):
            parts += [text(old), text(b"" if old == new else new)]
        parts.append(struct.pack("<q", len(found)))
        parts += [struct.pack("<qqq", place, used.index(i), value - self.begins[i]) for place, value, i in found]
        parts.append(struct.pack("<q", len(lists)))
        for place, listed in lists:
            places = [(used.index(i), each - self.begins[i]) if each else (-1, 0) for i, each in listed]
            parts += [struct.pack("<qq", place, len(places)), *(struct.pack("<qq", *pair) for pair in places)]
        self.file.write(b"".join(parts))
        self.names.append(name)
        return result


def level_names() -> list[str]:
    names: list[str] = []
    while (name := library.native().functions.nautilus_level_name(len(names))) is not None:
        names.append(name.decode())
    return names


@contextlib.contextmanager
def recorder(monkeypatch, level, path):
    """Calls inside run at this level and are written to `path`."""
    real, names = library.native(), level_names()
    assert real.functions.nautilus_choose(names.index(level)) == 0
    torch.manual_seed(0)
    with monkeypatch.context() as patch, path.open("wb") as file:
        tape = Recorder(real.functions, file)
        for module in (library, linear, quant):
            patch.setattr(module, "native", lambda: library.Native(functions=tape, level=level, reason=""))
        token = library.recording.set(tape)
        try:
            yield tape
        finally:
            library.recording.reset(token)
            real.functions.nautilus_choose(names.index(real.level))


def every_code():
    """Each of the 256 codes of a byte as a weight and as a value that is attended to, NaN among them; then scales."""
    x, codes = torch.randn(1, 64).bfloat16(), torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 64)
    for name, part, kind in (
        *(("fp8_e4m3", "codes", torch.float8_e4m3fn), ("int8", "codes", torch.int8)),
        *(("nvfp4", "scale", torch.float8_e4m3fn), ("mxfp4", "scale", torch.uint8)),
    ):
        matrix = encode(torch.ones(256, 64), name)
        some = codes[:, : getattr(matrix, part).shape[1]].contiguous()
        # No scale is negative or larger than 2^103.
        some = some.clamp(max=126 if name == "nvfp4" else 230) if part == "scale" else some
        quant.linear_quant(x, quant.repacked(replace(matrix, **{part: some.view(kind)})))
    begin, length, table = (torch.tensor(numbers).int() for numbers in ([0, 3], [3], [[0]]))
    rows = Rows(begin=begin, length=length, table_BL=table)
    for format in ("fp8", "int8"):
        pool, k = new_pool(1, 1, 256, format), torch.randn(3, 1, 256).bfloat16()
        kv_write(pool, rows, k, k)
        # 16 tokens in twos beside each other, for each of 256 channels
        pool.values.view(-1)[: 16 * 256].view(8, 256, 2).copy_(torch.arange(256)[None, :, None])
        attention_paged(k, pool, rows)


# ----- replaying -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """An ARM machine with the library: `arm("max", ...)` runs replay.cpp on such a processor."""

    library: Path
    program: Path

    def __call__(self, processor: str, *arguments) -> list[str]:
        emulator = "qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu"
        command = [*emulator, *map(str, (self.program, self.library, *arguments))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.splitlines()


def cross_built(tmp_path) -> Arm:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "*.sha256", "__pycache__")
    shutil.copytree(ROOT / "nautilus", tmp_path / "nautilus", ignore=ignored)
    compilers = {"CC": "aarch64-linux-gnu-gcc", "CXX": "aarch64-linux-gnu-g++", "NAUTILUS_MACHINE": "aarch64"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    made = subprocess.run(build, cwd=tmp_path, env=os.environ | compilers, capture_output=True, text=True)
    arm = Arm(tmp_path / "nautilus/ops/cpu/libnautilus.so", tmp_path / "replay")
    assert arm.library.exists(), made.stdout[-2000:] + made.stderr[-2000:]
    compile = [compilers["CXX"], "-std=c++17", "-O1", HERE / "replay.cpp", "-o", arm.program, "-ldl"]
    subprocess.run([str(part) for part in compile], check=True)
    return arm


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_call_leaves_the_bits_of_x86(tmp_path, monkeypatch, built):
    names = level_names()
    if "avx2" not in names or not library.native().functions.nautilus_level_is_here(names.index("avx2")):
        pytest.skip("the bits are those of AVX2, which this machine lacks")
    need_tools()
    arm = cross_built(tmp_path)
    assert arm(OLD) == ["neon", "baseline"] and arm(NEW) == ["neon_dot", "neon", "baseline"]
    exercise = runpy.run_path(str(HERE / "exercise.py"))
    for level in ("avx2", "baseline"):
        with recorder(monkeypatch, level, tmp_path / level) as tape:
            exercise["everything"]()
            every_code()
    source = (ROOT / "nautilus/ops/cpu/entry.cpp").read_text()
    exported = {*re.findall(r"^EXPORT .*?nautilus_(\w+)\(", source, re.MULTILINE)}
    assert {name.removeprefix("nautilus_") for name in tape.names} == exported - ASKED
    all_alike = [f"{len(tape.names)} calls"]
    for processor, level, on_x86 in ((OLD, "neon", "avx2"), (NEW, "neon_dot", "avx2"), (OLD, "baseline", "baseline")):
        assert arm(processor, tmp_path / on_x86, level, 2) == all_alike, f"{level} against {on_x86}"
    # Sums are split among as many lanes as a vector has, so those of other levels differ.
    with recorder(monkeypatch, "baseline", tmp_path / "norm") as tape:
        exercise["norm"](torch.float32, 300, 70)
    lines = [line.split(": ")[0] for line in arm(NEW, tmp_path / "norm", "neon", 2)]
    assert {"call 0, nautilus_norm_forward", "call 1, nautilus_norm_backward"} <= {*lines}
