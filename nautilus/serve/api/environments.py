"""Tasks behind HTTP, as NeMo Gym asks environments: a resources server.

| path | asked with | told |
|--|--|--|
| `POST /seed_session` | a row | `{}`, and a cookie: a new episode |
| `POST /{tool}` | that cookie, the arguments of a call | what the tool answers, as text |
| `POST /verify` | a row and its `response` | the same with `reward` and `reward_components` |

The task of a row is its `agent_ref.name`. A verdict needs the row and the response alone (`tasks/items.py`), with or
without a session, and again after it. What is wrong with a request is told in a 4xx; a grader that fails or takes too
long costs its own request, with a 5xx. A session that nobody used for `idle` seconds is forgotten; where there are as
many as there may be, the next one has to wait.

Source: the public code of NeMo Gym.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from nautilus.runtime.threads import in_a_thread
from nautilus.serve.api.body import parsed, read_body
from nautilus.serve.api.errors import ApiError, described
from nautilus.serve.api.gate import Gate
from nautilus.serve.api.keys import Keys, Quota
from nautilus.serve.api.settings import Limits
from nautilus.tasks import Call, Episode, GraderBroken, Problem, Reply, Task
from nautilus.tasks.items import Misfit, verified
from nautilus.tasks.rows import posed

log = logging.getLogger("nautilus.serve.api")
COOKIE = "session"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """sessions: most episodes at a time; idle: seconds without a call after which one is forgotten; seconds: that a
    task may take for a turn or a verdict."""

    sessions: int = 1024
    idle: float = 3600.0
    seconds: float = 60.0


@dataclass
class Session:
    episode: Episode
    used: float = field(default_factory=time.monotonic)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # calls of one episode come one after the other


FAULTS = LookupError, TypeError, ValueError, AttributeError, RecursionError  # of code that reads a row of somebody's


class Environments:
    """The sessions of a server. It is asked within its event loop, and works in threads."""

    def __init__(self, tasks: Mapping[str, Task], hosting: Hosting, limits: Limits):
        self.tasks, self.hosting, self.limits = dict(tasks), hosting, limits
        self.sessions: dict[str, Session] = {}  # those that were used last at the end
        self.running = 0

    async def drain(self, grace: float) -> None:
        """Until nothing runs, or so many seconds."""
        end = time.monotonic() + grace
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)

    # ----- what is asked ----------------------------------------------------------------------------------------------

    async def seed(self, request: Request) -> Response:
        task, problem = self.posed(await self.body(request))
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        self.make_room()
        session = Session(episode=self.begun(task, problem))
        token = secrets.token_urlsafe(24)
        self.sessions[token] = session
        answer = told({})
        answer.set_cookie(COOKIE, token, httponly=True)
        return answer

    async def call(self, request: Request, tool: str) -> Response:
        session = self.session(request)
        names = [one["function"]["name"] for one in session.episode.problem.tools]
        if tool not in names:
            raise ApiError(404, f"there is no tool {tool[:80]!r} here; there are {', '.join(names)}", code="no_tool")
        reply = Reply(calls=(Call(name=tool, arguments=await self.body(request)),))
        async with session.turn:
            answers = await self.in_time(session.episode.hear, reply)
        return Response("\n".join(str(one["content"]) for one in answers), media_type="text/plain; charset=utf-8")

    async def verify(self, request: Request) -> Response:
        body = await self.body(request)
        task, problem = self.posed(body)
        if not isinstance(response := body.get("response"), dict):
            raise ApiError(400, "response: an object is needed, with what the model said in output", param="response")
        self.begun(task, problem)  # a row that does not fit is told as such, and not as a grader that fails
        try:
            verdict = await self.in_time(verified, task, problem, response)
        except Misfit as bad:
            raise ApiError(422, str(bad), param="response.output", code="misfit") from bad
        except FAULTS as bad:
            raise self.misfit(task, bad) from bad
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        return told({**body, "reward": verdict.reward, "reward_components": dict(verdict.parts)})

    # ----- how --------------------------------------------------------------------------------------------------------

    async def body(self, request: Request) -> dict[str, Any]:
        return parsed(await read_body(request, self.limits), self.limits)

    def posed(self, row: Mapping[str, Any]) -> tuple[Task, Problem]:
        """ApiError for a row of no task here, or of none at all."""
        named = row.get("agent_ref")
        name = named.get("name") if isinstance(named, dict) else None
        if (task := self.tasks.get(name) if isinstance(name, str) else None) is None:
            here = ", ".join(self.tasks)
            raise ApiError(400, f"agent_ref.name is {str(name)[:80]!r}; the tasks here are {here}", param="agent_ref")
        try:
            return task, posed(row, task)
        except ValueError as bad:
            raise ApiError(400, str(bad), param="responses_create_params") from bad

    def begun(self, task: Task, problem: Problem) -> Episode:
        try:
            return task.episode(problem)
        except FAULTS as bad:
            raise self.misfit(task, bad) from bad

    def misfit(self, task: Task, bad: Exception) -> ApiError:
        why = f"the row is no problem of {task.name}, which lacks what it is judged by, or its task fails: {bad!r}"
        return ApiError(422, why[:400], code="misfit")

    def session(self, request: Request) -> Session:
        """The one that the cookie names, which is the last to be forgotten now."""
        token = request.cookies.get(COOKIE, "")
        if (session := self.sessions.pop(token, None)) is None:
            raise ApiError(
                400, f"no session: POST the row to /seed_session first, and send its cookie {COOKIE}",
                code="no_session",
            )  # fmt: skip
        session.used = time.monotonic()
        self.sessions[token] = session
        return session

    def make_room(self) -> None:
        oldest = time.monotonic() - self.hosting.idle
        for token in [token for token, one in self.sessions.items() if one.used < oldest]:
            del self.sessions[token]
        if len(self.sessions) >= self.hosting.sessions:
            raise ApiError(429, f"{len(self.sessions)} sessions are open; verify one, or wait", code="busy", retry=5)

    async def in_time(self, do: Callable[..., T], *given: Any) -> T:
        """In a thread of its own: one that hangs is left behind, and keeps nobody waiting, not even the end."""
        self.running += 1
        try:
            return await asyncio.wait_for(in_a_thread(do, *given), self.hosting.seconds)
        except TimeoutError as late:
            why = f"the task took more than {self.hosting.seconds:g} seconds"
            raise ApiError(504, why, code="timeout") from late
        except GraderBroken as bad:
            raise ApiError(500, f"the grader failed: {bad}"[:400], code="grader_broken") from bad
        finally:
            self.running -= 1


def told(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def create_environments(
    tasks: Mapping[str, Task], *, hosting: Hosting, limits: Limits, keys: Keys | None = None, local_only: bool = False
) -> FastAPI:
    """The application; `keys` and `local_only` as of the server of a model."""
    here = Environments(tasks, hosting, limits)
    app = FastAPI(title="nautilus environments", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.context = SimpleNamespace(service=here)  # what a server lets come to an end
    for kind in (HTTPException, Exception):
        app.add_exception_handler(kind, refused)

    def guarded(work: Callable[..., Awaitable[Response]]) -> Callable:
        async def endpoint(request: Request) -> Response:
            try:
                return await work(request, **request.path_params)
            except Exception as bad:
                return await refused(request, bad)

        return endpoint

    async def health() -> Response:
        return Response(status_code=200)

    app.add_api_route("/health", health, methods=["GET"], response_class=Response)
    for path, work in {"/seed_session": here.seed, "/verify": here.verify, "/{tool}": here.call}.items():
        app.add_api_route(path, guarded(work), methods=["POST"], response_class=Response)
    app.add_middleware(
        Gate, keys=keys or Keys(), quota=Quota(limits), local_only=local_only, rejected=lambda code: None
    )
    return app


async def refused(request: Request, bad: Exception) -> Response:
    if isinstance(bad, HTTPException) and bad.status_code in (404, 405):
        bad = ApiError(bad.status_code, "ask for POST /seed_session, /verify or a tool", code=str(bad.status_code))
    return described(bad).response("")
