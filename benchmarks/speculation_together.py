"""Several requests at once, of all families, with and without drafts: what speculation brings under mixed traffic.

    python benchmarks/speculation_together.py runs/speculation/hybrid            # a target of speculation.py
    python benchmarks/speculation_together.py runs/speculation/* --rows 4 8

Prompts of all families, shuffled, are answered greedily by two engines of one model that run so many together: one with
drafts, by the predictor of the target, one without. They take turns; what drafts are copied from begins anew in each.
Timed is all of it, prompts included. An answer that is not the same ends the program. Told is the speed-up of each
turn, and their mean with a 95 % interval. `--record FILE` appends the rows.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recorded import append  # noqa: E402

import nautilus  # noqa: E402
from nautilus.eval.arms import Arm  # noqa: E402
from nautilus.eval.families import FAMILIES  # noqa: E402
from nautilus.eval.made import prompts  # noqa: E402
from nautilus.eval.speculation import bootstrap  # noqa: E402
from nautilus.serve import Engine, Sampling  # noqa: E402
from nautilus.serve.asking import answered  # noqa: E402
from nautilus.serve.draft.features import Spelling  # noqa: E402
from nautilus.serve.draft.policy import Judge  # noqa: E402
from nautilus.serve.draft.predictor import load_predictor  # noqa: E402
from nautilus.serve.draft.settings import Drafts  # noqa: E402
from nautilus.serve.prefixes import fingerprint  # noqa: E402

MOST = 4096  # tokens of a prompt with its answer


def questions(asked: argparse.Namespace) -> list[str]:
    found = [one.text for family in FAMILIES for one in prompts(family, asked.each, seed=asked.seed)]
    random.Random(asked.seed).shuffle(found)
    return found


def turn(engine: Engine, texts: list[str], most: int) -> tuple[list[tuple[int, ...]], float]:
    """The answers, and tokens of them per second."""
    sampling = Sampling(temperature=0, max_tokens=most)
    requests = [(number, engine.request(engine.tokens(text), sampling)) for number, text in enumerate(texts)]
    begin = time.perf_counter()
    found = {number: request.completion().tokens for number, request in answered(engine, requests)}
    seconds = time.perf_counter() - begin
    return [found[number] for number in range(len(texts))], sum(map(len, found.values())) / seconds


def measured(folder: Path, rows: int, asked: argparse.Namespace) -> dict:
    model, tokenizer = nautilus.load(folder / "model")
    model.requires_grad_(False).eval()
    mine = {"target": fingerprint(model), "tokenizer": tokenizer.fingerprint}
    predictor = load_predictor(folder / "hvd" / "payoff.safetensors", **mine)
    engines = {
        name: Engine(model, tokenizer, max_tokens=MOST, rows=rows, drafts=drafts, saved_gb=0.0)
        for name, drafts in {"plain": 0, "ours": Drafts(most=asked.drafts)}.items()
    }
    base, judge = engines["ours"].speculation, Judge(predictor=predictor, spelling=Spelling(tokenizer))
    assert base
    texts, gains, rates = questions(asked), [], {"plain": [], "ours": []}
    for number in range(asked.repeats):
        engines["ours"].speculation = arm = Arm(base, judge=judge)
        order = [*engines] if number % 2 else [*engines][::-1]
        found = {name: turn(engines[name], texts, asked.answer) for name in order}
        if found["plain"][0] != found["ours"][0]:
            raise SystemExit(f"{folder.name}, {rows} at once: an answer with drafts is not the plain one")
        for name in engines:
            rates[name].append(found[name][1])
        gains.append(found["ours"][1] / found["plain"][1])
        counts = {source: [one.drafts, one.drafted, one.accepted] for source, one in arm.counts.items() if one.drafts}
        print(f"{folder.name}, {rows} at once: {gains[-1]:.3f} {counts}", flush=True)
    del engines, base, arm
    gc.collect()
    mean = {name: sum(each) / len(each) for name, each in rates.items()}
    return {
        "target": folder.name,
        "at_once": rows,
        "tokens_per_s": mean,
        "speed_up": gains,
        "interval": interval(gains),
    }


def interval(gains: list[float]) -> list[float]:
    return [round(value, 4) for value in bootstrap([math.log(gain) for gain in gains])]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", type=Path, help="folders with model and hvd")
    parser.add_argument("--rows", type=int, nargs="*", default=[4, 8], help="requests that run together")
    parser.add_argument("--each", type=int, default=8, help="prompts of a family")
    parser.add_argument("--answer", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--drafts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=3, help="of the prompts")
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args(words)
    rows = [measured(folder, count, asked) for folder in asked.targets for count in asked.rows]
    for row in rows:
        mean, low, high = row["interval"]
        print(f"{row['target']}, {row['at_once']} at once: {mean:.3f} ({low:.3f}-{high:.3f}) times plain")
    append(asked.record, "speculation_together.py", words, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
