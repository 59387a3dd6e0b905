"""What this machine has and how fast it is, which extras are installed, and why faster paths are off."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nautilus
from nautilus.config import setting
from nautilus.runtime import UserError, installing
from nautilus.runtime.errors import first_existing

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "rich")
# What vectorised CPU code asks for, x86 and ARM.
FEATURES = "avx2 fma avx512f avx512_vnni avx512_bf16 avx_vnni amx_bf16 amx_int8 asimd asimddp bf16 i8mm sve".split()
LARGEST, LONGEST = 8192, 600  # more takes minutes: matrices of 268 MB, seconds


class Extra(NamedTuple):
    unlocks: str
    modules: tuple[str, ...]


# One entry per extra of pyproject.toml, by the names under which its packages are imported.
EXTRAS = {
    "serve": Extra("the HTTP server", ("fastapi", "uvicorn", "pydantic", "llguidance", "prometheus_client", "orjson")),
    "eval": Extra("tasks of lm-eval", ("lm_eval", "aiohttp", "tenacity", "transformers")),
    "scale": Extra("several replicas and KV events", ("ray", "msgspec", "zmq")),
    "rl": Extra("reinforcement learning tasks and actors", ("ray", "reasoning_gym", "math_verify", "jsonschema")),
    "data": Extra("Hugging Face datasets and large corpora", ("datasets", "datatrove")),
    "html": Extra("text out of web pages", ("trafilatura", "lxml_html_clean")),
    "compress": Extra("search for formats and architectures", ("scipy",)),
    "omni": Extra("images, sound and video", ("PIL", "av", "soundfile", "scipy")),
    "vlm": Extra("studies of other people's models", ("transformers", "py3langid", "num2words", "babel")),
    "climate": Extra("climate files and baselines", ("xarray", "netCDF4", "h5netcdf", "zarr", "dask", "sklearn")),
    "report": Extra("pictures in reports", ("matplotlib",)),
    "bench": Extra("comparison with peers", ("transformers", "llama_cpp", "gguf", "openai", "trl")),
    "dev": Extra("the tests and checks", ("pytest", "xdist", "pytest_timeout", "hypothesis", "transformers")),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    json: bool = setting(False, "print one JSON object instead of tables")
    size: int = setting(1024, "rows and columns of the matrices that are timed")
    seconds: float = setting(0.5, "how long each measurement may take")
    folder: str = setting(".", "where runs would be written, there already or not; its free space is shown")

    def __post_init__(self):
        if not 1 <= self.size <= LARGEST:
            raise UserError(f"size={self.size} of the matrices that are timed must lie between 1 and {LARGEST}")
        if not 0 < self.seconds <= LONGEST:
            raise UserError(f"seconds={self.seconds} of each measurement must lie above 0 and not above {LONGEST}")


def main(settings: Settings) -> None:
    facts = examine(settings)
    if settings.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


# ----- the facts -----------------------------------------------------------------------------------------------------


def examine(settings: Settings) -> dict:
    return {
        "versions": {"nautilus": nautilus.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine(Path(settings.folder)),
        "speed": speed(settings.size, settings.seconds),
        "extras": {name: missing(extra) for name, extra in EXTRAS.items()},
        "faster_paths": faster_paths(),
    }


def machine(folder: Path) -> dict:
    import torch

    text = read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    memory = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB$", read("/proc/meminfo"), re.MULTILINE))
    return {
        "system": platform.platform(),
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "features": [feature for feature in FEATURES if flags and feature in flags[1].split()],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_threads_from": threads_from(torch.get_num_threads()),
        "load_average": load_average(),
        "largest_cache_mb": largest_cache(text),
        "memory_gb": {kind: round(int(kilobytes) / 1e6, 1) for kind, kilobytes in memory.items()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "disk_free_gb": round(shutil.disk_usage(first_existing(folder)).free / 1e9, 1),
    }


def read(path: str) -> str:
    """The text of a file of the system; empty where the system has no such file."""
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""


def threads_from(threads: int) -> str | None:
    """The variable that set torch's number of threads, where it did; None where torch chose."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return f"OMP_NUM_THREADS={given}" if given.split(",")[0].strip() == str(threads) else None


def load_average() -> float | None:
    """How much wanted to run in the last minute, in cores; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 1)
    except OSError:
        return None


def largest_cache(cpuinfo: str) -> float | None:
    """In MB, of the first core; None where the system does not say."""
    sizes = [read(str(path)) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes += re.findall(r"^cache size\s*:\s*(\d+ KB)$", cpuinfo, re.MULTILINE)
    found = [int(size[0]) for text in sizes if (size := re.match(r"\d+", text))]
    return round(max(found) * 1024e-6, 1) if found else None


def busy(machine: dict) -> str:
    """A remark where others take the time of cores; empty where there is enough for all."""
    load, cores = machine["load_average"] or 0, machine["cores"]
    if load <= 1.5 * cores:
        return ""
    return f"load average {load} on {counted(cores, 'core')}: speeds measured now are too low"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def speed(size: int, seconds: float) -> dict[str, float | None]:
    """Matrix products in GFLOP/s, reading and copying of more than the caches hold in GB/s, the best of what fits into
    `seconds`. Reading is what bounds decoding; it is measured by a native kernel."""
    import torch

    from nautilus.ops.cpu.library import native
    from nautilus.ops.cpu.memory import read_speed, roomy

    generator = torch.Generator().manual_seed(0)
    a_XY, b_XY = (torch.randn(size, size, generator=generator) for _ in range(2))
    half_a_XY, half_b_XY = a_XY.bfloat16(), b_XY.bfloat16()
    source = roomy(1 << 28).fill_(1)
    read = None if native().functions is None else 1.0
    target = torch.ones_like(source)
    work = 2e-9 * size**3
    return {
        "matmul_float32_gflops": round(work / best(lambda: a_XY @ b_XY, seconds), 1),
        "matmul_bfloat16_gflops": round(work / best(lambda: half_a_XY @ half_b_XY, seconds), 1),
        "memory_read_gb_per_s": read and round(1e-9 * source.numel() / best(lambda: read_speed(source), seconds), 1),
        # A copy reads and writes each byte.
        "memory_gb_per_s": round(2e-9 * source.numel() / best(lambda: target.copy_(source), seconds), 1),
    }


def best(action: Callable, seconds: float) -> float:
    """The shortest of the repeats that fit into `seconds`, at least three, after one to warm up."""
    action()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def missing(extra: Extra) -> list[str]:
    return [module for module in extra.modules if importlib.util.find_spec(module) is None]


def faster_paths() -> dict[str, str]:
    """Each faster implementation and why it is off."""
    import torch

    from nautilus.ops.cpu.library import native

    forced = os.environ.get("NAUTILUS_OPS")
    gpu = "no Triton kernels in this version" if torch.cuda.is_available() else "no GPU that torch can use was found"
    return {
        "native CPU kernels": f"{'on' if native().functions else 'off'}: {native().reason}",
        "GPU kernels": f"off: {gpu}",
    } | ({"NAUTILUS_OPS": f"set to {forced!r}: only implementations of that name run"} if forced else {})


# ----- for people ----------------------------------------------------------------------------------------------------


def show(facts: dict) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, lines in sections(facts).items():
        table = Table(title, "", box=SIMPLE)
        for name, value in lines:
            table.add_row(name, value)
        console.print(table)
    if line := busy(facts["machine"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def sections(facts: dict) -> dict[str, list[tuple[str, str]]]:
    return {
        "versions": list(facts["versions"].items()),
        "machine": [
            (name.replace("_", " "), text_of(value))
            for name, value in facts["machine"].items()
            if value is not None or name == "gpu"
        ],
        "speed": [
            ("float32 matrix product", f"{facts['speed']['matmul_float32_gflops']:,.0f} GFLOP/s"),
            ("bfloat16 matrix product", f"{facts['speed']['matmul_bfloat16_gflops']:,.0f} GFLOP/s"),
            ("memory, reading", reading(facts["speed"]["memory_read_gb_per_s"])),
            ("memory, copying", f"{facts['speed']['memory_gb_per_s']:,.1f} GB/s"),
        ],
        "faster paths": list(facts["faster_paths"].items()),
        "extras": list(extra_lines(facts["extras"])),
    }


def reading(speed: float | None) -> str:
    return "not measured: that takes a native kernel" if speed is None else f"{speed:,.1f} GB/s, the bound of decoding"


def extra_lines(extras: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    for name, absent in extras.items():
        yield name, f"{EXTRAS[name].unlocks}: " + (f"lacks {', '.join(absent)}" if absent else "installed")
    if any(extras.values()):
        # Square brackets are rich's markup unless escaped.
        yield "install one", installing("NAME").replace("[", "\\[")


def text_of(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return (", ".join(value) or "none known") if isinstance(value, list) else str(value or "none")
