"""A released checkpoint at its full size: opened, and decoded from, with the memory that takes.

    python benchmarks/write_released.py nano nano_nvfp4 /some/folder       # 19.3 GB of random weights, in minutes
    python benchmarks/full_size.py /some/folder --record records/full_size.jsonl

Prints the time to open and to the first token, tokens a second, the share of the roofline (as `nautilus bench speed`
does) and memory: the peak until the first answers, and in the end what is anonymous and what is mapped from the files
and can be dropped at any time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPS = 16


def memory_gb(name: str) -> float:
    """VmHWM, RssAnon or RssFile of this process."""
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1e6 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    row = measure(asked.folder, asked.turns)
    for name, value in row.items():
        print(f"{name:28} {value}")
    if asked.record:
        with asked.record.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(folder: Path, turns: int) -> dict:
    from train_step import machine

    from nautilus.eval.speed import Meter, Work
    from nautilus.model.weights import load_model

    began = time.perf_counter()
    model = load_model(folder).requires_grad_(False).eval()
    opened = time.perf_counter() - began
    prompt, answer = Work(prompt=4), Work(prompt=16, steps=STEPS)
    meter = Meter(model, [prompt, answer])
    with meter.ready(prompt):
        first = time.perf_counter() - began
        peak = memory_gb("VmHWM")  # measuring the bandwidth takes memory of its own
    with meter.ready(answer) as ready:
        timings, read = [ready.turn() for _ in range(turns)], ready.bytes
    return {
        "command": " ".join(["python", "benchmarks/full_size.py", "FOLDER", *sys.argv[2:]]),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "files_gb": round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 2),
        "opened_seconds": round(opened, 1),
        "first_token_seconds": round(first, 1),
        "gb_read_per_token": round(read / 1e9, 3),
        "tokens_per_second": [round(turn.tokens_per_s, 2) for turn in timings],
        "bandwidth_gb_per_s": [round((turn.bandwidth or 0) / 1e9, 1) for turn in timings],
        "share_of_roofline": round(statistics.median(turn.share or 0 for turn in timings), 3),
        "peak_gb": round(peak, 2),
        "anonymous_gb": round(memory_gb("RssAnon"), 2),
        "mapped_gb": round(memory_gb("RssFile"), 2),
    }


if __name__ == "__main__":
    main()
