"""Builds the native CPU kernels: one shared library behind a plain C interface, every instruction level inside.

The library knows nothing of Python. Without a compiler, or with one that is too old, the install goes on without it and
`nautilus doctor` says so.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("nautilus/ops/cpu")
COMMON = [
    *("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # Products and sums are fused where the kernels say so, never where the compiler likes: all widths must agree.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"),
]
EXTRA = shlex.split(os.environ.get("NAUTILUS_CXXFLAGS", ""))  # for sanitizers
MACHINE = os.environ.get("NAUTILUS_MACHINE") or platform.machine()  # another one for a cross-compiler in CC and CXX
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16", "vbmi")]
# Instructions are put in order after registers are given out: before, GCC spills half of what the kernels hold in them.
NEON = ["-DNAUTILUS_NEON", "-fno-schedule-insns"]
LEVELS: dict[str, list[str]] = {"baseline": []}
if MACHINE in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": [*AVX512, "-mfma", "-mf16c"]}
elif MACHINE in ("aarch64", "arm64"):
    LEVELS |= {"neon": ["-march=armv8-a", *NEON], "neon_dot": ["-march=armv8.2-a+dotprod", *NEON]}
# Compiled once for each level.
KERNELS = (
    *("activation", "attention", "attention_backward", "draw", "experts", "linear", "lowbit", "mamba", "norm"),
    *("peak", "quant", "rotary", "route"),
)
ONCE = ("entry", "pool")


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name("libnautilus.so"))

    def build_extension(self, ext: Extension) -> None:
        where = Path(self.build_temp)
        objects = self.compile(where, [FOLDER / f"{name}.cpp" for name in ONCE], [])
        for level, flags in LEVELS.items():
            names = [f"-DNAUTILUS_LEVEL={level}"]
            objects += self.compile(where / level, [FOLDER / f"{name}.cpp" for name in KERNELS], [*flags, *names])
        library = Path(self.get_ext_fullpath(ext.name))
        static = [] if sys.platform == "darwin" else ["-static-libstdc++", "-static-libgcc"]
        self.compiler.link_shared_object(
            objects,
            str(library),
            extra_postargs=["-pthread", *static, *EXTRA],
            target_lang="c++",
            build_temp=str(where),
        )
        seal(library)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # Copied as well: after a failed build the file that lies there may be anything.
        if (built := Path(self.build_lib) / FOLDER / "libnautilus.sha256").exists():
            shutil.copy(built, FOLDER)

    def compile(self, where: Path, sources: list[Path], flags: list[str]) -> list[str]:
        flags = [*COMMON, *flags, *EXTRA]
        one = lambda source: self.compiler.compile(
            [str(source)], output_dir=str(where), extra_postargs=flags, depends=ext_depends()
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [path for made in pool.map(one, sources) for path in made]


def seal(library: Path) -> None:
    """Writes the checksum without which the library is not loaded: a file cut short would end the process."""
    library.with_suffix(".sha256").write_text(hashlib.sha256(library.read_bytes()).hexdigest() + "\n")


def ext_depends() -> list[str]:
    return [str(path) for path in sorted(FOLDER.glob("*.[ch]*"))]


setup(
    ext_modules=[Extension("nautilus.ops.cpu.libnautilus", sources=[], depends=ext_depends(), optional=True)],
    cmdclass={"build_ext": Build},
)
