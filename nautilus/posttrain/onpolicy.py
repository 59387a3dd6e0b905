"""The two streams of rollouts: of the weights as they are, and ahead of them.

`Fresh` draws a step's answers with the weights that the step will change, while training waits. What it gives depends
on the weights and the number of the step alone, so a run that was stopped goes on exactly.

`Ahead` draws while training goes on, with engines that have weights of their own and get new ones between two of their
steps; answers under way go on with them. Every group is meant for one step, and begins at most `age` updates before it:
nothing that was drawn is thrown away. What older weights drew is weighed by the log-probs that it had then.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from nautilus.data.batch import Batch
from nautilus.data.mix import number_of
from nautilus.model.language import Language
from nautilus.posttrain.blend import Blend
from nautilus.posttrain.crew import Crew
from nautilus.posttrain.stream import Group, checked
from nautilus.runtime import UserError

SILENT = 20  # steps
Rows = Callable[[Sequence[Group]], list[Batch]]  # what is learnt from the groups of a step
Keep = Callable[[int, Sequence[Group]], None]  # is told the groups of every step
Finish = Callable[[Group, int], Coroutine[Any, Any, Group]]  # what is done to a group when it is whole, by a seed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is drawn: `group` answers to each problem of a step of the blend. finish: a judge, for example."""

    blend: Blend
    group: int
    seed: int = 0
    finish: Finish | None = None

    async def step(self, crew: Crew, step: int) -> list[Group]:
        asked = self.blend.step(step)
        seeds = [number_of(self.seed, step * len(asked) + number) for number in range(len(asked))]

        async def one(task, problem, seed: int) -> Group:
            group = await crew.play(task, problem, self.group, seed)
            return await self.finish(group, seed) if self.finish else group

        ways = (one(domain.task, problem, seed) for (domain, problem), seed in zip(asked, seeds, strict=True))
        return await asyncio.gather(*ways)


class Stream(ABC):
    """Steps of rollouts, each as batches. make: gives the crew that plays, inside the event loop, with this version."""

    def __init__(self, model: Language, plan: Plan, make: Callable[[int], Crew], rows: Rows, keep: Keep):
        self.model, self.plan, self.make, self.rows, self.keep, self.step = model, plan, make, rows, keep, 0
        self.crew: Crew | None = None

    def state(self) -> dict:
        return {"step": self.step}

    def restore(self, state: dict) -> None:
        self.step = state["step"]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Steps of which nothing can be learnt are passed over; UserError for very many in a row."""
        for _ in range(SILENT):
            groups = self.groups()
            self.keep(self.step, groups)
            self.step += 1
            if found := self.rows(checked(groups)):
                return found
        raise UserError(
            f"nothing could be learnt from {SILENT} steps in a row: all answers to each problem earn the same; take"
            " problems that are solved now and then, or more answers to each"
        )

    @abstractmethod
    def groups(self) -> list[Group]:
        """Of the step that comes."""

    def weights(self) -> dict:
        """A copy: those of the model change again before an engine has taken them."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


class Fresh(Stream):
    """own: the crew works on the model itself, which nobody has to tell it of."""

    def __init__(self, *given: Any, own: bool = True):
        super().__init__(*given)
        self.own, self.runner = own, asyncio.Runner()

    def groups(self) -> list[Group]:
        training = self.model.training
        self.model.eval()  # the engine would do so in every pass
        try:
            return self.runner.run(self.play())
        finally:
            self.model.train(training)

    async def play(self) -> list[Group]:
        if self.crew is None:
            self.crew = self.make(self.step)
        elif not self.own:
            await self.crew.update(self.weights(), self.step)
        self.crew.version = self.step
        return await self.plan.step(self.crew, self.step)

    def close(self) -> None:
        if self.crew is not None:
            self.runner.run(self.crew.close())
        self.runner.close()


class Ahead(Stream):
    """age: updates by which the weights that begin a group may be older than those it trains; 1 or more."""

    def __init__(self, *given: Any, age: int = 1):
        super().__init__(*given)
        self.age, self.thread = age, None
        self.places: dict[int, Future[list[Group]]] = {}

    def groups(self) -> list[Group]:
        """New weights go to the engines first, then come the groups that are meant for this step."""
        if self.thread is None:
            self.begin()
        else:
            self.wait(self.publish(self.weights(), self.step))
        found = self.place(self.step).result()
        del self.places[self.step]
        oldest = min((one.version for group in found for one in group.rollouts), default=self.step)
        assert self.step - oldest <= self.age, (self.step, oldest, self.age)
        return found

    def begin(self) -> None:
        """An event loop in a thread."""
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="rollouts", daemon=True)
        self.thread.start()
        self.wait(self.started())

    def wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def started(self) -> None:
        self.crew, self.news, self.version = self.make(self.step), asyncio.Event(), self.step
        self.drawing = asyncio.create_task(self.draw(self.crew, self.step))

    async def publish(self, weights: dict, version: int) -> None:
        assert self.crew is not None
        await self.crew.update(weights, version)
        self.version = version
        self.news.set()

    async def draw(self, crew: Crew, step: int) -> None:
        """Step after step, each as soon as the weights are new enough for it."""
        under_way = set[asyncio.Task]()  # who drops a task's only reference may lose the task
        while True:
            while step > self.version + self.age:
                self.news.clear()
                await self.news.wait()
            task = asyncio.create_task(self.fill(crew, step))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            step += 1

    async def fill(self, crew: Crew, step: int) -> None:
        try:
            self.place(step).set_result(await self.plan.step(crew, step))
        except Exception as bad:
            self.place(step).set_exception(bad)

    def place(self, step: int) -> Future[list[Group]]:
        return self.places.setdefault(step, Future())

    def close(self) -> None:
        if self.thread is None:
            return

        async def end() -> None:
            assert self.crew is not None
            under_way = asyncio.all_tasks() - {asyncio.current_task()}
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await self.crew.close()

        self.wait(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.thread = None
