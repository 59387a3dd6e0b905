"""Our speculation beside llama.cpp's: one trained model, both servers, the same prompts, and what each gains by it.

    python benchmarks/speculate_peer.py runs/speculation/hybrid/model --hvd runs/speculation/hybrid/hvd

The model's folder becomes a file of llama.cpp by llama.cpp's own converter, in float32 as ours, with its prediction
block. Each side answers greedily without drafts and with every way to draft that it has; servers take turns, the others
stopped. An answer must be the same as that of its own side without drafts; that both sides answer alike is told. No
prompt comes twice, or drafts would be copied from its own answer.

| arm of llama.cpp | drafts |
|--|--|
| ngram-simple | what followed the latest place of the last 12 tokens, 48 tokens |
| ngram-mod | tokens that followed hashed runs of 24 tokens, 48 to 64 tokens |
| ngram-mod 8 | the same after runs of 8 tokens, from one token on |
| draft-mtp | three tokens of the prediction block |
| ngram-mod,draft-mtp | the first that has any: its fixed precedence |

Told are speed-ups over plain with 95 % intervals, and our gain by theirs. `--record FILE` appends the rows.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import llama_cpp, servers  # noqa: E402
from peers.gguf_export import exported  # noqa: E402
from peers.servers import COUNTED, Server  # noqa: E402
from recorded import append  # noqa: E402
from rich.console import Console  # noqa: E402
from train_step import machine  # noqa: E402

import nautilus  # noqa: E402
from nautilus.eval import speculation_report as report  # noqa: E402
from nautilus.eval.families import FAMILIES, Prompt  # noqa: E402
from nautilus.eval.made import prompts  # noqa: E402
from nautilus.eval.speculation import Answered, bootstrap  # noqa: E402

OURS, THEIRS, SHORT = "ours", "llama.cpp", 12
SHORTER = ["--spec-ngram-mod-n-match", 8, "--spec-ngram-mod-n-min", 1]
THEIR_ARMS: dict[str, list] = {
    "plain": [],
    "ngram-simple": ["--spec-type", "ngram-simple"],
    "ngram-mod": ["--spec-type", "ngram-mod"],
    "ngram-mod 8": ["--spec-type", "ngram-mod", *SHORTER],
    "draft-mtp": ["--spec-type", "draft-mtp"],
    "ngram-mod,draft-mtp": ["--spec-type", "ngram-mod,draft-mtp", *SHORTER],
}


def contestants(asked: argparse.Namespace, mtp: bool) -> dict[tuple[str, str], Server]:
    """By side and arm, all stopped."""
    found: dict[tuple[str, str], Server] = {}
    own = asked.model / "model"
    gguf = exported(own if own.is_dir() else asked.model, asked.folder / "model-f32.gguf")
    ours = [Path(sys.executable).with_name("nautilus"), "serve", asked.model, "port=PORT", "max_tokens=4096", "rows=1"]
    ours += ["name=bench", "template=nemotron"]  # a template for the first sign of life alone, which is a chat
    predictor = [f"predictor={asked.hvd / 'payoff.safetensors'}"] if asked.hvd else []
    for name, more in {"plain": [], "ours": [f"drafts={asked.drafts}", *predictor]}.items():
        log = asked.folder / f"{OURS}-{name}.log"
        found[OURS, name] = Server(OURS, [*ours, *more], log, OMP_NUM_THREADS=str(asked.threads))
        found[OURS, name].stop()
    threads = ["-t", asked.threads, "-tb", asked.threads]
    theirs = [llama_cpp.build().server, "-m", gguf, "--port", "PORT", "-np", 1, "-c", 4096, *threads, "--cache-ram", 0]
    for name, more in THEIR_ARMS.items():
        if mtp or "mtp" not in name:
            found[THEIRS, name] = Server(THEIRS, [*theirs, *more], asked.folder / f"{THEIRS}-{name}.log")
            found[THEIRS, name].stop()
    return found


def answer(server: Server, tokens: Sequence[int], most: int) -> servers.Answered:
    """After a short one that does not count: what a server has in the caches is gone when it has stood still."""
    server.go_on()
    body = {"prompt": [*tokens], "max_tokens": most, "temperature": 0, **COUNTED}
    try:
        asyncio.run(servers.ask(server.port, "completions", body | {"prompt": [*tokens[:8]], "max_tokens": SHORT}))
        return asyncio.run(servers.ask(server.port, "completions", body))
    finally:
        server.stop()


def compared(asked: argparse.Namespace, all_of: Mapping[tuple[str, str], Server], tokenizer) -> tuple[list, list]:
    """The answers, and whether both sides gave the same one without drafts."""
    rows, alike = [], []
    questions = [one for family in asked.families for one in prompts(family, asked.each, seed=asked.seed)]
    for server in all_of.values():  # prepares itself
        answer(server, tokenizer.encode("Once upon a time"), 32)
    for number, one in enumerate(questions):
        tokens = tokenizer.core.encode("").ids + tokenizer.encode(one.prompt)
        names = [*all_of]
        turn = number % len(names)
        found = {name: answer(all_of[name], tokens, asked.answer) for name in (*names[turn:], *names[:turn])}
        alike.append(found[OURS, "plain"].text == found[THEIRS, "plain"].text)
        rows += [row for name, told in found.items() if (row := row_of(one, name, told, found[name[0], "plain"].text))]
        print(f"\r{number + 1} of {len(questions)}", end="", file=sys.stderr, flush=True)
    return rows, alike


def row_of(one: Prompt, name: tuple[str, str], told: servers.Answered, right: str) -> Answered | None:
    """None for an answer of a token, whose speed is not known."""
    if told.tokens < 2 or told.last <= told.first:
        return None
    return Answered(
        target=name[0], family=one.family, set=one.set, prompt=one.id, arm=name[1], tokens=told.tokens - 1,
        seconds=told.last - told.first, cycles=(), same=told.text == right,
    )  # fmt: skip


def gains(rows: Sequence[Answered]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By an arm of theirs and a family: our gain by its gain, with its interval."""
    rates = {(one.target, one.arm, one.key): math.log(one.rate) for one in rows if one.same}
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for arm in [*dict.fromkeys(one.arm for one in rows if one.target == THEIRS and one.arm != "plain")]:
        for family in (*dict.fromkeys(one.family for one in rows), "all"):
            logs = []
            for key in dict.fromkeys(one.key for one in rows if family in (one.family, "all")):
                four = [(OURS, "ours", key), (OURS, "plain", key), (THEIRS, arm, key), (THEIRS, "plain", key)]
                if all(name in rates for name in four):
                    mine, my_plain, other, other_plain = (rates[name] for name in four)
                    logs.append(mine - my_plain - (other - other_plain))
            found.setdefault(arm, {})[family] = tuple(bootstrap(logs))
    return found


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run or a checkpoint folder")
    parser.add_argument("--hvd", type=Path, help="folder of the predictor")
    parser.add_argument("--folder", type=Path, default=Path("runs/speculate_peer"), help="of the file and the logs")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--each", type=int, default=10, help="prompts of a family")
    parser.add_argument("--answer", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--drafts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2, help="of the prompts")
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = nautilus.load(asked.model)
    all_of = contestants(asked, mtp=bool(model.config.mtp))
    del model
    try:
        rows, alike = compared(asked, all_of, tokenizer)
    finally:
        for server in all_of.values():
            server.close()
    print(f"\n{machine()}\nboth sides gave the same plain answer: {sum(alike)} of {len(alike)}")
    console = Console(soft_wrap=True, highlight=False, width=160)
    for table in report.summary(report.gather(rows, title="", about="", command="")):
        console.print(table)
    found = gains(rows)
    print("our gain by that of llama.cpp's arm:")
    for arm, by_family in found.items():
        told = ", ".join(
            f"{family} {mean:.2f} ({low:.2f}–{high:.2f})" for family, (mean, low, high) in by_family.items()
        )
        print(f"  {arm}: {told}")
    numbers = [
        {"side": each.target, "arm": each.arm, "family": each.family, "prompts": each.prompts, "same": each.same,
         "tokens_per_s": round(each.tokens_per_s, 1), "speed_up": [round(value, 4) for value in each.speed_up]}
        for each in report.gather(rows, title="", about="", command="").numbers
    ]  # fmt: skip
    alike_of = f"{sum(alike)} of {len(alike)}"
    append(asked.record, "speculate_peer.py", words, numbers, alike=alike_of, gains=found)


if __name__ == "__main__":
    main(sys.argv[1:])
