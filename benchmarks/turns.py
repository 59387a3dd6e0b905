"""What later turns of conversations wait for: how much is read again, and how long the first token takes.

    python benchmarks/serve.py --shape nano --turns

| scene | what is measured |
|---|---|
| later | turns after the first of a conversation that begins with 8K tokens |
| restart | the next turn after the server was ended and started again |
| many | 64 conversations of 1K tokens that take turns, from their second one on |
| edit | another message in the middle of a conversation of four long turns |
| back | that conversation goes on as if it had not been edited |
| branch | another end of the same conversation |
| shared | the first turn of users who begin with the same 4K tokens |

`again` is the tokens of a prompt that were read although the server had read or written them before: those of the
prompt, less those told as cached, less those of the new message. Chats are rendered by the template of this family with
its defaults: answers begin with reasoning, which is dropped from the history as soon as the user speaks again.
Each answer is words (by logit_bias), because no tokenizer writes what a random model does. Between turns the client
waits for `--pause` seconds, as a person or a tool would; ours reads ahead meanwhile.

llama.cpp is given what it has: a slot for every conversation, 32 context checkpoints a slot at any distance, 8 GB of
prompts in RAM; before its end its slot is saved and after its start restored, for which nobody is made to wait.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import statistics
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from peers import servers
from peers.servers import Server, chat, said


@dataclass(frozen=True, kw_only=True)
class Told:
    """Of one turn."""

    again: int
    first: float
    prompt: int


class Talk:
    """One conversation with a server."""

    def __init__(self, server: Server, asked: argparse.Namespace, draw: random.Random, system: str = ""):
        self.server, self.asked, self.draw = server, asked, draw
        self.vocab = servers.config_of(asked.shape).vocab
        self.biases = servers.biases(self.vocab, random.Random(0))
        self.messages = [said("system", system)] if system else []

    async def say(self, new: int) -> Told:
        """So many words from the user, and an answer."""
        self.messages.append(said("user", servers.some(self.draw, new, self.vocab)))
        body = chat(self.messages, self.asked.answer, logit_bias=self.biases, **servers.COUNTED)
        found = await servers.ask(self.server.port, "chat/completions", body)
        thought = {"reasoning_content": found.thought} if found.thought else {}
        self.messages.append(said("assistant", found.text, **thought))
        await asyncio.sleep(self.asked.pause)
        return Told(again=found.prompt - (found.cached or 0) - new, first=found.first, prompt=found.prompt)

    def until(self, turn: int) -> Talk:
        """A copy that ends before that turn."""
        other = copy.copy(self)
        other.messages = self.messages[: 2 * turn]
        return other


# ----- scenes: each gives what is measured of its turns, with the name of the row -------------------------------------

Turns = AsyncIterator[tuple[str, Told]]
Scene = Callable[[Server, argparse.Namespace, random.Random], Turns]


async def later(server: Server, asked: argparse.Namespace, draw: random.Random) -> Turns:
    talk = Talk(server, asked, draw)
    await talk.say(asked.long)
    for _ in range(3):
        yield "later", await talk.say(asked.new)


async def restart(server: Server, asked: argparse.Namespace, draw: random.Random) -> Turns:
    talk = Talk(server, asked, draw)
    await talk.say(asked.long)
    await talk.say(asked.new)
    await asyncio.sleep(5)  # idle time, in which ours writes its files
    if server.name == "llama.cpp":
        slot(server, "save")
    server.close()
    await asyncio.to_thread(server.start)
    if server.name == "llama.cpp":
        slot(server, "restore")
    yield "restart", await talk.say(asked.new)


def slot(server: Server, action: str) -> None:
    """Its only slot, to or from a file."""
    url = f"http://127.0.0.1:{server.port}/slots/0?action={action}"
    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, b'{"filename": "conversation"}', head)) as answer:
        answer.read()


async def many(server: Server, asked: argparse.Namespace, draw: random.Random) -> Turns:
    talks = [Talk(server, asked, draw) for _ in range(asked.conversations)]
    for talk in talks:
        await talk.say(asked.long // 8)
    for _ in range(2):
        for talk in talks:
            yield "many", await talk.say(asked.new)


async def edit(server: Server, asked: argparse.Namespace, draw: random.Random) -> Turns:
    talk = Talk(server, asked, draw)
    for _ in range(4):
        await talk.say(asked.long // 4)
    yield "edit", await talk.until(1).say(asked.new)
    yield "back", await talk.say(asked.new)
    yield "branch", await talk.until(3).say(asked.new)


async def shared(server: Server, asked: argparse.Namespace, draw: random.Random) -> Turns:
    vocab = servers.config_of(asked.shape).vocab
    system = servers.some(draw, asked.long // 2, vocab)
    for user in range(4):
        told = await Talk(server, asked, draw, system).say(asked.new)
        if user:
            yield "shared", told


SCENES: dict[str, Scene] = {"later": later, "restart": restart, "many": many, "edit": edit, "shared": shared}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", action="store_true", help="later turns of conversations instead")
    parser.add_argument("--scenes", nargs="*", default=[*SCENES], choices=[*SCENES])
    parser.add_argument("--long", type=int, default=8192, help="tokens that a conversation begins with")
    parser.add_argument("--new", type=int, default=64, help="tokens of a later message")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--conversations", type=int, default=64, help="that take turns")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between turns")


def compare(asked: argparse.Namespace) -> list[dict]:
    """Each scene with servers that know nothing yet, one after the other."""
    rows: list[dict] = []
    print("| scene | prompt | again: ours | llama.cpp | first token: ours | llama.cpp | llama.cpp / ours |")
    print("|--|--|--|--|--|--|--|")
    for name in asked.scenes:
        told: dict[str, dict[str, list[Told]]] = {}
        for _ in range(asked.repeats):
            for start in (ours, llama):
                server = start(asked, name)
                try:
                    for row, one in asyncio.run(gathered(SCENES[name](server, asked, random.Random(1)))):
                        told.setdefault(row, {}).setdefault(server.name, []).append(one)
                finally:
                    server.close()
        rows += [row_of(row, sides) for row, sides in told.items()]
    return rows


async def gathered(turns: Turns) -> list[tuple[str, Told]]:
    return [one async for one in turns]


def ours(asked: argparse.Namespace, name: str) -> Server:
    users, longest = sizes(asked, name)
    folder, threads = servers.emptied(asked.folder / "ours-turns"), asked.threads
    return servers.ours(
        asked.shape, asked.format, users=users, longest=longest, folder=folder, threads=threads, saved_gb=4, disk=True
    )


def llama(asked: argparse.Namespace, name: str) -> Server:
    users, longest = sizes(asked, name)
    folder, threads = servers.emptied(asked.folder / "llama-turns"), asked.threads
    return servers.llama(asked.shape, users=users, longest=longest, folder=folder, threads=threads, caches=True)


def sizes(asked: argparse.Namespace, name: str) -> tuple[int, int]:
    """Slots, and tokens of each."""
    users = {"many": asked.conversations, "edit": 4, "shared": 4}.get(name, 1)
    long = asked.long // 8 if name == "many" else asked.long
    return users, long + 8 * (asked.new + asked.answer) + 512


def row_of(name: str, sides: dict[str, list[Told]]) -> dict:
    """Medians over turns and repeats; the ratio is that of the medians."""
    row: dict = {"scene": name, "turns": len(sides["ours"]), "prompt": max(one.prompt for one in sides["ours"])}
    for side, told in sides.items():
        row[f"{side} again"] = statistics.median(one.again for one in told)
        row[f"{side} most_again"] = max(one.again for one in told)
        row[f"{side} first_s"] = round(statistics.median(one.first for one in told), 4)
    row["times_as_soon"] = round(row["llama.cpp first_s"] / row["ours first_s"], 2)
    print(
        f"| {name} | {row['prompt']:,} | {row['ours again']:,} | {row['llama.cpp again']:,} | "
        f"{row['ours first_s']:.3f} s | {row['llama.cpp first_s']:.3f} s | {row['times_as_soon']} |",
        flush=True,
    )
    return row
