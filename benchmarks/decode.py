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
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

WORK = ("decode", "decode at 8K", "8 sequences", "prefill 512", "prefill 4096")
STEPS = 48
EXPERTS = "eager"  # of transformers; its "grouped_mm" and "batched_mm" are no faster here


# ----- one contestant, in its own process ----------------------------------------------------------------------------


class Ours:
    """The slice with every linear matrix in NVFP4, random."""

    def __init__(self, shape: str):
        import torch

        from nautilus.serve import Engine

        self.model = slice_in_nvfp4(shape)

        class NoTokenizer:
            stop = ()

        self.engine = Engine(self.model, NoTokenizer(), max_tokens=8192 + 512, rows=8)  # type: ignore[arg-type]
        self.draw = torch.Generator().manual_seed(0)
        self.chosen: list[int] = []

    def tokens(self, count: int) -> list[int]:
        import torch

        return torch.randint(self.model.config.vocab, (count,), generator=self.draw).tolist()

    def run(self, work: str) -> dict:
        kind, _, length = work.partition(" ")
        if kind == "prefill":
            berth = self.engine.berths.take(int(length))
            seconds = timed(lambda: self.engine.prefill(self.tokens(int(length)), berth))
            self.engine.berths.give_back(berth)
            return {"tokens_per_second": int(length) / seconds}
        rows, context = (8, 16) if kind == "8" else (1, 8192 if "8K" in work else 16)
        active = []
        for _ in range(rows):
            berth = self.engine.berths.take(context + STEPS + 8)
            self.engine.prefill(self.tokens(context), berth)
            active.append((Fed(self), berth))
        for _ in range(3):  # computed, recorded, replayed
            self.engine.step(active)
        seconds = timed(lambda: [self.engine.step(active) for _ in range(STEPS)])
        read = bytes_of_step(self.engine, active, context)
        for _, berth in active:
            self.engine.berths.give_back(berth)
        return {"tokens_per_second": rows * STEPS / seconds, "bytes": read, "seconds": seconds / STEPS}


class Fed:
    """A request that is fed random tokens, so that a step chooses other experts than the one before."""

    def __init__(self, ours: Ours):
        self.ours = ours

    @property
    def tokens(self) -> list[int]:
        return self.ours.tokens(1)


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

        kind, _, length = work.partition(" ")
        with torch.inference_mode():
            if kind == "prefill":
                tokens = torch.randint(16384, (1, int(length)))
                return {"tokens_per_second": int(length) / timed(lambda: self.model(tokens, logits_to_keep=1))}
            rows, context = (8, 16) if kind == "8" else (1, 8192 if "8K" in work else 16)
            state = self.model(torch.randint(16384, (rows, context)), use_cache=True, logits_to_keep=1).past_key_values

            def steps():
                cache = state
                for _ in range(STEPS // 4):
                    cache = self.model(
                        torch.randint(16384, (rows, 1)), past_key_values=cache, use_cache=True
                    ).past_key_values

            return {"tokens_per_second": rows * (STEPS // 4) / timed(steps)}


def timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def slice_in_nvfp4(shape: str):
    import torch
    from peers.llama_cpp import shape as slice_of

    from nautilus.model.language import Language
    from nautilus.model.linear import Linear
    from nautilus.model.moe import ExpertWeights

    model = Language(slice_of(shape), dtype=torch.bfloat16, device="meta")
    for module in model.modules():
        if isinstance(module, Linear):
            module.hold(random_nvfp4(*module.weight.shape))
        elif isinstance(module, ExpertWeights):
            for name in ("up_proj", "down_proj"):
                count, *matrix = getattr(module, name).shape
                module.hold(name, tuple(random_nvfp4(*matrix) for _ in range(count)), (None,) * count)
    model.to_empty(device="cpu").requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.fill_(1) if "norm" in name else tensor.normal_().mul_(0.02)
    return model.eval()


def random_nvfp4(rows: int, columns: int):
    """Scales around 2^-1: numbers with a standard deviation of about 0.02."""
    import torch

    from nautilus.ops.formats import Packed

    codes = torch.empty(rows, columns // 2, dtype=torch.uint8).random_()
    scale = torch.empty(rows, columns // 16, dtype=torch.uint8).random_(44, 53).view(torch.float8_e4m3fn)
    return Packed(format="nvfp4", shape=(rows, columns), codes=codes, scale=scale, tensor_scale=torch.tensor(0.01))


def bytes_of_step(engine, active, context: int) -> int:
    """What a step must read, and write of the states: matrices once, those of experts where a row chose them."""
    from nautilus.model.lanes import MambaSlots
    from nautilus.ops.cpu.quant import Repacked

    model, total = engine.model, 0
    experts = {
        id(m) for mixer in model.experts_mixers().values() for m in (mixer.experts.up_proj, mixer.experts.down_proj)
    }
    share = chosen_share(engine, active)
    for matrix, packed in engine.packs.values():
        if isinstance(packed, Repacked):
            size = packed.codes.numel() + packed.scale.numel() * packed.scale.element_size()
            total += int(size * share) if id(matrix) in experts else size
        elif packed is not None:
            total += packed.numel()
    for layer in engine.berths.layers:
        if layer is None:
            continue
        if isinstance(layer, MambaSlots):
            total += 2 * len(active) * (layer.ssm_SHNP[0].numel() * 4 + layer.tail_SRC[0].numel() * 2)
        else:
            total += len(active) * context * (layer.keys[0].numel() + layer.values[0].numel()) // 16
    return total


def chosen_share(engine, active) -> float:
    """Distinct experts of a step over all, counted in a few steps that are computed rather than replayed."""
    from nautilus.model import moe

    plain, counts = moe.route, []

    def counted(logits, *args, **named):
        found = plain(logits, *args, **named)
        counts.append(found[0].unique().numel() / logits.shape[1])
        return found

    moe.route = counted
    step = engine.steps[len(active)]
    tape, step.tape, step.may_record = step.tape, None, False
    for _ in range(3):
        engine.step(active)
    moe.route, step.tape, step.may_record = plain, tape, True
    return statistics.mean(counts)


def bandwidth() -> float:
    """Bytes a second that two threads read, at best of some passes over 512 MB."""
    from nautilus.ops.cpu.memory import read_speed, roomy

    memory = roomy(1 << 29).fill_(1)
    return max(read_speed(memory) for _ in range(7))


def worker(who: str, shape: str) -> None:
    import torch

    torch.set_num_threads(2)
    from nautilus.runtime import keep_memory

    keep_memory()
    contestant = {"ours": Ours, "peer": Peer}[who](shape)
    print("ready", flush=True)
    for line in sys.stdin:
        work = line.strip()
        if work not in ("bandwidth", "decode at 8K"):
            contestant.run(work)  # to warm up, as the tools of llama.cpp do
        print(json.dumps({"bandwidth": bandwidth()} if work == "bandwidth" else contestant.run(work)), flush=True)


# ----- turns ---------------------------------------------------------------------------------------------------------


class Turn:
    """A contestant that answers one piece of work at a time."""

    def __init__(self, who: str, shape: str):
        command = [sys.executable, __file__, "--worker", who, "--shape", shape]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"the contestant {who} did not start")

    def ask(self, work: str) -> dict:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("nano", "super"), default="nano")
    parser.add_argument("--formats", nargs="*", default=["Q4_0", "NVFP4"], help="of llama.cpp")
    parser.add_argument("--work", nargs="*", default=WORK)
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
            speed = workers["ours"].ask("bandwidth")["bandwidth"]
            for name, contestant in workers.items():
                if name == "transformers" and work == "decode at 8K":
                    continue  # reading the 8,192 tokens takes it 17 GB
                answer = contestant.ask(work)
                row.setdefault(name, []).append(answer["tokens_per_second"])
                if "bytes" in answer:
                    row.setdefault("roofline", []).append(answer["bytes"] / speed / answer["seconds"])
                    row.setdefault("megabytes", []).append(answer["bytes"] / 1e6)
                    row.setdefault("GB/s", []).append(speed / 1e9)
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

    row = {
        "command": " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    with asked.record.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
