"""Environments of OpenEnv as tasks of ours, at a URL.

A problem is a seed and what the environment shows after a reset with it; the model acts by calls of one tool, `step`,
whose parameters are the environment's own schema of an action. The verdict is the sum of all rewards, in the
environment's units. It must begin alike with the same seed, as all answers to a problem are compared.

| address | an episode is |
|--|--|
| `ws://`, `wss://` | a connection with an environment of its own, as today's servers have it |
| `http://`, `https://` | requests to the one environment of a server, for one process that trains |

Over HTTP an episode is begun anew, and played up to where it was, whenever another one had the environment in between.
An action that the environment refuses is told to the model. An environment that does not answer, forgets, or does not
do the same again is a broken grader: it costs the episode and no other.

Source: the public code of OpenEnv, whose servers of today give every request over HTTP an environment of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nautilus.runtime import UserError, installing
from nautilus.tasks.task import Episode, GraderBroken, Message, Problem, Reply, Task, Verdict, told, user
from nautilus.tasks.wire import SECONDS, Wire, client

SEEDS = 1 << 31
ASKS = "Act in this environment by calls of step, until it is done. It shows:"


class Refused(Exception):
    """An action that is none."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a reset or a step gave, without what the server notes beside it."""

    observation: Mapping[str, Any]
    reward: float
    done: bool

    @property
    def text(self) -> str:
        return json.dumps(self.observation, ensure_ascii=False)


def result_of(found: Mapping[str, Any]) -> Result:
    """GraderBroken for what is none."""
    shown, reward = found.get("observation"), found.get("reward") or 0.0
    if not isinstance(shown, Mapping) or not isinstance(reward, int | float):
        raise GraderBroken(f"an environment answered with no observation: {str(found)[:200]}")
    kept = {key: value for key, value in shown.items() if key != "metadata"}
    return Result(observation=kept, reward=float(reward), done=bool(found.get("done")))


class Session(Protocol):
    """An episode as the environment has it. Errors: Refused, GraderBroken."""

    def reset(self, seed: int) -> Result: ...
    def step(self, action: Mapping[str, Any]) -> Result: ...


@dataclass(frozen=True, kw_only=True)
class Seeded(Problem):
    """Told apart by its seed too: many environments begin with the same words."""

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{super().id} {self.truth['seed']}".encode()).hexdigest()[:16]


class OpenEnv(Task):
    """The name is what the command line has. UserError for an environment that is not there when problems are drawn."""

    turns = 16

    def __init__(self, name: str, url: str):
        client()  # says what is missing before anything is asked
        self.name, self.url = name, url
        self.tools: tuple[Message, ...] = ()
        self.drawing: Session | None = None  # one for all problems, given back when the first is played

    def __reduce__(self):
        return OpenEnv, (self.name, self.url)

    def session(self) -> Session:
        return Connection(self.url) if self.url.startswith("ws") else Requests(place(self.url))

    def draw(self, rng: random.Random, level: int) -> Problem:
        seed = rng.randrange(SEEDS)
        try:
            self.tools = self.tools or (step_tool(self.url),)
            self.drawing = self.drawing or self.session()
            shown = self.drawing.reset(seed)
        except GraderBroken as bad:
            raise UserError(f"{bad}; is there an environment at {self.url}?") from bad
        truth = {"seed": seed, "observation": shown.observation}
        asked = user(f"{ASKS}\n{shown.text}")
        return Seeded(task=self.name, level=level, messages=asked, truth=truth, tools=self.tools)

    def episode(self, problem: Problem) -> Episode:
        self.drawing = None
        return Acted(problem, self.session())


def step_tool(url: str) -> Message:
    """With the schema of an action, or any object where the server, an older one, has no schema."""
    answer = Wire("http" + url.removeprefix("ws") if url.startswith("ws") else url).ask("GET", "/schema")
    found = answer.json().get("action") if answer.status_code == 200 else None
    schema = dict(found) if isinstance(found, Mapping) else {"type": "object", "properties": {}}
    properties = {key: value for key, value in schema.get("properties", {}).items() if key != "metadata"}
    about = {"name": "step", "description": "Acts in the environment."}
    return {"type": "function", "function": {**about, "parameters": {**schema, "properties": properties}}}


class Acted(Episode):
    def __init__(self, problem: Problem, session: Session):
        super().__init__(problem)
        self.session, self.results = session, list[Result]()

    def answer(self, reply: Reply) -> Sequence[Message]:
        if reply.fault:
            return [told(f"error: {reply.fault}")]
        answers = [told(text) for call in reply.calls if (text := self.acted(call.arguments)) is not None]
        return () if self.done else answers

    @property
    def done(self) -> bool:
        return bool(self.results) and self.results[-1].done

    def acted(self, action: Mapping[str, Any]) -> str | None:
        """What it shows then; None where it was done before."""
        if not self.results:
            self.results.append(self.session.reset(self.problem.truth["seed"]))
            if self.results[0].observation != self.problem.truth["observation"]:
                raise GraderBroken(f"{self.problem.task} does not begin alike with seed {self.problem.truth['seed']}")
        if self.done:
            return None
        try:
            self.results.append(self.session.step(action))
        except Refused as bad:
            return f"error: {bad}"
        return self.results[-1].text

    def judged(self, last: Reply) -> Verdict:
        steps = len(self.results[1:])
        reward = sum(one.reward for one in self.results[1:])
        return Verdict(reward=reward, why=f"{reward:g} in {steps} steps", parts={"steps": steps, "done": self.done})


# ----- over HTTP ------------------------------------------------------------------------------------------------------


class Place:
    """The one environment of a server, and which episode had it last."""

    def __init__(self, url: str):
        self.wire, self.lock = Wire(url), threading.Lock()
        self.last: Requests | None = None


@functools.cache
def place(url: str) -> Place:
    """The same for all tasks of this process."""
    return Place(url)


class Requests:
    def __init__(self, place: Place):
        self.place, self.seed, self.episode = place, 0, ""
        self.actions, self.results = list[Mapping[str, Any]](), list[Result]()

    def reset(self, seed: int) -> Result:
        with self.place.lock:
            self.seed, self.results = seed, [self.begin(seed)]
        return self.results[0]

    def step(self, action: Mapping[str, Any]) -> Result:
        with self.place.lock:
            if self.place.last is not self:
                again = [self.begin(self.seed), *(self.act(one) for one in self.actions)]
                if again != self.results:
                    raise GraderBroken(f"{self.place.wire.url} does not do the same again with seed {self.seed}")
            found, state = self.act(action), self.place.wire.json("GET", "/state")
        self.actions.append(action)
        self.results.append(found)
        if state.get("step_count") != len(self.actions) or state.get("episode_id") != self.episode:
            raise GraderBroken(
                f"{self.place.wire.url} counts {state.get('step_count')} steps after {len(self.actions)}: it forgets"
                " between requests, or somebody else has it too; if it has connections, write ws:// for http://"
            )
        return found

    def begin(self, seed: int) -> Result:
        self.place.last = self
        shown = result_of(self.place.wire.json("POST", "/reset", {"seed": seed}))
        self.episode = self.place.wire.json("GET", "/state").get("episode_id")
        return shown

    def act(self, action: Mapping[str, Any]) -> Result:
        answer = self.place.wire.ask("POST", "/step", {"action": dict(action)})
        if answer.status_code in (400, 422):
            raise Refused(answer.text[:500])
        return result_of(self.place.wire.read(answer))


# ----- over a connection ----------------------------------------------------------------------------------------------


class Connection:
    """Opened with the first message, closed when nobody holds it any more."""

    def __init__(self, url: str):
        self.url = url.rstrip("/") + "/ws"
        self.socket: Any = None

    def reset(self, seed: int) -> Result:
        return self.ask("reset", {"seed": seed})

    def step(self, action: Mapping[str, Any]) -> Result:
        return self.ask("step", dict(action))

    def ask(self, kind: str, data: Mapping[str, Any]) -> Result:
        try:
            socket = self.opened()
            socket.send(json.dumps({"type": kind, "data": data}))
            found = json.loads(socket.recv(SECONDS))
            told = found["data"]
        except UserError:
            raise
        except Exception as bad:  # of any layer below
            raise GraderBroken(f"{self.url} did not answer: {type(bad).__name__} {bad}") from bad
        if found.get("type") != "error":
            return result_of(told)
        if told.get("code") == "VALIDATION_ERROR":
            raise Refused(str(told.get("errors") or told.get("message"))[:500])
        raise GraderBroken(f"{self.url} failed: {str(told)[:300]}")

    def opened(self) -> Any:
        if self.socket is None:
            try:
                from websockets.sync.client import connect
            except ImportError as bad:
                raise UserError(f"ws:// needs the library websockets; {installing('rl')}") from bad
            held = contextlib.ExitStack()
            self.socket = held.enter_context(connect(self.url, open_timeout=SECONDS, close_timeout=1, max_size=None))
            weakref.finalize(self, held.close)
        return self.socket
