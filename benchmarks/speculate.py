"""What drafts copied from known text bring, and what they cost where there is nothing to copy: side by side.

    python benchmarks/speculate.py nano       # the nano slice of `decode.py`; or toy

| text | what it stands for |
|---|---|
| new | answers in which nothing repeats |
| circles | greedy answers of random weights, which run into circles now and then |
| false | eight tokens in random order: what stood there before says nothing of what comes |
| again | an answer that was given before |

Each answer is 192 tokens; told are medians of ratios of neighbouring turns, and whether all answers were the same.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.servers import config_of  # noqa: E402
from train_step import machine  # noqa: E402

from nautilus.data.tokenizer import SMALLEST, train_tokenizer  # noqa: E402
from nautilus.eval.random_model import random_model  # noqa: E402
from nautilus.runtime import keep_memory  # noqa: E402
from nautilus.serve import Engine, Sampling  # noqa: E402

ANSWER, PROMPT, TURNS, DRAFTS = 192, 512, 12, 16
FEW = range(300, 308)


def speed(engine: Engine, prompt: list[int], sampling: Sampling, tenant: str) -> tuple[float, list[int]]:
    """Tokens per second after the first one, and all tokens."""
    request = engine.request(list(prompt), sampling, tenant=tenant)
    engine.submit(request)
    while not request.pieces:
        engine.step()
    begin, told = time.perf_counter(), len(request.pieces)
    while not request.finished:
        engine.step()
    return (len(request.pieces) - told) / (time.perf_counter() - begin), request.tokens


def questions(text: str, vocab: int, draw: random.Random) -> Iterator[tuple[list[int], Sampling, str]]:
    for turn in range(TURNS):
        how: dict = {"temperature": 1.0, "seed": turn}
        if text == "circles":
            how = {"temperature": 0.0}
        if text == "false":
            how["logit_bias"] = dict.fromkeys(FEW, 50.0)
        words = FEW if text == "false" else range(300, vocab)
        prompt = [draw.choice(words) for _ in range(PROMPT)]
        yield prompt, Sampling(max_tokens=ANSWER, ignore_eos=True, **how), f"{text} {turn}"


def main() -> None:
    shape = sys.argv[1] if len(sys.argv) > 1 else "nano"
    keep_memory()
    torch.set_num_threads(2)
    config = dataclasses.replace(config_of(shape), mtp=())
    model, tokenizer = random_model(config, "nvfp4" if shape == "nano" else "bf16"), train_tokenizer([], vocab=SMALLEST)
    model.requires_grad_(False)
    plain, copying = (Engine(model, tokenizer, max_tokens=1024, rows=2, drafts=drafts) for drafts in (0, DRAFTS))
    for engine in (plain, copying):  # prepares itself
        speed(engine, [1, 2, 3], Sampling(max_tokens=8, ignore_eos=True), "")
    print(f"{machine()}\nmicroseconds of a pass by its tokens: {costs(copying)}\n")
    print("| text | with / without drafts | without, tokens/s | accepted of drafted | same answers |\n|--|--|--|--|--|")
    for text in ("new", "circles", "false", "again"):
        print(compare(text, plain, copying, config.vocab), flush=True)


def costs(engine: Engine) -> dict[int, int]:
    assert engine.speculation
    return {size: round(1e6 * seconds) for size, seconds in sorted(engine.speculation.costs.seconds.items())}


def compare(text: str, plain: Engine, copying: Engine, vocab: int) -> str:
    assert copying.speculation
    counts, ratios, speeds, same = copying.speculation.counts["cache"], [], [], 0
    before = dataclasses.replace(counts)
    for turn, asked in enumerate(questions(text, vocab, random.Random(0))):
        if text == "again":
            speed(copying, *asked)
            before = dataclasses.replace(counts) if not turn else before
        order = (plain, copying) if turn % 2 else (copying, plain)
        found = {engine: speed(engine, *asked) for engine in order}
        ratios.append(found[copying][0] / found[plain][0])
        speeds.append(found[plain][0])
        same += found[copying][1] == found[plain][1]
    return (
        f"| {text} | {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) | "
        f"{statistics.median(speeds):.0f} | {counts.accepted - before.accepted} of {counts.drafted - before.drafted} | "
        f"{same} of {TURNS} |"
    )


if __name__ == "__main__":
    main()
