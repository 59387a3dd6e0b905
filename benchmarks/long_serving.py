"""Very long prompts in the engine: memory of each user next to the formula, and how fast they are read and answered.

    python benchmarks/long_serving.py toy_1m 65536 262144 1048448          # a million tokens, a quarter of an hour
    python benchmarks/long_serving.py nano 262112 users=2 fill=random      # the slice of Nano, its pages filled at once

The formula: for each token the keys and values of all attention layers, in whole pages of 16 tokens, and once for each
user the states of all Mamba layers. Measured is what of the process becomes resident with the last of the users: what
is computed with lies there already for those before. With fill=random pages are taken and filled with
random numbers and no prompt is read: what a token costs then is measured, not how long reading would take.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPS = 32
PIECE = 4096


def resident() -> int:
    """Bytes of this process that lie in memory and are its own, after what is free has gone back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # where there is no such function nothing is given back
        ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["RssAnon"].split()[0])


def formula(config, tokens: int, itemsize: int) -> int:
    from nautilus.config import Mamba
    from nautilus.model.lanes import bytes_per_token
    from nautilus.serve.memory import PAGE, pages_for

    mamba = [layer for layer in config.layers if isinstance(layer, Mamba)]
    states = sum(4 * layer.inner * layer.state + itemsize * layer.conv_width * (layer.taps - 1) for layer in mamba)
    return states + int(pages_for(tokens) * PAGE * bytes_per_token(config, itemsize))


def fill(engine, berth, tokens: int, draw: torch.Generator) -> None:
    """Random keys and values in the berth's pages, as if it had read so many tokens."""
    from nautilus.ops.pages import write_pages
    from nautilus.serve.memory import point

    lanes = engine.berths.lanes(1)
    for berth.length in range(0, tokens, PIECE):
        count = min(PIECE, tokens - berth.length)
        point(lanes, [berth], [count])
        for pool in engine.berths.pools():
            k_NGP, v_NGP = torch.randn(2, count, pool.keys.shape[1], pool.width, generator=draw).bfloat16()
            write_pages(pool, lanes.rows, k_NGP, v_NGP)
    berth.length = tokens


def read(engine, berth, tokens: list[int]) -> None:
    berth.length = 0
    for low in range(0, len(tokens), engine.chunk):
        engine.forward.read(tokens[low : low + engine.chunk], berth, last=low + engine.chunk >= len(tokens))


def one(engine, tokens: int, users: int, random: bool) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(engine.model.config.vocab, (tokens,), generator=draw).tolist()
    berths, grown, seconds = [], [], []
    for _ in range(users):
        before, begin = resident(), time.perf_counter()
        berth = engine.berths.take(tokens + STEPS)
        if berth is None:
            raise SystemExit(f"no room for {users} users of {tokens:,} tokens; give fewer")
        fill(engine, berth, tokens, draw) if random else read(engine, berth, prompt)
        grown.append(resident() - before)
        seconds.append(time.perf_counter() - begin)
        berths.append(berth)
    times = []
    for step in range(STEPS):
        begin = time.perf_counter()
        engine.forward.step(berths, [step % engine.model.config.vocab] * users)
        times.append(time.perf_counter() - begin)
    for berth in berths:
        engine.berths.give_back(berth)
    step = statistics.median(times[3:])
    return {"grown": grown[-1], "seconds": seconds[-1], "step": step, "rate": users / step}


def main(words: list[str]) -> None:
    from peers.llama_cpp import shape as slice_of

    from nautilus.eval.random_model import random_model
    from nautilus.presets import preset
    from nautilus.serve import Engine

    settings = {"users": "2", "fill": "read", "format": "", **dict(word.split("=") for word in words if "=" in word)}
    name, *lengths = [word for word in words if "=" not in word]
    config = preset(name) if name.startswith("toy") else slice_of(name)
    model = random_model(config, settings["format"] or ("bf16" if name.startswith("toy") else "nvfp4"))
    users, random = int(settings["users"]), settings["fill"] == "random"
    print(f"{name}, {users} users, {'pages filled' if random else 'prompts read'}\n")
    print("| tokens | MB a user | formula | reading s | tokens/s read | step ms | tokens/s answered |")
    print("|--|--|--|--|--|--|--|", flush=True)
    for length in map(int, lengths):
        engine = Engine(model, None, max_tokens=length + STEPS, rows=users + 1, cache_gb=1e6)  # type: ignore[arg-type]
        read(engine, warm := engine.berths.take(4096), [1] * 4096)  # packs matrices, touches scratch
        engine.berths.give_back(warm)
        found = one(engine, length, users, random)
        rate = "–" if random else f"{length / found['seconds']:,.0f}"
        print(
            f"| {length:,} | {found['grown'] / 1e6:,.1f} | {formula(config, length + STEPS, 2) / 1e6:,.1f} | "
            f"{'–' if random else format(found['seconds'], '.1f')} | {rate} | "
            f"{found['step'] * 1e3:.2f} | {found['rate']:,.1f} |",
            flush=True,
        )
        del engine


if __name__ == "__main__":
    main(sys.argv[1:])
