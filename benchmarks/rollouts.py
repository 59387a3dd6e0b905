"""How fast answers are drawn for training, against `transformers.generate`: one model, the same prompts and lengths.

    python benchmarks/rollouts.py                      # minutes on two cores; prints the table

The model is the 16M hybrid of `train_step.py` with random weights, computed with in float32 and in bfloat16, by both.
Answers come in groups, as reinforcement compares them: `group` to each prompt; no prompt comes twice, as weights change
between two steps. Ours draws as `nautilus rlvr` does. Both sides draw at temperature 1, with log-probs of every drawn
token kept (ours always has them; the peer is asked for its logits, as a trainer must), the same number of tokens for
everybody, on the same threads, in turns. `best` is the faster precision of either side. `--record FILE` appends the
rows. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recorded import append  # noqa: E402
from train_step import VOCAB, config, machine  # noqa: E402

PROMPT, TOKENS, WARM = 32, 64, 8  # tokens
ASKED = ((1, 1), (8, 8), (32, 8), (32, 1))  # batch, group
EXPERTS = ("grouped_mm", "batched_mm", "eager")
PRECISIONS = ("float32", "bfloat16")


def prompts(batch: int, group: int, turn: int) -> list[list[int]]:
    asked = [[(1009 * turn + 97 * row + 31 * at) % 7000 + 20 for at in range(PROMPT)] for row in range(batch // group)]
    return [one for one in asked for _ in range(group)]


class Ours:
    def __init__(self, folder: Path, precision: str):
        import torch

        import nautilus
        from nautilus.posttrain.crew import SAVED
        from nautilus.serve import Engine

        model, words = nautilus.load(folder, dtype=getattr(torch, precision))
        model.requires_grad_(False).eval()
        self.engine = Engine(model, words, max_tokens=PROMPT + TOKENS + 1, rows=64, saved_gb=SAVED)

    def draw(self, given: list[list[int]], tokens: int) -> int:
        """Prompts that come several times are read once, for all of their answers."""
        from nautilus.serve import Sampling

        how = Sampling(temperature=1.0, max_tokens=tokens, ignore_eos=True)
        marks = [(len(one) - 1,) if given.count(one) > 1 else () for one in given]
        requests = [self.engine.request(one, how, marks=m, kept=False) for one, m in zip(given, marks, strict=True)]
        for request in requests:
            self.engine.submit(request)
        while not all(request.finished for request in requests):
            self.engine.step()
        return sum(len(request.completion().logprobs) for request in requests)


class Peer:
    def __init__(self, folder: Path, precision: str, experts: str):
        import torch
        from transformers import NemotronHForCausalLM

        self.torch = torch
        self.model = NemotronHForCausalLM.from_pretrained(
            folder, experts_implementation=experts, dtype=getattr(torch, precision)
        ).eval()

    def draw(self, prompts: list[list[int]], tokens: int) -> int:
        given = self.torch.tensor(prompts)
        with self.torch.no_grad():
            found = self.model.generate(
                given, attention_mask=self.torch.ones_like(given), do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=tokens, min_new_tokens=tokens, output_logits=True, return_dict_in_generate=True,
                pad_token_id=0,
            )  # fmt: skip
        logprobs = self.torch.stack(found.logits, 1).float().log_softmax(-1)
        drawn = found.sequences[:, PROMPT:]
        return int(logprobs.gather(-1, drawn[..., None]).numel())


def worker(who: str, folder: Path, precision: str, experts: str) -> None:
    """Answers `BATCH GROUP TOKENS` lines with the seconds that took."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    side = Ours(folder, precision) if who == "ours" else Peer(folder, precision, experts)
    for turn, line in enumerate(sys.stdin):
        batch, group, tokens = map(int, line.split())
        given = prompts(batch, group, turn)
        begin = time.perf_counter()
        count = side.draw(given, tokens)
        print(json.dumps({"seconds": time.perf_counter() - begin, "tokens": count}), flush=True)


class Side:
    def __init__(self, who: str, folder: Path, precision: str, experts: str = ""):
        command = [sys.executable, __file__, "--worker", who, "--folder", str(folder)]
        command += ["--precision", precision, "--experts", experts]
        self.name = f"{who} {experts}".strip()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def draw(self, batch: int, group: int, tokens: int = TOKENS) -> float:
        """Tokens per second."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{batch} {group} {tokens}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        found = json.loads(line)
        assert found["tokens"] == batch * tokens, found
        return found["tokens"] / found["seconds"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def fastest(folder: Path, precision: str, batch: int, group: int) -> str:
    """The peer's way to compute experts."""
    speed = {}
    for experts in EXPERTS:
        side = Side("peer", folder, precision, experts)
        side.draw(batch, group, WARM)
        speed[experts] = side.draw(batch, group, WARM)
        side.close()
    return max(speed, key=lambda name: speed[name])


def compared(folder: Path, batch: int, group: int, repeats: int) -> list[dict]:
    """All four sides in turns, and of each turn the ratios."""
    peers = {name: fastest(folder, name, batch, group) for name in PRECISIONS}
    sides = {("ours", name): Side("ours", folder, name) for name in PRECISIONS}
    sides |= {("peer", name): Side("peer", folder, name, peers[name]) for name in PRECISIONS}
    for side in sides.values():
        side.draw(batch, group)
    turns = [{key: side.draw(batch, group) for key, side in sides.items()} for _ in range(repeats)]
    for side in sides.values():
        side.close()
    for turn in turns:
        turn |= {(who, "best"): max(turn[who, name] for name in PRECISIONS) for who in ("ours", "peer")}
    rows = []
    for name in (*PRECISIONS, "best"):
        ratios = sorted(turn["ours", name] / turn["peer", name] for turn in turns)
        mine, theirs = (round(statistics.median(turn[who, name] for turn in turns), 1) for who in ("ours", "peer"))
        times = [round(value, 2) for value in (ratios[0], statistics.median(ratios), ratios[-1])]
        asked = {"precision": name, "batch": batch, "group": group, "prompt": PROMPT, "tokens": TOKENS}
        told = {"ours_tokens_per_s": mine, "peer_tokens_per_s": theirs, "times_as_fast": times}
        rows.append({**asked, "peer": peers.get(name, ""), **told})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path)
    for hidden in ("--worker", "--folder", "--precision", "--experts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.worker:
        return worker(asked.worker, Path(asked.folder), asked.precision, asked.experts)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        from nautilus.data.tokenizer import train_tokenizer
        from nautilus.model.language import Language

        folder, rows = Path(temporary) / "model", []
        texts = (path.read_text() for path in Path(argparse.__file__).parent.glob("*.py"))
        tokenizer = train_tokenizer(texts, vocab=VOCAB)
        Language(config()).initialise(0).save(folder, precision="fp32", tokenizer=tokenizer)
        for batch, group in ASKED:
            rows += compared(folder, batch, group, asked.repeats)
    append(asked.record, "rollouts.py", words, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
