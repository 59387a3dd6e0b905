"""llama.cpp as a contestant: its own tools, compiled for this machine, on random weights in its own file format.

    python benchmarks/peers/llama_cpp.py --shape nano --format Q4_0 NVFP4        # build, write the files, print a table

The sources are those inside the source package of llama-cpp-python. Every speed is the better of flash
attention on and off, named beside it. Its threads wait for each other by spinning: other work on their cores slows it
down ten times and more (with OMP_WAIT_POLICY=passive in the environment four times), so measure on an idle machine.
What exists in the cache is not made again. Needs cmake, a C++ compiler and, to write files, the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from nautilus.config import Config, lay
from nautilus.data.tokenizer import Tokenizer
from nautilus.presets import preset
from nautilus.runtime import UserError, atomic_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when this file is run by its path
from peers.gguf_file import FORMATS, write_gguf  # noqa: E402

VERSION = "0.3.36"  # of llama-cpp-python
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nautilus" / "peers"
PATTERNS = {"nano": "MEM*EME", "super": "MEM*E"}  # a slice of each model, its layers in their full width
PROGRAMS = {
    "bench": "llama-bench", "batched": "llama-batched-bench", "quantize": "llama-quantize", "server": "llama-server",
}  # fmt: skip
BOTH = ("off", "on")
CMAKE = """CMAKE_BUILD_TYPE=Release GGML_NATIVE=ON GGML_OPENMP=ON BUILD_SHARED_LIBS=OFF LLAMA_CURL=OFF LLAMA_OPENSSL=OFF
    LLAMA_BUILD_TESTS=OFF LLAMA_BUILD_EXAMPLES=OFF LLAMA_BUILD_APP=OFF LLAMA_BUILD_UI=OFF LLAMA_USE_PREBUILT_UI=OFF"""


@dataclass(frozen=True, kw_only=True)
class Tools:
    bench: Path
    batched: Path
    quantize: Path
    server: Path


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of each repeat, under the settings that were fastest of those tried."""

    samples: tuple[float, ...]
    settings: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return max(self.samples)


# ----- tools and files, made once ------------------------------------------------------------------------------------


def build(cache: Path = CACHE) -> Tools:
    """The tools, from `cache` if they are there; else downloaded, unpacked and compiled, which takes minutes."""
    source = cache / f"llama_cpp_python-{VERSION}"
    place = source / "build"
    tools = Tools(**{name: place / "bin" / program for name, program in PROGRAMS.items()})
    if all((place / "bin" / program).is_file() for program in PROGRAMS.values()):
        return tools
    if not shutil.which("cmake"):
        raise UserError("compiling llama.cpp needs cmake, which is not on the PATH; install cmake and a C++ compiler")
    unpack(cache, source)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    settings = [f"-D{setting}" for setting in CMAKE.split()]
    configure = ["cmake", "-S", source / "vendor" / "llama.cpp", "-B", place, *generator, *settings]
    follow(configure, "configuring llama.cpp", cache / "build.log")
    compile = ["cmake", "--build", place, "--parallel", os.cpu_count() or 1, "--target", *PROGRAMS.values()]
    follow(compile, "compiling llama.cpp, for minutes", cache / "build.log")
    return tools


def unpack(cache: Path, source: Path) -> None:
    """vendor/llama.cpp of the source package becomes source/vendor/llama.cpp."""
    if source.is_dir():
        return
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"{source.name}.tar.gz"
    if not archive.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", cache]
        follow([*pip, f"llama-cpp-python=={VERSION}"], "downloading llama.cpp", cache / "build.log")
    with atomic_folder(source) as folder, tarfile.open(archive) as package:
        for member in package:
            name = member.name.removeprefix(f"{source.name}/")
            if name.startswith("vendor/llama.cpp/"):
                package.extract(member.replace(name=name), folder, filter="data")


def follow(command: list, what: str, log: Path) -> None:
    """Run `command`: all it says goes to `log`, its latest line to the terminal."""
    progress(f"{what} (log: {log})", end="\n")
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with log.open("a", buffering=1) as file, process:
        for line in process.stdout or ():
            file.write(line)
            progress(line)
    progress("")
    if process.returncode:
        raise UserError(f"{what} failed: {' '.join(words)} ended with {process.returncode}; the end of {log} says why")


def progress(line: str, end: str = "\r") -> None:
    """One line that the next one replaces; only lines that stay (end="\\n") when nobody watches."""
    if sys.stderr.isatty():
        print(f"\033[K{line.strip()[:110]}", end=end, file=sys.stderr, flush=True)
    elif end == "\n":
        print(line, file=sys.stderr, flush=True)


def shape(name: str) -> Config:
    """The slice of Nano or Super that is measured: few layers in their full width, a small vocabulary."""
    whole = preset(name)
    return replace(whole, vocab=16384, layers=lay(PATTERNS[name], *whole.layers), mtp=())


def model_file(
    name: str, format: str, cache: Path = CACHE, *, config: Config | None = None, tokenizer: Tokenizer | None = None
) -> Path:
    """The file of that slice, or of a config, in that format, written now if it is not in `cache` yet; with the
    tokenizer it can chat."""
    path = cache / f"{name}-{format}{'-chat' if tokenizer else ''}.gguf"
    if not path.is_file():
        progress(f"writing {path}", end="\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(path, config or shape(name), format, say=progress, tokenizer=tokenizer)
    return path


# ----- speeds; `flash` names the settings of flash attention to try ---------------------------------------------------


def decode(
    tools: Tools, gguf: Path, *, tokens: int = 64, context: int = 0, threads: int = 2, repeats: int = 3, flash=BOTH
) -> Speed:
    """One sequence, token by token, after `context` tokens of prompt that are not timed."""
    work = ["-p", 0, "-n", tokens, "-d", context, "-fa", ",".join(flash)]
    return llama_bench(tools, gguf, work, threads, repeats)


def prefill(tools: Tools, gguf: Path, *, tokens: int = 512, threads: int = 2, repeats: int = 3, flash=BOTH) -> Speed:
    """A prompt of that length from an empty state, in micro-batches of 512: those of 2048 were 1% slower."""
    work = ["-p", tokens, "-n", 0, "-fa", ",".join(flash)]
    return llama_bench(tools, gguf, work, threads, repeats)


def llama_bench(tools: Tools, gguf: Path, work: list, threads: int, repeats: int) -> Speed:
    command = [tools.bench, "-m", gguf, *work, "-t", threads, "-r", repeats, "-o", "json"]
    found = [
        Speed(samples=tuple(row["samples_ts"]), settings=f"flash attention {BOTH[row['flash_attn']]}")
        for row in json.loads(output(command))
    ]
    return max(found, key=lambda speed: speed.best)


def batched(
    tools: Tools, gguf: Path, *, sequences: int = 8, tokens: int = 64, threads: int = 2, repeats: int = 3, flash=BOTH
) -> Speed:
    """All sequences together, each of which decodes `tokens` after a prompt of 16 that is not timed."""
    room = sequences * (16 + tokens)
    found = []
    for setting in flash:
        command = [tools.batched, "-m", gguf, "-c", room, "-npp", 16, "-ntg", tokens, "-fa", setting]
        command += ["-npl", ",".join([str(sequences)] * repeats), "-t", threads, "-tb", threads]
        lines = output([*command, "--output-format", "jsonl"]).splitlines()
        samples = tuple(json.loads(line)["speed_tg"] for line in lines if line.startswith("{"))
        found.append(Speed(samples=samples, settings=f"flash attention {setting}"))
    return max(found, key=lambda speed: speed.best)


def output(command: list) -> str:
    words = [str(word) for word in command]
    progress(" ".join(words[1:]))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(done.stderr.splitlines()[-10:])
        raise UserError(f"{' '.join(words)} ended with {done.returncode}; the end of what it said:\n{said}")
    return done.stdout


def measure(tools: Tools, gguf: Path, threads: int, repeats: int) -> dict[str, Speed]:
    return {
        "decode": decode(tools, gguf, threads=threads, repeats=repeats),
        "decode at 8K": decode(tools, gguf, context=8192, threads=threads, repeats=repeats),
        "8 sequences": batched(tools, gguf, threads=threads, repeats=repeats),
        "prefill 512": prefill(tools, gguf, tokens=512, threads=threads, repeats=repeats),
        "prefill 4096": prefill(tools, gguf, tokens=4096, threads=threads, repeats=repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=PATTERNS, default="nano")
    parser.add_argument("--format", choices=FORMATS, nargs="*", default=[], help="formats to measure; none: only build")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of the tools and the files (default: %(default)s)"
    )
    asked = parser.parse_args()
    tools = build(asked.cache)
    for format in asked.format:
        gguf = model_file(asked.shape, format, asked.cache)
        print(f"{asked.shape} {format}, {gguf.stat().st_size / 1e9:.2f} GB, tokens per second (lowest to highest):")
        for work, speed in measure(tools, gguf, asked.threads, asked.repeats).items():
            spread = f"{min(speed.samples):.1f} to {max(speed.samples):.1f}"
            progress("")
            print(f"  {work:13} {speed.median:8.1f}  ({spread}; {speed.settings})", flush=True)


if __name__ == "__main__":
    main()
