"""Generation speed against llama.cpp and `transformers`, on slices of Nano and Super in their full width, side by side.

    python benchmarks/decode.py                       # nano slice, about 15 minutes on two cores; prints the table
    python benchmarks/decode.py --shape super

All linear matrices are in NVFP4; llama.cpp runs files of the same shapes in Q4_0, NVFP4 or its other 4-bit types (those
after the first take part in plain decoding only), `transformers` in bf16. Every contestant has random weights, a
process of its own, and takes turns with the others. The roofline is the time to read what a step needs (weights of the
experts that were chosen, states, keys and values) at the memory bandwidth that is measured in the same turn. `--record
FILE` appends the rows to a file. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPS = 48
# Of each piece of work: tokens before the clock starts, or read if there are no steps; sequences; steps.
WORK = {
    "decode": (16, 1, STEPS),
    "decode at 8K": (8192, 1, STEPS),
    "8 sequences": (16, 8, STEPS),
    "prefill 512": (512, 1, 0),
    "prefill 4096": (4096, 1, 0),
}
EXPERTS = "eager"  # of transformers; its "grouped_mm" and "batched_mm" are no faster here


# ----- one contestant, in its own process ----------------------------------------------------------------------------


class Ours:
    """The slice with every linear matrix in NVFP4, random."""

    def __init__(self, shape: str):
        from peers.llama_cpp import shape as slice_of

        from nautilus.eval.random_model import random_model
        from nautilus.eval.speed import Meter, Work

        self.work = {
            name: Work(prompt=prompt, sequences=rows, steps=steps) for name, (prompt, rows, steps) in WORK.items()
        }
        self.meter = Meter(random_model(slice_of(shape), "nvfp4"), [*self.work.values()])

    def run(self, work: str) -> dict:
        with self.meter.ready(self.work[work]) as ready:
            turn = ready.turn()
            return {
                "tokens_per_second": turn.tokens_per_s,
                "bytes": ready.bytes,
                "bandwidth": turn.bandwidth,
                "share": turn.share,
            }


class Peer:
    """`transformers` on the same slice, in bf16."""

    def __init__(self, shape: str):
        import torch
        from peers.llama_cpp import shape as slice_of
        from transformers import NemotronHConfig, NemotronHForCausalLM

        from nautilus.config.released import write_config

        document = write_config(slice_of(shape))
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            self.model = NemotronHForCausalLM(NemotronHConfig(**document))
        self.model.to_empty(device="cpu").eval()
        self.model.set_experts_implementation(EXPERTS)
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            flat = tensor.data.view(-1)
            part = torch.randn(min(flat.numel(), 1 << 20)).mul_(0.02).to(flat.dtype)
            for low in range(0, flat.numel(), part.numel()):
                flat[low : low + part.numel()] = part[: flat.numel() - low]
            if "norm" in name:
                flat.fill_(1)

    def run(self, work: str) -> dict:
        import torch

        context, rows, steps = WORK[work]
        with torch.inference_mode():
            if not steps:
                tokens = torch.randint(16384, (1, context))
                return {"tokens_per_second": context / timed(lambda: self.model(tokens, logits_to_keep=1))}
            state = self.model(torch.randint(16384, (rows, context)), use_cache=True, logits_to_keep=1).past_key_values

            def decode():
                cache = state
                for _ in range(steps // 4):
                    cache = self.model(
                        torch.randint(16384, (rows, 1)), past_key_values=cache, use_cache=True
                    ).past_key_values

            return {"tokens_per_second": rows * (steps // 4) / timed(decode)}


def timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def worker(who: str, shape: str) -> None:
    import torch

    torch.set_num_threads(2)
    from nautilus.runtime import keep_memory

    keep_memory()
    contestant = {"ours": Ours, "peer": Peer}[who](shape)
    print("ready", flush=True)
    for line in sys.stdin:
        work = line.strip()
        if work != "decode at 8K":
            contestant.run(work)  # to warm up, as the tools of llama.cpp do
        print(json.dumps(contestant.run(work)), flush=True)


# ----- turns ---------------------------------------------------------------------------------------------------------


class Turn:
    """A contestant that answers one piece of work at a time."""

    def __init__(self, who: str, shape: str):
        command = [sys.executable, __file__, "--worker", who, "--shape", shape]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"the contestant {who} did not start")

    def ask(self, work: str) -> dict | None:
        """None: it died of this work, as one does that needs more memory than there is."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(work + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None


def llama(tools, gguf: Path, work: str) -> float:
    from peers import llama_cpp

    one = {"threads": 2, "repeats": 1}  # flash attention makes long work no faster here
    match work:
        case "decode":
            return llama_cpp.decode(tools, gguf, tokens=STEPS, **one).best
        case "decode at 8K":
            return llama_cpp.decode(tools, gguf, tokens=STEPS, context=8192, flash=("off",), **one).best
        case "8 sequences":
            return llama_cpp.batched(tools, gguf, tokens=STEPS, **one).best
    return llama_cpp.prefill(tools, gguf, tokens=int(work.split()[1]), flash=("off",), **one).best


def main() -> None:
    from peers.gguf_file import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("nano", "super"), default="nano")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=["Q4_0", "NVFP4"], help="of llama.cpp")
    parser.add_argument("--work", nargs="*", choices=WORK, default=[*WORK])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.shape)
        return
    rows = compete(asked)
    if asked.record:
        record(asked, rows)


def compete(asked) -> dict[str, dict[str, list]]:
    from peers import llama_cpp

    tools = llama_cpp.build() if asked.formats else None
    files = {name: llama_cpp.model_file(asked.shape, name) for name in asked.formats}
    workers = {"ours": Turn("ours", asked.shape)}
    if not asked.no_peer:
        workers["transformers"] = Turn("peer", asked.shape)
    rows: dict[str, dict[str, list]] = {}
    for work in asked.work:
        row = rows.setdefault(work, {})
        for turn in range(asked.turns):
            for name, contestant in list(workers.items()):
                if name == "transformers" and work == "decode at 8K":
                    continue  # reading the 8,192 tokens takes it 17 GB
                answer = contestant.ask(work)
                if answer is None:
                    print(f"{name} died of {work} and is out: status {workers.pop(name).process.wait()}", flush=True)
                    row.pop(name, None)
                    continue
                row.setdefault(name, []).append(answer["tokens_per_second"])
                if answer.get("share"):
                    row.setdefault("roofline", []).append(answer["share"])
                    row.setdefault("megabytes", []).append(answer["bytes"] / 1e6)
                    row.setdefault("GB/s", []).append(answer["bandwidth"] / 1e9)
            # Only the first format takes part in all: reading 8,192 tokens takes the others minutes.
            for name, file in list(files.items())[: None if work == "decode" else 1]:
                row.setdefault(f"llama.cpp {name}", []).append(llama(tools, file, work))
            print(f"{work}: turn {turn + 1} of {asked.turns}", file=sys.stderr, flush=True)
        show({work: row})
    return rows


def show(rows: dict[str, dict[str, list]]) -> None:
    for work, row in rows.items():
        ours = row["ours"]
        print(f"\n{work}: ours {statistics.median(ours):.1f} tokens/s ({min(ours):.1f}-{max(ours):.1f})")
        if "roofline" in row:
            print(
                f"  {100 * statistics.median(row['roofline']):.0f} % of the roofline "
                f"({statistics.median(row['megabytes']):.1f} MB a step at {statistics.median(row['GB/s']):.1f} GB/s)"
            )
        for name, speeds in row.items():
            if name in ("ours", "roofline", "megabytes", "GB/s"):
                continue
            ratios = [a / b for a, b in zip(ours, speeds, strict=True)]
            print(
                f"  {statistics.median(ratios):.2f} times {name} ({min(ratios):.2f}-{max(ratios):.2f}), "
                f"{statistics.median(speeds):.1f} tokens/s"
            )


def record(asked, rows: dict) -> None:
    from train_step import machine

    words = [word for word, before in zip(sys.argv[1:], sys.argv, strict=False) if "--record" not in (word, before)]
    row = {
        "command": shlex.join(["python", "benchmarks/decode.py", *words]),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    with asked.record.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
