"""Put tasks behind HTTP, as environments for others: a resources server of NeMo Gym.

An agent of Gym that is named after a task asks it with rows, which `rows` writes; `nautilus rlvr` asks such a server,
ours or another one, with tasks=gym@URL#ROWS.jsonl. SIGTERM and Ctrl-C let what runs finish for `grace` seconds.

tasks=store,calculator:1-2 rows=rows.jsonl      two environments, and 256 problems of each in a file
tasks=code@problems.jsonl seconds=30            rows of others, whose answers are programs that run in a sandbox here
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nautilus.config import setting
from nautilus.posttrain.blend import domain
from nautilus.recipes.serve import api_module
from nautilus.runtime import UserError, write_atomic
from nautilus.serve.api.settings import Limits
from nautilus.tasks.asked import Asked, asked
from nautilus.tasks.rows import row_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    tasks: tuple[str, ...] = setting((), "what is asked here: store, sort:1-3, math@rows.jsonl")
    rows: Path | None = setting(None, "file that is written: problems to ask with, a JSON line each")
    problems: int = setting(256, "of each task in that file")
    seed: int = setting(0, "of these problems")
    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 is every one of this machine")
    port: int = setting(8001, "port to listen at; 0: any that is free")
    keys: str = setting("", "file of keys, one a line, each of 16 characters or more; without it everybody may ask")
    sessions: int = setting(1024, "most episodes at a time")
    idle: float = setting(3600.0, "seconds without a call after which an episode is forgotten")
    seconds: float = setting(60.0, "that a task may take for a turn or a verdict")
    grace: float = setting(30.0, "seconds that requests have to finish when the server is told to end")
    limits: Limits = Limits()

    def __post_init__(self):
        if self.problems < 1 or self.sessions < 1 or not (self.idle > 0 and self.seconds > 0 and self.grace >= 0):
            raise UserError(
                f"problems={self.problems}, sessions={self.sessions}, idle={self.idle}, seconds={self.seconds} and"
                f" grace={self.grace} were asked for; only grace may be 0, and none less"
            )


def main(settings: Settings) -> None:
    if not settings.tasks:
        raise UserError("no task to put behind HTTP; write nautilus environments tasks=store, or several")
    found = [asked(words) for words in settings.tasks]
    tasks = {one.task.name: one.task for one in found}
    if len(tasks) < len(found):
        raise UserError(f"tasks={','.join(settings.tasks)} names one twice; give its levels together, as store:1-2")
    environments, server, keys = (api_module(name) for name in ("environments", "server", "keys"))
    known = keys.keys_from(settings.keys) if settings.keys else keys.Keys()
    local = server.loopback(settings.host)
    if not local and not settings.keys:
        print(f"nautilus: everybody who reaches host={settings.host} may ask here; give keys=FILE", file=sys.stderr)
    hosting = environments.Hosting(sessions=settings.sessions, idle=settings.idle, seconds=settings.seconds)
    app = environments.create_environments(
        tasks, hosting=hosting, limits=settings.limits, keys=known, local_only=local and not settings.keys
    )
    with server.bound(settings.host, settings.port) as listening:
        if settings.rows:
            write_rows(settings.rows, found, settings)
        place = server.address(settings.host, listening).removesuffix("/v1")
        print(f"{', '.join(tasks)} at {place}: {settings.sessions:,} episodes together. Ctrl-C ends it.", flush=True)
        running = server.Server(app, limits=settings.limits, grace=settings.grace)
        asyncio.run(running.serve([listening]))


def write_rows(path: Path, tasks: Sequence[Asked], settings: Settings) -> None:
    """Of problems that are trained on."""
    problems = (
        problem
        for one in tasks
        for problem in domain(one.task, settings.problems, levels=one.levels, seed=settings.seed).problems
    )
    text = "".join(json.dumps(row_of(one), ensure_ascii=False) + "\n" for one in problems)
    if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
        raise UserError(f"rows={path} is there and holds something else; remove it, or take another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
