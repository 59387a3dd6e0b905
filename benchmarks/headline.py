"""The published throughput ratios, on this machine: a hybrid against attention-only mixtures of experts of its size.

    python benchmarks/headline.py                        # Nano and Super slices and all cost models; see --help
    python benchmarks/headline.py --pairs nano --contexts 8192 16384 --users 1

Each model is served by our engine as slices in full width, of NVFP4 matrices and bf16 keys and values. A slice has one
layer of each kind; others have two more of one kind, so that the difference of two timings is that of two such layers.
From these the step of the whole model is added up: rest * vocabulary + sum of count * seconds of each kind. A slice
with two layers of each kind, which took no part in this, says how far that is to be believed (`check`).

Caches are not filled by reading prompts: sequences point at pages of random numbers, which a step reads all the same.

Beside this stand the reported ratios, and what sizes alone say of the reported set-up (`costs.py`), which is also all
there is of Ultra and of models with layers that our configs cannot spell. `--record FILE` appends the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from costs import Bytes, Device, Sizes, most_users, parts, sizes_of, tokens_per_second, user_bytes  # noqa: E402
from recorded import append  # noqa: E402
from train_step import machine  # noqa: E402

from nautilus.config import Attention, Config, Layer  # noqa: E402
from nautilus.presets import preset, shrink  # noqa: E402

VOCAB = 16384  # of a slice
OURS = Bytes(weight=4.5 / 8, kv=2)  # as slices are stored
FP8, MXFP4, NVFP4 = Bytes(weight=1, kv=1), Bytes(weight=4.25 / 8, kv=2), Bytes(weight=4.5 / 8, kv=1, state=2)
FP8_HALF = Bytes(weight=1, kv=1, state=2)  # states in fp16, rounded stochastically, as Super and Ultra are served
H200 = Device(memory=141e9, bandwidth=4.8e12, peak=1.98e15)
GB200 = Device(memory=186e9, bandwidth=8e12, peak=10e15)
# Gated DeltaNet in 36 of its 48 layers (64 heads of 128 x 128), 2 groups of 256 in the others; public sizes.
QWEN35 = Sizes(
    weights=122e9, active=10e9, routed=116e9, experts=256, chosen=8, kv=12 * 2 * 2 * 256, work=12 * 4 * 32 * 256,
    state=36 * 64 * 128 * 128,
)  # fmt: skip
# Latents of 512 + 64 in 78 layers, of which the 2,048 that an index of 128 numbers a token picks are read.
GLM51 = Sizes(
    weights=744e9, active=40e9, routed=725e9, experts=256, chosen=8, kv=78 * 128, near=78 * 576, window=2048,
    keeps_near=True, work=78 * 2 * 32 * 128, near_work=78 * 64 * 2 * (576 + 512),
)  # fmt: skip


def gpt_oss_120b() -> Config:
    """As GPT-OSS-20B, with 36 layers of 128 experts."""
    small = preset("gpt_oss_20b")
    experts = dataclasses.replace(small.layers[1], experts=128)
    return dataclasses.replace(small, layers=(small.layers[0], experts, small.layers[2], experts) * 18)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A hybrid, a peer, the reported ratio and its set-up: devices, formats, tokens in and out."""

    hybrid: str
    peer: str
    reported: float
    device: Device
    stored: tuple[Bytes, Bytes]
    prompt: int = 8192
    answer: int = 16384
    known: str = "one H200"


PAIRS = (
    Pair(hybrid="nano", peer="qwen3_30b_a3b", reported=3.3, device=H200, stored=(FP8, FP8)),
    Pair(hybrid="nano", peer="gpt_oss_20b", reported=2.2, device=H200, stored=(FP8, MXFP4)),
    Pair(
        hybrid="super",
        peer="gpt_oss_120b",
        reported=2.2,
        device=H200.times(8),
        stored=(FP8_HALF, MXFP4),
        known="hardware not told, taken as eight H200",
    ),
    Pair(
        hybrid="super",
        peer="qwen3.5_122b_a10b",
        reported=7.5,
        device=H200.times(8),
        stored=(FP8_HALF, FP8),
        known="hardware not told, taken as eight H200",
    ),
    Pair(
        hybrid="ultra",
        peer="glm_5.1",
        reported=5.9,
        device=GB200.times(8),
        stored=(NVFP4, NVFP4),
        answer=65536,
        known="GB200 in NVFP4, taken as eight",
    ),
)
MEASURED = "step_ms", "tokens_per_s", "slice_ms", "check"
NO_CONFIG = {"qwen3.5_122b_a10b": QWEN35, "glm_5.1": GLM51}


def config_of(name: str) -> Config:
    return gpt_oss_120b() if name == "gpt_oss_120b" else preset(name)


def sizes(name: str) -> Sizes:
    return NO_CONFIG[name] if name in NO_CONFIG else sizes_of(config_of(name))


# ----- slices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a step of so many users after so many tokens: of a layer of each kind, and of all else in a slice."""

    layers: dict[Layer, float]
    rest: float

    def step(self, layers: Counter[Layer], scale: float = 1.0) -> float:
        """Of a model with so many of them, whose vocabulary is `scale` times that of a slice."""
        return self.rest * scale + sum(count * self.layers[layer] for layer, count in layers.items())


def costs_of(one: float, more: dict[Layer, float]) -> Costs:
    """one: seconds of the slice with a layer of each kind; more: with two more of that kind."""
    layers = {layer: (seconds - one) / 2 for layer, seconds in more.items()}
    return Costs(layers=layers, rest=one - sum(layers.values()))


def kinds_of(config: Config) -> Counter[Layer]:
    """How many layers of each kind there are."""
    return Counter(config.layers)


def slice_of(config: Config, layers: list[Layer]) -> Config:
    return dataclasses.replace(config, layers=tuple(layers), mtp=(), vocab=min(VOCAB, config.vocab), positions=1 << 20)


def timed(config: Config, asked: argparse.Namespace, contexts: list[int]) -> dict[tuple[int, int], float]:
    """Seconds of a step by users and context."""
    from nautilus.eval.random_model import random_model
    from nautilus.eval.speed import Meter, Work

    works = [Work(prompt=context, sequences=users, steps=asked.steps) for users in asked.users for context in contexts]
    meter = Meter(random_model(config, asked.format), works)
    found = {}
    for work in works:
        with meter.ready(work, filled=True) as ready:
            turns = [ready.turn().tokens_per_s for _ in range(asked.repeats)]
        found[work.sequences, work.prompt] = work.sequences / statistics.median(turns)
    del meter, ready
    gc.collect()  # a model and its engine know each other: they stay until somebody looks, and several are too many
    return found


def measure(name: str, asked: argparse.Namespace) -> list[dict]:
    """Medians of several rounds: a slice is timed a minute after another one, and a machine that others use is faster
    or slower by half from one minute to the next."""
    rounds = [measure_once(name, asked) for _ in range(asked.rounds)]
    return [
        same[0] | {key: statistics.median(row[key] for row in same) for key in MEASURED}
        for same in zip(*rounds, strict=True)
    ]


def measure_once(name: str, asked: argparse.Namespace) -> list[dict]:
    """A row for each number of users and context: the whole model's step, and how well a slice was foretold."""
    config = shrink(config_of(name)) if asked.shrink else config_of(name)
    kinds, first = kinds_of(config), asked.contexts[0]
    one = timed(slice_of(config, [*kinds]), asked, asked.contexts)
    two = timed(slice_of(config, [*kinds] * 2), asked, asked.contexts)
    more = {}
    for kind in kinds:
        contexts = asked.contexts if isinstance(kind, Attention) and not kind.window else [first]
        more[kind] = timed(slice_of(config, [*kinds, kind, kind]), asked, contexts)
        print(f"# {name}: {kind.letter} measured", file=sys.stderr, flush=True)
    whole = sizes_of(config)
    rows = []
    for users in asked.users:
        flat = costs_of(one[users, first], {kind: found[users, first] for kind, found in more.items()})
        for context in asked.contexts:
            grown = {
                kind: found.get((users, context), one[users, context] + 2 * flat.layers[kind])
                for kind, found in more.items()
            }
            costs = costs_of(one[users, context], grown)
            step = costs.step(kinds, config.vocab / min(VOCAB, config.vocab))
            told = costs.step(Counter({kind: 2 for kind in kinds}))
            rows.append({
                "model": name, "users": users, "context": context, "step_ms": 1e3 * step,
                "tokens_per_s": users / step, "gb_per_user": user_bytes(kept_whole(whole), OURS, context) / 1e9,
                "slice_ms": 1e3 * one[users, context], "check": told / two[users, context],
                "bytes": parts(whole, OURS, users, context),
            })  # fmt: skip
    return rows


def kept_whole(found: Sizes) -> Sizes:
    """Our engine keeps the keys and values of layers with a window for all tokens."""
    return dataclasses.replace(found, keeps_near=True)


# ----- what is told --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", choices=["nano", "super"], default=["nano", "super"], help="measured")
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--users", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timings of a slice in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--shrink", action="store_true", help="toy twins, to try this program")
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    names = {name: None for pair in PAIRS if pair.hybrid in asked.pairs for name in (pair.hybrid, pair.peer)}
    measured = {name: measure(name, asked) for name in names if name not in NO_CONFIG}
    print(machine())
    show_models(measured)
    told = [tell(pair, measured) for pair in PAIRS]
    rows = [row for rows in measured.values() for row in rows]
    append(asked.record, "headline.py", sys.argv[1:], rows, pairs=told)


def show_models(measured: dict[str, list[dict]]) -> None:
    print("\n| model | users | context | ms between tokens | tokens/s | GB of a user | ms of the slice | check |")
    print("|--|--|--|--|--|--|--|--|")
    for row in (row for rows in measured.values() for row in rows):
        print(
            f"| {row['model']} | {row['users']} | {row['context']:,} | {row['step_ms']:.1f} | "
            f"{row['tokens_per_s']:.2f} | {row['gb_per_user']:.3f} | {row['slice_ms']:.2f} | {row['check']:.2f} |"
        )


def tell(pair: Pair, measured: dict[str, list[dict]]) -> dict:
    """The ratio here as the context grows, the one by sizes alone, the reported one, and why they differ."""
    print(f"\n{pair.hybrid} against {pair.peer}: {pair.reported} times reported ({pair.known})")
    rows = ratios(measured.get(pair.hybrid, []), measured.get(pair.peer, []))
    for row in rows:
        print(f"  here, {row['users']} users after {row['context']:,} tokens: {row['ratio']:.2f} times")
    both = [*zip([sizes(pair.hybrid), sizes(pair.peer)], pair.stored, strict=True)]
    users = [most_users(*one, pair.device, pair.prompt + pair.answer) for one in both]
    most, same = (by_sizes(pair, both, counts) for counts in (users, [min(users)] * 2))
    print(
        f"  by sizes alone, {pair.prompt:,} tokens in and {pair.answer:,} out: {most:.2f} times with as many users as"
        f" fit ({users[0]:,} and {users[1]:,}), {same:.2f} times with {min(users):,} on both"
    )
    why = [*reasons(pair, rows, both, users, (same, most))]
    print("".join(f"  {line}\n" for line in why), end="")
    return {
        "hybrid": pair.hybrid, "peer": pair.peer, "reported": pair.reported, "by_sizes": round(most, 2),
        "by_sizes_of_as_many_users": round(same, 2), "users": users, "here": rows, "why": why,
    }  # fmt: skip


def by_sizes(pair: Pair, both: list[tuple[Sizes, Bytes]], users: list[int]) -> float:
    speeds = [
        tokens_per_second(*one, pair.device, pair.prompt, pair.answer, count)
        for one, count in zip(both, users, strict=True)
    ]
    return speeds[0] / speeds[1]


def ratios(hybrid: list[dict], peer: list[dict]) -> list[dict]:
    return [
        {"users": a["users"], "context": a["context"], "ratio": round(a["tokens_per_s"] / b["tokens_per_s"], 2)}
        for a, b in zip(hybrid, peer, strict=False)
    ]


def reasons(
    pair: Pair, rows: list[dict], both: list[tuple[Sizes, Bytes]], users: list[int], bounds: tuple[float, float]
) -> Iterator[str]:
    """Why one ratio is not another: what share of a step's bytes grows with users and context."""
    context = pair.prompt + pair.answer // 2
    there = [growing(*one, count, context) for one, count in zip(both, users, strict=True)]
    yield (
        f"with as many users as fit, states, keys and values are {there[0]:.0%} of the bytes of {pair.hybrid}'s step"
        f" and {there[1]:.0%} of {pair.peer}'s"
    )
    if min(bounds) <= pair.reported <= max(bounds):
        yield "what is reported lies between the two: sizes explain it, depending on how many users the servers ran"
    else:
        yield (
            f"sizes explain {min(bounds):.1f} to {max(bounds):.1f} of the reported {pair.reported}; the rest is what"
            f" they do not know: kernels, traffic between devices, how long a step may take, which server ran the peer"
        )
    if rows:
        last = rows[-1]
        here = [growing(one, OURS, last["users"], last["context"]) for one, _ in both]
        yield (
            f"here {last['users']} users after {last['context']:,} tokens make them {here[0]:.0%} and {here[1]:.0%};"
            f" the rest is weights, and arithmetic, of which a CPU has little for each byte"
        )
    elif pair.peer in NO_CONFIG and pair.hybrid != "ultra":
        yield f"{pair.peer} has layers that our configs cannot spell, so nothing of it is measured here"


def growing(size: Sizes, stored: Bytes, users: int, context: int) -> float:
    found = parts(size, stored, users, context)
    return 1 - found["weights"] / sum(found.values())


if __name__ == "__main__":
    main()
