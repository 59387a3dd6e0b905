"""Training on one long row on the CPU: bytes of memory per token, and tokens per second, forward and backward.

    python benchmarks/long_context.py 65536 262144 1048576 chunk=4096

Each length runs in a process of its own; its memory is the peak of that process less what it held before the row.
Bytes per token should not grow with the length; tokens per second falls by the share of attention, whose work is the
square of the length.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = (1 << 16, 1 << 18, 1 << 20)


def main(words: list[str]) -> None:
    settings = dict(word.split("=") for word in words if "=" in word)
    lengths = [int(word) for word in words if "=" not in word] or LENGTHS
    chunk, preset, compute = (settings.get(name, default) for name, default in DEFAULTS.items())
    print(f"{preset}, chunk={chunk}, {compute}\n")
    print("| tokens | bytes/token | peak GB | seconds | tokens/s | loss |\n|--|--|--|--|--|--|")
    for length in lengths:
        command = [sys.executable, __file__, "one", str(length), chunk, preset, compute]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"| {length:,} | {found['bytes'] / length:,.0f} | {found['peak'] / 1e9:.2f} | {found['seconds']:.1f} | "
            f"{length / found['seconds']:,.0f} | {found['loss']:.4f} |",
            flush=True,
        )


DEFAULTS = {"chunk": "4096", "preset": "toy_1m", "compute": "fp32"}


def peak() -> int:
    """Of this process. Where the system has no /proc, ru_maxrss, which may begin with what the parent had."""
    if (status := Path("/proc/self/status")).exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one(length: int, chunk: int, name: str, compute: str) -> None:
    import torch

    from nautilus.data.batch import Batch
    from nautilus.model.language import Language
    from nautilus.presets import preset
    from nautilus.train.objective import pretrain

    model = Language(preset(name)).initialise(0).train()
    model.chunk, model.compute = chunk, {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    tokens = torch.randint(model.config.vocab, (1, length), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, length)
    weights[:, 0] = 0
    objective = pretrain(aux_weight=1e-4)
    batch = objective.weigh(Batch(tokens, {"next_token": weights}))
    before, begin = peak(), time.perf_counter()
    terms, _ = objective.terms(model, batch)
    sum((total / count for total, count in terms.values()), torch.zeros(())).backward()
    seconds = time.perf_counter() - begin
    if not all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()):
        raise SystemExit(f"a gradient of the row of {length:,} tokens is missing or not finite")
    loss = (terms["next_token"][0] / terms["next_token"][1]).item()
    print(json.dumps({"bytes": peak() - before, "peak": peak(), "seconds": seconds, "loss": loss}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6])
    else:
        main(sys.argv[1:])
