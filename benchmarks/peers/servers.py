"""Servers as contestants: ours, llama.cpp's and that of `transformers`, each a process that answers on loopback.

All speak OpenAI's API and read text by the same tokenizer. While one is measured the others are stopped (SIGSTOP).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nautilus.config import Config
from nautilus.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import llama_cpp  # noqa: E402
from train_step import config as toy_config  # noqa: E402

PATIENCE = 600  # seconds until a server answers
COUNTED = {"stream_options": {"include_usage": True}}
FORCE = 100  # added to the logits of some words: each of them is one token, whatever stands beside it


class NotReady(RuntimeError):
    """The server is there and reads its model."""


class Silent(RuntimeError):
    """It answers, with nothing."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Of one request: seconds to the first and to the last token, tokens of the answer and of the prompt, how many of
    these were not read again; None where the server does not say."""

    text: str
    thought: str
    first: float
    last: float
    tokens: int
    prompt: int
    cached: int | None


async def ask(port: int, path: str, body: dict) -> Answered:
    """An answer as it comes, over a connection of its own; as little work for the client as can be."""
    data = json.dumps({"model": "bench", "stream": True, **body}).encode()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    events, times, status = [], [], await reader.readline()
    said = status
    while line := await reader.readline():
        said = said if len(said) > 500 else said + line
        if line.startswith(b"data: {"):
            events.append(line[6:])
            times.append(time.perf_counter() - begin)
    writer.close()
    if b" 503 " in status:
        raise NotReady(said[:500])
    if b" 200 " not in status:
        raise RuntimeError(f"the server on port {port} answered {said[:700]!r}")
    return answered([json.loads(event) for event in events], times)


def answered(events: Sequence[dict], times: Sequence[float]) -> Answered:
    text = thought = ""
    when, usage, timings = [], {}, {}
    for event, at in zip(events, times, strict=True):
        usage, timings = event.get("usage") or usage, event.get("timings") or timings
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {"content": choice.get("text")}
            content, reasoned = delta.get("content") or "", delta.get("reasoning_content") or ""
            text, thought = text + content, thought + reasoned
            if content or reasoned or "text" in choice:
                when.append(at)
    if not when:
        raise Silent(f"an answer has no token: {events}")
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens", timings.get("cache_n"))
    return Answered(
        text=text, thought=thought, first=when[0], last=when[-1], tokens=usage.get("completion_tokens", len(when)),
        prompt=usage.get("prompt_tokens", 0), cached=cached,
    )  # fmt: skip


# ----- models, tokenizer and words that all share ---------------------------------------------------------------------


def config_of(shape: str) -> Config:
    return replace(toy_config() if shape == "toy" else llama_cpp.shape(shape), positions=1 << 20)


@functools.cache
def tokenizer_of(vocab: int, folder: Path = llama_cpp.CACHE) -> Tokenizer:
    """Trained on the source of Python's own library, once."""
    place = folder / f"tokenizer-{vocab}"
    if not place.is_dir():
        texts = [file.read_text(errors="replace") for file in sorted(Path(os.__file__).parent.glob("*.py"))]
        train_tokenizer(texts, vocab=vocab).save(place)
    return load_tokenizer(place)


@functools.cache
def words(vocab: int) -> list[str]:
    """Each a token with a blank before it, so that so many words are as many tokens."""
    tokenizer = tokenizer_of(vocab)
    found = [spelt.decode(errors="replace") for spelt in tokenizer.token_bytes]
    return [word for word in found if len(word) > 3 and word[0] == " " and word[1:].isascii() and word[1:].islower()]


def some(draw: random.Random, count: int, vocab: int) -> str:
    return "".join(draw.choices(words(vocab), k=count))


def biases(vocab: int, draw: random.Random) -> dict[str, float]:
    """With these an answer is words, too: a random model writes what no tokenizer would, and no later turn begins with
    that; a trained one does not. It is the client's work to make both servers answer alike here."""
    tokenizer = tokenizer_of(vocab)
    return {str(tokenizer.encode(word)[0]): FORCE for word in draw.sample(words(vocab), 40)}


# ----- contestants ---------------------------------------------------------------------------------------------------


class Server:
    """A process that answers, and that can be started again. model: what it calls its model; more: for its
    environment."""

    def __init__(self, name: str, command: Sequence, log: Path, model: str = "bench", **more: str):
        self.name, self.command, self.log = name, [str(word) for word in command], log
        self.model, self.more = model, more
        self.port = free_port()
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        command = [word.replace("PORT", str(self.port)) for word in self.command]
        with self.log.open("a") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | self.more)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                with contextlib.suppress(Silent):
                    asyncio.run(ask(self.port, "chat/completions", chat([said("user", "Hi")], 2, model=self.model)))
                return
            except (OSError, NotReady):
                if self.process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{self.name} did not start; see {self.log}") from None
                time.sleep(0.2)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.terminate()
        self.process.wait()


def said(role: str, content: str, **more: str) -> dict:
    return {"role": role, "content": content, **more}


def chat(messages: Sequence[dict], tokens: int, **more) -> dict:
    """The body of a request."""
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, **more}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ours(
    shape: str, format: str, *, users: int, longest: int, folder: Path, threads: int, saved_gb: float = 1,
    disk: bool = False,
) -> Server:  # fmt: skip
    """disk: what it knows of prompts goes into the folder, too, and outlasts it."""
    command = [sys.executable, Path(__file__).with_name("our_server.py"), shape, format, "PORT", users, longest]
    return Server("ours", [*command, saved_gb, folder if disk else "", threads], folder.with_suffix(".log"))


def llama(shape: str, *, users: int, longest: int, folder: Path, threads: int, caches: bool) -> Server:
    """caches: with all that spares it reading again. It has slots of its own for all users, context checkpoints at any
    distance (its default allows none closer than thousands of tokens), prompts kept in 8 GB of RAM, and a folder into
    which slots can be saved."""
    vocab = config_of(shape).vocab
    gguf = llama_cpp.model_file(shape, "Q4_0", tokenizer=tokenizer_of(vocab), config=config_of(shape))
    command = [llama_cpp.build().server, "-m", gguf, "--port", "PORT", "-np", users, "--jinja"]
    command += ["-c", users * longest, "-t", threads, "-tb", threads]
    if caches:
        folder.mkdir(parents=True, exist_ok=True)
        command += ["--ctx-checkpoints", 32, "--checkpoint-min-step", 0, "--cache-ram", 8192]
        command += ["--slot-save-path", folder]
    else:
        command += ["--cache-ram", 0]
    return Server("llama.cpp", command, folder.with_suffix(".log"))


def transformers(shape: str, folder: Path, threads: int) -> Server:
    """Its own command, in bf16, on weights that our exporter writes once."""
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("`transformers serve` needs accelerate; pip install 'nautilus[bench]'")
    place = folder.parent / f"{shape}-bf16"
    if not place.is_dir():
        from nautilus.eval.random_model import random_model

        config = config_of(shape)
        random_model(config, "bf16").save(place, tokenizer=tokenizer_of(config.vocab))
    command = [Path(sys.executable).with_name("transformers"), "serve", place, "--port", "PORT", "--device", "cpu"]
    command += ["--dtype", "bfloat16"]
    return Server("transformers", command, folder.with_suffix(".log"), str(place), OMP_NUM_THREADS=str(threads))


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
