"""What a pass that verifies m tokens costs, C(m), on slices of Nano and Super in full width, beside a model of it.

    python benchmarks/verification.py nano super        # minutes; prints a table of each

Passes over 1 to 64 tokens of one request take turns after a prompt, again and again; a ratio is the median of those to
the plain step of the same turn. The model reads every weight once, of experts those that one of the tokens takes where
each chooses for itself, and computes with so many operations a second:

    C(m) = max(bytes(m) / bandwidth, 2 m active / peak),   bytes(m) = dense + routed (1 - (1 - active / experts)^m)

The bandwidth is measured in each turn; the peak is that of the longest pass, so it is the shape between that says
something. Told too: what a token drafted by a block for multi-token prediction costs, with the whole vocabulary of a
slice and with a quarter of it, as 32,768 words are of a real one. `--record FILE` appends the rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from costs import Bytes, Device, flops, parts, sizes_of  # noqa: E402
from peers.llama_cpp import PATTERNS  # noqa: E402
from peers.llama_cpp import shape as slice_of  # noqa: E402
from recorded import append  # noqa: E402
from train_step import machine  # noqa: E402

from nautilus.config import Config, lay  # noqa: E402
from nautilus.eval.random_model import random_model  # noqa: E402
from nautilus.eval.speed import PASSES, READ  # noqa: E402
from nautilus.model.language import Language  # noqa: E402
from nautilus.ops.cpu.memory import read_speed, roomy  # noqa: E402
from nautilus.serve import Engine  # noqa: E402
from nautilus.serve.draft.costs import Costs  # noqa: E402
from nautilus.serve.draft.settings import Drafts  # noqa: E402

SIZES = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64)
# Of all of Nano at 4.5 bits, 43 GB/s and 400 G operations a second, as the model has it.
WHOLE = {2: 1.39, 3: 1.75, 4: 2.11, 5: 2.44, 8: 3.35, 16: 5.81, 32: 11.6, 64: 23.2}
STORED = Bytes(weight=4.5 / 8, kv=2.0)
QUARTER = 4  # of the vocabulary, one in so many words may be drafted
TIMES = 7  # that a block is timed


def timings(engine: Engine, prompt: int, rounds: int) -> tuple[dict[int, list[float]], list[float]]:
    """Seconds of each size, and bytes a second that were read, turn by turn."""
    draw, vocab = torch.Generator().manual_seed(0), engine.model.config.vocab
    tokens = lambda count: torch.randint(vocab, (count,), generator=draw).tolist()
    berth, memory = engine.berths.take(prompt + SIZES[-1]), roomy(READ).fill_(1)
    assert berth is not None
    engine.forward.read(tokens(prompt), berth, last=True)
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    bandwidth = []
    for turn in range(2 + rounds):  # the first computes, the second records
        for size in SIZES:
            some, begin = tokens(size), time.perf_counter()
            if size == 1:
                engine.forward.step([berth], some)
            else:
                engine.forward.attempt([berth], [some])
                engine.forward.accept([berth], [0])
            seconds, berth.length = time.perf_counter() - begin, prompt
            found[size] += [seconds] if turn > 1 else []
        bandwidth += [max(read_speed(memory) for _ in range(PASSES))] if turn > 1 else []
    engine.berths.give_back(berth)
    return found, bandwidth


def modelled(config: Config, prompt: int, bandwidth: float, longest: float) -> dict[int, float]:
    """Seconds by the model; `longest`: those of the longest pass, which say what the machine computes."""
    sizes = sizes_of(config)
    device = Device(memory=0, bandwidth=bandwidth, peak=flops(sizes, SIZES[-1], prompt) / longest)
    seconds = {}
    for size in SIZES:
        of = parts(sizes, STORED, size, prompt)
        once = parts(sizes, STORED, 1, prompt)
        read = of["weights"] + once["states"] + once["keys and values"]  # a request's own are read once
        seconds[size] = max(read / device.bandwidth, flops(sizes, size, prompt) / device.peak)
    return seconds


def drafted(model: Language, words: int) -> float:
    """Seconds of a token of a block."""
    drafts = Drafts(most=4, words=words)
    engine = Engine(model, None, max_tokens=256, rows=1, drafts=drafts)  # type: ignore[arg-type]
    assert engine.speculation and engine.speculation.chain
    berth, found = engine.berths.take(64), []
    assert berth is not None
    for _ in range(TIMES):
        costs = Costs()
        engine.speculation.chain.measure(costs, berth, 4)
        found.append((costs.of(4) or 0.0) / 4)
    return statistics.median(found)


def told(shape: str, prompt: int, rounds: int) -> dict:
    config = slice_of(shape)
    config = replace(config, mtp=lay("*E", *config.layers))
    model = random_model(config, "nvfp4", mtp=True)
    engine = Engine(model, None, max_tokens=prompt + SIZES[-1], rows=1, drafts=Drafts(most=SIZES[-1] - 1, mtp=False))  # type: ignore[arg-type]
    found, bandwidth = timings(engine, prompt, rounds)
    ratios = {size: ratio_of(found[size], found[1]) for size in SIZES}
    plain = statistics.median(found[1])
    model_of = modelled(
        replace(config, mtp=()), prompt, statistics.median(bandwidth), statistics.median(found[SIZES[-1]])
    )
    print(f"\n{shape}: a plain step {1e3 * plain:.2f} ms, {statistics.median(bandwidth) / 1e9:.0f} GB/s\n")
    print("| tokens | C(m) ms | C(m) / C(1) | quarters | model | all of Nano, model |")
    print("|--|--|--|--|--|--|")
    for size in SIZES:
        middle, low, high = ratios[size]
        print(
            f"| {size} | {1e3 * statistics.median(found[size]):.2f} | {middle:.2f} | {low:.2f}–{high:.2f} | "
            f"{model_of[size] / model_of[1]:.2f} | {WHOLE.get(size, '')} |"
        )
    del engine
    tokens = {name: drafted(model, config.vocab // part) / plain for name, part in (("all", 1), ("quarter", QUARTER))}
    told_of = ", ".join(f"{name} words {part:.3f}" for name, part in tokens.items())
    print(f"\na drafted token, plain step = 1: {told_of}")
    return {
        "shape": shape, "prompt": prompt, "step_ms": round(1e3 * plain, 4), "drafted": tokens,
        "bandwidth_gb": round(statistics.median(bandwidth) / 1e9, 1),
        "ratios": {str(size): [round(value, 4) for value in ratios[size]] for size in SIZES},
        "model": {str(size): round(model_of[size] / model_of[1], 4) for size in SIZES},
    }  # fmt: skip


def ratio_of(mine: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Median and quarters of the ratios turn by turn."""
    low, middle, high = statistics.quantiles([one / other for one, other in zip(mine, others, strict=True)], n=4)
    return middle, low, high


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=PATTERNS)
    parser.add_argument("--prompt", type=int, default=512, help="tokens before the pass")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args(words)
    print(machine())
    rows = [told(shape, asked.prompt, asked.rounds) for shape in asked.shapes]
    append(asked.record, "verification.py", words, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
