"""Who plays: an engine in this process, or several in processes of Ray, on this machine or others.

| | `Here` | `Actors` |
|--|--|--|
| plays | many episodes at once; in a thread, if training goes on | the same in each process; groups go where least is |
| new weights | are copied between two steps of the engine | are put into Ray's store once, and fetched by each |
| what breaks | loses its own rollout | a process that dies or hangs is replaced, and its groups are played again |
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.remote import model_of, parts_of
from nautilus.posttrain.rollout import Player, Playing
from nautilus.posttrain.stream import Group, play_group
from nautilus.serve import Engine
from nautilus.serve.service import Service
from nautilus.serve.turns import Turns
from nautilus.tasks import Problem, Task
from nautilus.train.replay import routes_of

T = TypeVar("T")
TRIES = 3  # of a group whose process dies
SAVED = 1.0  # 10^9 bytes: what answers to one prompt share, and turns of one conversation
MUCH = {"most_waiting": 1 << 20, "most_waiting_tokens": 1 << 40}


def engine_of(model: Language, tokenizer: Tokenizer, playing: Playing, rows: int) -> Engine:
    how = {"max_tokens": playing.tokens, "drafts": playing.drafts, "saved_gb": SAVED}
    return Engine(model, tokenizer, rows=rows, **how)


class Crew(Protocol):
    """version: of the weights that it has."""

    version: int

    async def play(self, task: Task, problem: Problem, count: int, seed: int) -> Group: ...

    async def update(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    async def close(self) -> None: ...


class Here:
    """Make it inside a running event loop. beside: this process goes on with something else meanwhile."""

    def __init__(
        self, model: Language, tokenizer: Tokenizer, playing: Playing, *, rows: int, version: int = 0,
        beside: bool = False,
    ):  # fmt: skip
        self.engine = engine_of(model, tokenizer, playing, rows)
        self.version, self.versions = version, dict[int, int]()  # by changes of the engine's weights
        self.service = (Service if beside else Turns)(self.engine, **MUCH)
        self.player = Player(self.service, tokenizer, playing, lambda changes: self.versions.get(changes, self.version))

    async def play(self, task: Task, problem: Problem, count: int, seed: int) -> Group:
        group = await play_group(self.player, task, problem, count, seed)
        if not self.player.playing.routes:
            return group
        return await self.service.between(lambda: routed(self.engine.model, group))

    async def update(self, weights: Mapping[str, Tensor], version: int) -> None:
        changes = self.engine.forward.version
        self.versions |= {changes: self.version, changes + 1: version}  # before the first token that the new ones draw
        await self.service.update(weights)
        self.version = version

    async def close(self) -> None:
        await self.service.close()


def routed(model: Language, group: Group) -> Group:
    """With the experts that the model has for each rollout now. Of one that began with older weights those of its first
    tokens may have been others: what the new ones would choose counts."""
    found = [replace(one, routes=routes_of(model, torch.tensor([one.tokens]))[0]) for one in group.rollouts]
    return replace(group, rollouts=found)


class Actor:
    """One process of Ray: it makes its engine from the parts of a model, inside its event loop."""

    def __init__(self, parts: Mapping[str, Any], playing: Playing, rows: int, version: int):
        self.made = model_of(parts), parts["tokenizer"], playing, rows, version
        self.here: Here | None = None

    async def crew(self) -> Here:
        if self.here is None:
            model, tokenizer, playing, rows, version = self.made
            self.here = Here(model, tokenizer, playing, rows=rows, version=version)
        return self.here

    async def play(self, task: Task, problem: Problem, count: int, seed: int) -> Group:
        return await (await self.crew()).play(task, problem, count, seed)

    async def update(self, weights: Mapping[str, Tensor], version: int) -> None:
        await (await self.crew()).update(weights, version)

    async def alive(self) -> None:
        """Comes back between two steps of the engine."""


class Actors:
    """So many processes. `ray` is the library, connected; silence: seconds without a sign of life from a process, after
    which it is taken for dead. What a dead one was at is played by another, which draws the same answers from the same
    weights; the loss is counted all the same. The last of `TRIES` is made by one group at a time: so one that kills
    whoever plays it is lost for good, and no other with it."""

    def __init__(
        self, ray: Any, count: int, model: Language, tokenizer: Tokenizer, playing: Playing, *, rows: int,
        version: int = 0, silence: float = 600.0,
    ):  # fmt: skip
        self.ray, self.playing, self.rows, self.version, self.silence = ray, playing, rows, version, silence
        self.deaths = ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, TimeoutError
        self.last = asyncio.Lock()
        parts = parts_of(model)
        self.weights = ray.put(parts.pop("weights"))
        self.fixed = {**parts, "tokenizer": tokenizer}
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // count)
        self.kind = ray.remote(num_cpus=cpus, max_concurrency=1 << 16)(Actor)
        self.busy = Counter[int]()
        self.actors = {number: self.started() for number in range(count)}
        self.lost = 0

    def started(self) -> Any:
        parts = {**self.fixed, "weights": self.ray.get(self.weights)}
        return self.kind.remote(parts, self.playing, self.rows, self.version)

    async def play(self, task: Task, problem: Problem, count: int, seed: int) -> Group:
        found, at = Group(problem=problem, rollouts=[]), -1
        for left in reversed(range(TRIES)):
            async with contextlib.nullcontext() if left else self.last:
                at = min(self.actors, key=lambda one: (one == at, self.busy[one], one))
                whole = await self.tried(at, task, problem, count, seed)
            if not isinstance(whole, str):
                return replace(whole, lost=whole.lost + found.lost, why={**found.why, **whole.why})
            found = replace(found, lost=Counter({"actor": count}), why={"actor": whole})
        return found

    async def tried(self, number: int, *asked: Any) -> Group | str:
        """By this process; what became of it, if that has ended, for people."""
        actor = self.actors[number]
        self.busy[number] += 1
        try:
            return await self.answer(actor, actor.play.remote(*asked))
        except self.deaths as bad:
            self.replace(number, actor)
            what = "gave no sign of life" if isinstance(bad, TimeoutError) else f"died: {bad}".partition("\n")[0]
            return f"process {number} of Ray {what}"
        finally:
            self.busy[number] -= 1

    async def answer(self, actor: Any, asked: Awaitable[T]) -> T:
        """What the process gives; TimeoutError where it gives no sign of life."""
        waiting = asyncio.ensure_future(asked)
        try:
            while not (await asyncio.wait([waiting], timeout=self.silence))[0]:
                await asyncio.wait_for(actor.alive.remote(), self.silence)
            return waiting.result()
        finally:
            waiting.cancel()

    def replace(self, number: int, dead: Any) -> None:
        """Another in its place, once however many groups it was at."""
        if self.actors[number] is dead:
            self.end(dead)
            self.lost += 1
            self.actors[number] = self.started()

    def end(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # of one that is gone already
            self.ray.kill(actor)

    async def update(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.weights, self.version = self.ray.put(dict(weights)), version
        for number, actor in [*self.actors.items()]:
            try:
                await self.answer(actor, actor.update.remote(self.weights, version))
            except self.deaths:
                self.replace(number, actor)

    async def close(self) -> None:
        for actor in self.actors.values():
            self.end(actor)
        await asyncio.sleep(0)
