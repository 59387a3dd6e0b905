"""Serving speed over HTTP against other servers: same shapes, threads, requests and client, side by side.

    python benchmarks/serve.py --shape nano                     # chat, agent and decoding at 1, 4 and 16 users
    python benchmarks/serve.py --shape toy --work chat decode
    python benchmarks/serve.py --shape nano --peers transformers --work chat agent --users 1 --requests 1
    python benchmarks/serve.py --shape nano --turns             # what later turns of long conversations wait for

Users send one request after another; a request asks for so many tokens after a prompt that nothing is known of.
Contestants take turns, each alone on the machine while the others' processes are stopped (SIGSTOP). Told are tokens
answered per second of all users together, and how long first tokens took. `--record FILE` appends the rows.

llama.cpp runs a file of as many bits (Q4_0 beside our NVFP4). `transformers` runs `transformers serve` in bf16, the
format in which it computes on a CPU, and reads a chat of as many words as the others' prompts have tokens, as it takes
no tokens. `--turns` is told of in `turns.py`. Needs what `benchmarks/peers/llama_cpp.py` needs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import turns  # noqa: E402
from peers import llama_cpp, servers  # noqa: E402
from peers.servers import Server, chat, said  # noqa: E402
from recorded import append  # noqa: E402
from train_step import machine  # noqa: E402

WORKS = {"chat": (512, 128), "agent": (4096, 256), "decode": (16, 128)}  # tokens in and out
AWAKE = (512, 2)  # asked of a server that was stopped, before the clock starts: memory that lies idle can get slow
USERS = (1, 4, 16)


def request(server: Server, size: tuple[int, int], draw: random.Random, vocab: int) -> tuple[str, dict]:
    """A path and a body: so many tokens in and out, the same for all but `transformers`, which is given words."""
    if server.name == "transformers":
        messages = [said("user", servers.some(draw, size[0], vocab))]
        return "chat/completions", chat(messages, size[1], model=server.model)
    prompt = [draw.randrange(300, vocab) for _ in range(size[0])]
    fields = {"max_tokens": size[1], "temperature": 0, "ignore_eos": True}
    return "completions", {"prompt": prompt, **fields, **servers.COUNTED}


async def work(
    server: Server, users: int, requests: int, size: tuple[int, int], draw: random.Random, vocab: int
) -> dict:
    """All users at once, each with one request after another."""
    bodies = [[request(server, size, draw, vocab) for _ in range(requests)] for _ in range(users)]

    async def user(mine: list[tuple[str, dict]]) -> list[servers.Answered]:
        return [await servers.ask(server.port, *body) for body in mine]

    begin = time.perf_counter()
    answered = [one for found in await asyncio.gather(*map(user, bodies)) for one in found]
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_s": sum(one.tokens for one in answered) / seconds,
        "first_token_s": statistics.median(one.first for one in answered),
        "between_tokens_ms": statistics.median(
            1e3 * (one.last - one.first) / max(1, one.tokens - 1) for one in answered
        ),
    }


def contestants(asked: argparse.Namespace, longest: int) -> Iterator[Server]:
    users, folder, same = max(asked.users), asked.folder, {"threads": asked.threads}
    yield servers.ours(asked.shape, asked.format, users=users, longest=longest, folder=folder / "ours", **same)
    if "llama.cpp" in asked.peers:
        yield servers.llama(asked.shape, users=users, longest=longest, folder=folder / "llama", caches=False, **same)
    if "transformers" in asked.peers:
        yield servers.transformers(asked.shape, folder / "transformers", **same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["toy", "nano", "super"], default="nano")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--users", type=int, nargs="*", default=USERS)
    parser.add_argument("--requests", type=int, default=2, help="of each user in a turn")
    parser.add_argument("--size", type=int, nargs=2, help="tokens in and out, instead of those of the work")
    parser.add_argument("--peers", nargs="*", default=["llama.cpp"], choices=["llama.cpp", "transformers"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--folder", type=Path, default=llama_cpp.CACHE / "serving", help="of logs and saved states")
    parser.add_argument("--threads", type=int, default=2)
    turns.add_options(parser)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    rows = turns.compare(asked) if asked.turns else compare_works(asked)
    append(asked.record, "serve.py", sys.argv[1:], rows, shape=asked.shape)


def compare_works(asked: argparse.Namespace) -> list[dict]:
    longest = max(sum(asked.size or WORKS[name]) for name in asked.work) + 64
    found = []
    try:
        for server in contestants(asked, longest):
            found.append(server)
            server.stop()
        return [compare(found, name, users, asked) for name in asked.work for users in asked.users]
    finally:
        for server in found:
            server.close()


def compare(found: list[Server], name: str, users: int, asked: argparse.Namespace) -> dict:
    """Turn by turn; ratios of the same turn."""
    draw, rounds, vocab = random.Random(0), [], servers.config_of(asked.shape).vocab
    for _ in range(asked.repeats):
        turn = []
        for server in found:
            server.go_on()
            asyncio.run(work(server, 1, 1, AWAKE, draw, vocab))
            turn.append(asyncio.run(work(server, users, asked.requests, asked.size or WORKS[name], draw, vocab)))
            server.stop()
        rounds.append(turn)
    row: dict = {"work": name, "users": users}
    for index, server in enumerate(found):
        for key in rounds[0][0]:
            row[f"{server.name} {key}"] = round(statistics.median(turn[index][key] for turn in rounds), 3)
        if index:
            ratios = sorted(turn[0]["tokens_per_s"] / turn[index]["tokens_per_s"] for turn in rounds)
            row[f"times_as_fast_as_{server.name}"] = [
                round(value, 2) for value in (ratios[0], statistics.median(ratios), ratios[-1])
            ]
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
