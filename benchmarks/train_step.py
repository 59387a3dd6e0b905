"""Training speed against `transformers`' NemotronH: same model, weights, data, threads and precision, side by side.

    python benchmarks/train_step.py                    # about 8 minutes on two cores; prints the table
    python benchmarks/train_step.py --compile          # also tries the peer under torch.compile (minutes of compiling)

`ours` is the bare step that the peer makes, too; `recipe` is the step of `nautilus pretrain` with all that it does
beside (documents apart, balance, health, spikes), `recipe nvfp4` the same in simulated NVFP4. `ours_is_times_as_fast`
counts from `ours`, `recipe_is_times_as_fast` from `recipe`.

Each contestant lives in a process of its own that trains when told to; the contestants take turns, so that a change in
the machine's speed meets all of them. The peer competes twice, each time in its best mode of all the ways it offers to
compute experts: as it is installed, and with the allocator settings that ours makes for itself. `--record FILE` appends
the rows to a file. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, LENGTH, VOCAB = 8, 512, 8192
PEER_EXPERTS = ("grouped_mm", "batched_mm", "eager")
# What nautilus.runtime.keep_memory() sets, given to the peer's process from outside.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}


def config():
    """The 16M hybrid: Mamba-2, attention and LatentMoE layers."""
    from nautilus.config import Attention, Config, Experts, Mamba, lay

    mamba = Mamba(heads=8, head_width=64, state=64, groups=2)
    attention = Attention(heads=4, groups=2, head_width=64)
    experts = Experts(experts=32, active=4, hidden=256, shared=512, latent=128, scale=2.5)
    return Config(vocab=VOCAB, width=256, layers=lay("MEM*EMEM*E", mamba, attention, experts))


def flops_per_token(settings) -> float:
    """6 x the weights one token multiplies with (head included); the scan and attention scores are left out."""
    from nautilus.config import weight_count

    return 6.0 * weight_count(settings)["active"]


# ----- one contestant, in its own process ----------------------------------------------------------------------------


class Side:
    """A model, its optimiser, and what an update is."""

    def update(self, tokens) -> None:
        import torch

        self.loss(tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours(Side):
    def __init__(self, folder: Path, precision: str, mode: str):
        import torch

        from nautilus.model.weights import load_model
        from nautilus.runtime import keep_memory
        from nautilus.train.optim import OptimConfig, adamw

        keep_memory()
        self.model = load_model(folder / "model", dtype=torch.float32).train()
        self.model.compute = torch.bfloat16 if precision == "bf16" else torch.float32
        self.optimizer = adamw(self.model, OptimConfig(lr=1e-3))

    def loss(self, tokens):
        import torch

        from nautilus.ops.loss import weighted_nll

        hidden, _ = self.model.hidden(tokens)
        target = tokens[:, 1:].flatten()
        weight = torch.full(target.shape, 1 / len(target))
        return weighted_nll(hidden[:, :-1].flatten(0, 1), self.model.head_weight, target, weight)


class Recipe(Ours):
    """Ours as `nautilus pretrain` trains: documents that do not see each other, the balance loss and biases, health
    every ten steps, spikes watched for; mode nvfp4 also multiplies in simulated NVFP4, as the published recipe does."""

    def __init__(self, folder: Path, precision: str, mode: str):
        from nautilus.config import PrecisionTable
        from nautilus.data.corpus import sources
        from nautilus.data.prepare import prepare as prepare_text
        from nautilus.model.lower import lower
        from nautilus.train.guard import Guard, Watch
        from nautilus.train.loop import Job
        from nautilus.train.objective import pretrain
        from nautilus.train.ranks import ALONE

        super().__init__(folder, precision, mode)
        lower(self.model, PrecisionTable(format=mode or "bf16"), seed=0)
        found = prepare_text(sources(("python",)), folder / "data", vocab=VOCAB)
        self.stream = iter(found.stream(length=LENGTH, rows=ROWS, micro=ROWS, seed=0, reset=True))
        self.job = Job(
            model=self.model, objective=pretrain(aux_weight=1e-4), optimizer=self.optimizer, schedule=None, clip=1.0,
            balance=1e-3, health_every=10, peak_flops=0.0, ranks=ALONE, watch=Watch(Guard(rollbacks=1)),
        )  # fmt: skip
        self.done = 0

    def update(self, tokens) -> None:
        from nautilus.train.interrupt import Stop
        from nautilus.train.loop import train_step

        self.job.watch.add(train_step(self.job, self.done, self.done * ROWS * LENGTH, self.stream, Stop()))
        self.done += 1


class Peer(Side):
    def __init__(self, folder: Path, precision: str, mode: str):
        import torch
        from transformers import NemotronHForCausalLM

        experts, _, compiled = mode.partition("+")
        self.model = NemotronHForCausalLM.from_pretrained(
            folder / "model", experts_implementation=experts, dtype=torch.float32
        )
        self.model.train()
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.call = torch.compile(self.model) if compiled == "compile" else self.model

    def loss(self, tokens):
        with self.autocast:
            return self.call(input_ids=tokens, labels=tokens, use_cache=False).loss


def worker(who: str, folder: Path, precision: str, mode: str) -> None:
    """Serve `train n`, `evaluate` and `quit` from standard input; one JSON line each on standard output."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    contestant = {"ours": Ours, "recipe": Recipe, "peer": Peer}[who](folder, precision, mode)
    train, held_out = (torch.load(folder / f"{name}.pt") for name in ("train", "held_out"))
    done = 0
    for line in sys.stdin:
        order, _, count = line.strip().partition(" ")
        if order == "quit":
            return
        begin = time.perf_counter()
        for _ in range(int(count or 0)):
            contestant.update(train[(done * ROWS) % (len(train) - ROWS) :][:ROWS])
            done += 1
        answer = {"seconds": time.perf_counter() - begin, "steps": done, "memory_gb": peak_memory_gb()}
        if order == "evaluate":
            with torch.no_grad():
                answer["nats"] = statistics.mean(contestant.loss(rows).item() for rows in held_out.split(ROWS))
        print(json.dumps(answer), flush=True)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


# ----- the referee ---------------------------------------------------------------------------------------------------


class Contestant:
    def __init__(self, who: str, folder: Path, precision: str, mode: str = "", tuned: bool = False):
        self.name = f"{who} {mode}{' tuned' if tuned else ''}".strip()
        command = [sys.executable, __file__, "--worker", who, "--folder", str(folder), "--precision", precision]
        environment = os.environ | (TUNED if tuned else {})
        self.process = subprocess.Popen(
            [*command, "--mode", mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip

    def ask(self, order: str) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()} at {order!r}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("quit\n")
        self.process.stdin.close()
        self.process.wait()


def prepare(folder: Path) -> float:
    """Weights both sides start from, and rows of real text; returns bytes per token of the held-out rows."""
    import torch

    from nautilus.data.corpus import sources
    from nautilus.data.prepare import prepare as prepare_text
    from nautilus.model.language import Language

    Language(config()).initialise(0).save(folder / "model", precision="fp32")
    found = prepare_text(sources(("python",)), folder / "data", vocab=VOCAB)
    parts = {}
    for name, shard in found.shards["python"].items():
        tokens = torch.tensor(shard.rows(LENGTH).flat.astype("int64"))
        parts[name] = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    parts["held_out"] = parts["held_out"][:: max(1, len(parts["held_out"]) // 64)][:64]
    for name, rows in parts.items():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        torch.save(rows[order], folder / f"{name}.pt")
    length_of = [len(piece) for piece in found.tokenizer.token_bytes]
    return sum(length_of[token] for token in parts["held_out"].flatten().tolist()) / parts["held_out"].numel()


def best_modes(folder: Path, precision: str, experts: list[str], compiled: bool) -> list[tuple[str, bool]]:
    """The peer's fastest mode as it is installed, and its fastest with our allocator settings; best of three steps."""
    modes = [*experts, *(f"{mode}+compile" for mode in experts if compiled)]
    best, hopeless = [], set()
    for tuned in (False, True):
        speed = {}
        for mode in modes:
            if mode.partition("+")[0] in hopeless:
                continue
            contestant = Contestant("peer", folder, precision, mode, tuned)
            times = [contestant.ask("train 1")["seconds"]]
            if speed and "compile" not in mode and ROWS * LENGTH / times[0] < max(speed.values()) / 4:
                hopeless.add(mode)
            else:
                times += [contestant.ask("train 1")["seconds"] for _ in range(3)]
            contestant.close()
            speed[mode] = ROWS * LENGTH / min(times)
            print(f"  {contestant.name:24} {speed[mode]:8,.0f} tokens/s", flush=True)
        best.append((max(speed, key=lambda mode: speed[mode]), tuned))
    return best


def matmul_peak(precision: str) -> float:
    """Best of repeated 1024^3 matmuls on two threads, in FLOP/s."""
    import torch

    torch.set_num_threads(2)
    a, b = (torch.randn(1024, 1024, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(40):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def compare(folder: Path, precision: str, modes, repeats: int, seconds: float, bytes_per_token: float):
    """Steps in turns for speed, then training until each has had `seconds`, then held-out loss."""
    peak = matmul_peak(precision)
    all_of_them = [Contestant("ours", folder, precision), Contestant("recipe", folder, precision)]
    if precision == "bf16":
        all_of_them.append(Contestant("recipe", folder, precision, "nvfp4"))
    all_of_them += [Contestant("peer", folder, precision, mode, tuned) for mode, tuned in modes]
    for contestant in all_of_them:
        contestant.ask("train 2")
    times = [[contestant.ask("train 1")["seconds"] for contestant in all_of_them] for _ in range(repeats)]
    rows = []
    for contestant, taken in zip(all_of_them, zip(*times, strict=True), strict=True):
        spent = sum(taken)
        while spent < seconds:
            spent += contestant.ask("train 1")["seconds"]
        result = contestant.ask("evaluate")
        contestant.close()
        ratios, recipe = (sorted(turn[len(rows)] / turn[base] for turn in times) for base in (0, 1))
        flops = ROWS * LENGTH / statistics.median(taken) * flops_per_token(config())
        rows.append({
            "contestant": contestant.name, "tokens_per_s": round(ROWS * LENGTH / statistics.median(taken)),
            "ours_is_times_as_fast": [round(r, 2) for r in (ratios[0], statistics.median(ratios), ratios[-1])],
            "recipe_is_times_as_fast": [round(r, 2) for r in (recipe[0], statistics.median(recipe), recipe[-1])],
            "gflop_per_s": round(flops / 1e9), "share_of_matmul_peak": round(flops / peak, 3),
            "memory_gb": round(result["memory_gb"], 2), "steps": result["steps"],
            "bits_per_byte": round(result["nats"] / 0.6931471805599453 / bytes_per_token, 4),
        })  # fmt: skip
    return rows, {
        "precision": precision,
        "repeats": repeats,
        "seconds": seconds,
        "matmul_peak_gflop_per_s": round(peak / 1e9),
    }


def machine() -> str:
    from nautilus.ops.cpu.library import native

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    # What native kernels are compiled for: two machines of one model name may differ in it.
    level = native().level or "no native kernels"
    return f"{model}, {os.cpu_count()} cores, {level}, {platform.system()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="training time of each side before the held-out loss")
    parser.add_argument("--experts", nargs="*", default=PEER_EXPERTS, help="the peer's ways that are tried")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--record", type=Path, help="append the rows to this JSONL file")
    for hidden in ("--worker", "--folder", "--mode"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, Path(options.folder), options.precision[0], options.mode)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bytes_per_token = prepare(folder)
        for precision in options.precision:
            print(f"{precision}: the peer's modes")
            modes = best_modes(folder, precision, options.experts, options.compile)
            rows, verdict = compare(folder, precision, modes, options.repeats, options.seconds, bytes_per_token)
            for row in rows:
                print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
            print("  " + "  ".join(f"{key} {value}" for key, value in verdict.items()), flush=True)
            if options.record:
                with options.record.open("a") as file:
                    record = {
                        "command": "python benchmarks/train_step.py",
                        "machine": machine(),
                        "date": time.strftime("%F"),
                    }
                    file.write(json.dumps(record | verdict | {"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
