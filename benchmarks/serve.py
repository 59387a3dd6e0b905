"""Serving speed over HTTP against llama.cpp's server: same shapes, bits, threads, requests and client, side by side.

    python benchmarks/serve.py --shape nano                     # chat, agent and decoding at 1, 4 and 16 users
    python benchmarks/serve.py --shape toy --work chat decode
    python benchmarks/serve.py --shape nano --turns             # what later turns of long conversations wait for

Users send one request after another; a request asks for so many tokens after a prompt of random tokens that nothing is
known of. Contestants take turns, each alone on the machine while the others' processes are stopped (SIGSTOP). Told are
tokens answered per second of all users together, and how long first tokens took. `--record FILE` appends the rows.
Needs what `benchmarks/peers/llama_cpp.py` needs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import llama_cpp  # noqa: E402
from train_step import config as toy_config  # noqa: E402
from train_step import machine  # noqa: E402

WORKS = {"chat": (512, 128), "agent": (4096, 256), "decode": (16, 128)}  # tokens in and out
USERS = (1, 4, 16)
REQUESTS = 2  # of each user in a turn
PATIENCE = 600  # seconds until a server answers


class NotReady(RuntimeError):
    """The server is there and reads its model."""


@dataclass(frozen=True)
class Answered:
    """Of one request: tokens, and the seconds to the first and to the last of them."""

    tokens: int
    first: float
    last: float


async def ask(port: int, prompt: list[int], tokens: int, **more) -> Answered:
    """A completion as it comes, over a connection of its own; as little work for the client as can be."""
    body = {
        "model": "bench", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    data = json.dumps(body | more).encode()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    first = last = 0.0
    answer = b""
    while line := await reader.readline():
        answer += line
        if line.startswith(b"data: {") and b'"choices":[{' in line.replace(b" ", b""):
            last = time.perf_counter() - begin
            first = first or last
    writer.close()
    if b" 503 " in answer.split(b"\r\n", 1)[0]:
        raise NotReady(answer[:500])
    if b"200" not in answer.split(b"\r\n", 1)[0] or not first:
        raise RuntimeError(f"the server on port {port} answered {answer[:500]!r}")
    return Answered(tokens, first, last)


async def work(port: int, users: int, requests: int, size: tuple[int, int], draw: random.Random, vocab: int) -> dict:
    """All users at once, each with one request after another."""
    prompts = [[[draw.randrange(300, vocab) for _ in range(size[0])] for _ in range(requests)] for _ in range(users)]

    async def user(mine: list[list[int]]) -> list[Answered]:
        return [await ask(port, prompt, size[1]) for prompt in mine]

    begin = time.perf_counter()
    answered = [one for found in await asyncio.gather(*map(user, prompts)) for one in found]
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_s": sum(one.tokens for one in answered) / seconds,
        "first_token_s": statistics.median(one.first for one in answered),
        "between_tokens_ms": 1e3 * statistics.median((one.last - one.first) / (one.tokens - 1) for one in answered),
    }


class Server:
    """A process that answers on loopback, stopped while others are measured."""

    def __init__(self, name: str, command: list, port: int, log: Path):
        self.name, self.port = name, port
        self.file = log.open("w")
        self.process = subprocess.Popen([str(word) for word in command], stdout=self.file, stderr=subprocess.STDOUT)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                asyncio.run(ask(port, [300, 301], 2))
                break
            except (OSError, NotReady):
                if self.process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{name} did not start; see {log}") from None
                time.sleep(0.2)
        self.stop()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.terminate()
        self.process.wait()
        self.file.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def contestants(shape: str, format: str, users: int, longest: int, folder: Path) -> list[Server]:
    port, other = free_port(), free_port()
    ours = [sys.executable, __file__, "--ours", shape, "--format", format, "--port", port, "--users", users]
    gguf = llama_cpp.model_file(shape, "Q4_0") if shape != "toy" else folder / "toy.gguf"
    if not gguf.is_file():
        llama_cpp.write_gguf(gguf, toy_config(), "Q4_0")
    tools = llama_cpp.build()
    theirs = [tools.server, "-m", gguf, "--port", other, "-t", 2, "-tb", 2, "-np", users, "-c", users * longest]
    return [
        Server("ours", [*ours, "--longest", longest], port, folder / "ours.log"),
        Server("llama.cpp", [*theirs, "--cache-ram", 0], other, folder / "llama.log"),
    ]


def serve_ours(shape: str, format: str, port: int, users: int, longest: int) -> None:
    """The server of `nautilus serve` on random weights."""
    import torch

    from nautilus.data.tokenizer import train_tokenizer
    from nautilus.eval.random_model import random_model
    from nautilus.recipes.serve import Settings, api_module, serve
    from nautilus.runtime import keep_memory
    from nautilus.serve import Engine

    keep_memory()
    torch.set_num_threads(2)
    config = toy_config() if shape == "toy" else llama_cpp.shape(shape)
    model = random_model(dataclasses.replace(config, positions=1 << 20), format)
    texts = [file.read_text(errors="replace") for file in sorted(Path(os.__file__).parent.glob("*.py"))]
    tokenizer = train_tokenizer(texts, vocab=config.vocab)
    engine = Engine(model, tokenizer, max_tokens=longest, rows=users, step_seconds=0.25, saved_gb=1)
    with api_module("server").bound("127.0.0.1", port) as listening:
        settings = Settings(name="bench", rows=users)
        asyncio.run(serve(engine, settings, api_module("keys").Keys(), listening))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["toy", "nano", "super"], default="nano")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--users", type=int, nargs="*", default=USERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--folder", type=Path, default=llama_cpp.CACHE)
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--longest", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        return serve_ours(options.ours, options.format, options.port, options.users[0], options.longest)
    print(machine())
    longest = max(sum(WORKS[name]) for name in options.work) + 64
    servers = contestants(options.shape, options.format, max(options.users), longest, options.folder)
    rows = []
    try:
        for name in options.work:
            for users in options.users:
                rows.append(compare(servers, name, users, options.repeats, toy_config().vocab))
    finally:
        for server in servers:
            server.close()
    if options.record:
        record = {
            "command": f"python benchmarks/serve.py --shape {options.shape}", "machine": machine(),
            "date": str(datetime.date.today()), "shape": options.shape, "rows": rows,
        }  # fmt: skip
        with options.record.open("a") as file:
            file.write(json.dumps(record) + "\n")


def compare(servers: list[Server], name: str, users: int, repeats: int, vocab: int) -> dict:
    """Turn by turn; ratios of the same turn."""
    draw, turns = random.Random(0), []
    for _ in range(repeats):
        turn = []
        for server in servers:
            server.go_on()
            turn.append(asyncio.run(work(server.port, users, REQUESTS, WORKS[name], draw, vocab)))
            server.stop()
        turns.append(turn)
    row: dict = {"work": name, "users": users}
    for index, server in enumerate(servers):
        for key in turns[0][0]:
            row[f"{server.name} {key}"] = round(statistics.median(turn[index][key] for turn in turns), 3)
    ratios = sorted(turn[0]["tokens_per_s"] / turn[1]["tokens_per_s"] for turn in turns)
    row["times_as_fast"] = [round(ratios[0], 2), round(statistics.median(ratios), 2), round(ratios[-1], 2)]
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
