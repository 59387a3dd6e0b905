"""The two streams of rollouts: of the weights as they are, and ahead of them.

`Fresh` draws a step's answers with the weights that the step will change, while training waits. What it gives depends
on the weights and the number of the step alone, so a run that was stopped goes on exactly.

`Ahead` draws while training goes on, with an engine that has weights of its own and gets new ones between two of its
steps; answers under way go on with them. Every group is meant for one step, and begins at most `age` updates before it:
nothing that was drawn is thrown away. What older weights drew is weighed by the log-probs that it had then.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from nautilus.data.batch import Batch
from nautilus.data.mix import number_of
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.blend import Blend
from nautilus.posttrain.rollout import Player, Playing
from nautilus.posttrain.stream import Group, checked, play_group
from nautilus.runtime import UserError
from nautilus.serve import Engine
from nautilus.serve.service import Service

Rows = Callable[[Sequence[Group]], list[Batch]]  # what is learnt from the groups of a step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is drawn: `group` answers to each problem of a step of the blend. rows: how many run together."""

    blend: Blend
    playing: Playing
    group: int
    rows: int = 64
    seed: int = 0


class Fresh:
    """See the module. keep: is told the groups of every step."""

    def __init__(self, model: Language, tokenizer: Tokenizer, plan: Plan, rows: Rows, keep: Callable[..., None]):
        self.plan, self.rows, self.keep, self.step = plan, rows, keep, 0
        self.tokenizer, self.runner = tokenizer, asyncio.Runner()
        self.engine = Engine(model, tokenizer, max_tokens=plan.playing.tokens, rows=plan.rows)
        self.service: Service | None = None

    def state(self) -> dict:
        return {"step": self.step}

    def restore(self, state: dict) -> None:
        self.step = state["step"]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        groups = self.runner.run(self.play())
        self.keep(self.step, groups)
        self.step += 1
        return self.rows(checked(groups))

    async def play(self) -> list[Group]:
        self.service = self.service or Service(self.engine, most_waiting=1 << 20, most_waiting_tokens=1 << 40)
        player = Player(self.service, self.tokenizer, self.plan.playing, version=lambda: self.step)
        return await step_of(player, self.plan, self.step)

    def close(self) -> None:
        if self.service is not None:
            self.runner.run(self.service.close())
        self.runner.close()


async def step_of(player: Player, plan: Plan, step: int) -> list[Group]:
    asked = plan.blend.step(step)
    seeds = [number_of(plan.seed, step * len(asked) + number) for number in range(len(asked))]
    ways = (
        play_group(player, domain.task, problem, plan.group, seed)
        for (domain, problem), seed in zip(asked, seeds, strict=True)
    )
    return await asyncio.gather(*ways)


class Ahead:
    """See the module. age: updates by which the weights that begin a group may be older than those it trains; 0 waits
    for the newest, and differs from `Fresh` in having an engine of its own."""

    def __init__(
        self, model: Language, tokenizer: Tokenizer, plan: Plan, rows: Rows, keep: Callable[..., None], *, age: int = 1
    ):  # fmt: skip
        if age < 0:
            raise UserError(f"age={age} was asked for; an answer cannot be drawn with weights that are not there yet")
        self.model, self.plan, self.rows, self.keep, self.age = model, plan, rows, keep, age
        self.tokenizer, self.step, self.version = tokenizer, 0, 0
        self.thread: threading.Thread | None = None

    def state(self) -> dict:
        return {"step": self.step}

    def restore(self, state: dict) -> None:
        self.step = self.version = state["step"]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """New weights go to the engine first, then come the groups that are meant for this step."""
        if self.thread is None:
            self.begin()
        else:
            self.publish(self.step)
        groups = self.groups_of(self.step)
        self.keep(self.step, groups)
        self.step += 1
        return self.rows(checked(groups))

    def begin(self) -> None:
        """The engine, on a copy of the weights, in a thread with an event loop."""
        copy = Language(self.model.config, device="meta").to_empty(device="cpu")
        copy.load_state_dict(self.model.state_dict())
        copy.compute = self.model.compute
        copy.requires_grad_(False).eval()
        self.engine = Engine(copy, self.tokenizer, max_tokens=self.plan.playing.tokens, rows=self.plan.rows)
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.groups: dict[int, Future[list[Group]]] = {}
        self.news = asyncio.Event()
        self.thread = threading.Thread(target=self.run, args=(ready,), name="rollouts", daemon=True)
        self.thread.start()
        ready.wait()

    def run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.service = self.loop.run_until_complete(self.serve())
        self.drawing = self.loop.create_task(self.draw(self.step))
        ready.set()
        self.loop.run_forever()

    async def serve(self) -> Service:
        return Service(self.engine, most_waiting=1 << 20, most_waiting_tokens=1 << 40)

    async def draw(self, step: int) -> None:
        """Step after step, each as soon as the weights are new enough for it."""
        player = Player(self.service, self.tokenizer, self.plan.playing, version=lambda: self.version)
        while True:
            while step > self.version + self.age:
                self.news.clear()
                await self.news.wait()
            self.place(step)
            asyncio.ensure_future(self.fill(step, player))
            step += 1

    async def fill(self, step: int, player: Player) -> None:
        try:
            self.place(step).set_result(await step_of(player, self.plan, step))
        except Exception as bad:
            self.place(step).set_exception(bad)

    def place(self, step: int) -> Future[list[Group]]:
        return self.groups.setdefault(step, Future())

    def groups_of(self, step: int) -> list[Group]:
        found = self.place(step).result()
        del self.groups[step]
        oldest = min((one.version for group in found for one in group.rollouts), default=step)
        assert step - oldest <= self.age, (step, oldest, self.age)
        return found

    def publish(self, version: int) -> None:
        """A copy of the weights: those of the model change again before the engine has taken them."""
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

        async def now() -> None:
            await self.service.update(weights)
            self.version = version
            self.news.set()

        asyncio.run_coroutine_threadsafe(now(), self.loop).result()

    def close(self) -> None:
        if self.thread is None:
            return

        async def end() -> None:
            self.drawing.cancel()
            await self.service.close()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.thread = None
