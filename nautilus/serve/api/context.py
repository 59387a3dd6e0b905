"""What every endpoint needs: the service, what the server was told, and what follows from both."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nautilus.data.tokenizer import Tokenizer
from nautilus.serve import Engine
from nautilus.serve.api.body import parsed
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.exchange import Choice, Form
from nautilus.serve.api.fields import Asked
from nautilus.serve.api.kept import KeptResponses
from nautilus.serve.api.keys import Keys
from nautilus.serve.api.metrics import Meters
from nautilus.serve.api.settings import Defaults, Limits
from nautilus.serve.job import Job
from nautilus.serve.service import Service

log = logging.getLogger("nautilus.serve.api")
WORKERS, SLOW_WORKERS = 8, 2  # threads that read, render and encode requests
LONG = 1 << 18  # bytes of a body that may take seconds
GRAMMARS = (
    "response_format",
    "structured_outputs",
    "tool_choice",
    "output_config",
    "text",
)  # fields that may ask for one
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """model: the name that clients ask for. defaults: what counts where a client says nothing. local_only: see Gate."""

    model: str
    version: str = ""
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    local_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that has been read, rendered and encoded.

    following: asked in a worker, when all has gone well, for what may be read in idle time.
    """

    asked: Asked
    jobs: Sequence[Job]
    choices: Sequence[Choice]
    form: Form
    following: Callable[[], Job | None] | None = None


class Context:
    def __init__(self, service: Service, settings: ApiSettings):
        self.service, self.settings, self.limits = service, settings, settings.limits
        self.started = int(time.time())
        self.sampling = settings.defaults.sampling()
        self.meters = Meters(settings.model)
        self.workers = ThreadPoolExecutor(WORKERS, "nautilus-request")
        self.slow_workers = ThreadPoolExecutor(SLOW_WORKERS, "nautilus-slow-request")
        self.reading_ahead: set[asyncio.Task] = set()
        self.kept = KeptResponses(self.limits)

    @property
    def engine(self) -> Engine:
        return self.service.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def tenant(self, owner: str, salt: str | None) -> str:
        """Prefixes are shared among requests of one key and one salt."""
        return f"{owner}:{salt or ''}"

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model:
            raise ApiError(
                404, f"no model {name[:120]!r} here; this server has {self.settings.model!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    async def prepared(self, body: bytes, work: Callable[[Mapping[str, Any]], Result]) -> Result:
        """What the work makes of a body, done beside the event loop. ApiError 408 where it takes far too long.

        What may take seconds is done by few workers of its own, so that it keeps nothing else waiting.
        """
        slow = len(body) > LONG
        try:
            async with asyncio.timeout(self.limits.rendering):
                asked = await self.in_worker(parsed, body, self.limits, slow=slow)
                return await self.in_worker(work, asked, slow=slow or any(map(asked.get, GRAMMARS)))
        except TimeoutError as bad:
            raise ApiError(
                408, "this request takes too long to read and render; send less, or a simpler schema", code="timeout"
            ) from bad

    async def in_worker(self, work: Callable[..., Result], *given, slow: bool) -> Result:
        workers = self.slow_workers if slow else self.workers
        return await asyncio.get_running_loop().run_in_executor(workers, work, *given)

    def read_ahead(self, following: Callable[[], Job | None] | None) -> None:
        """Let the service read in idle time what the next request will begin with. Nobody waits for this."""
        if following is not None:
            task = asyncio.ensure_future(self.warm(following))
            self.reading_ahead.add(task)
            task.add_done_callback(self.reading_ahead.discard)

    async def warm(self, following: Callable[[], Job | None]) -> None:
        try:
            if not self.service.load().waiting and (job := await self.in_worker(following, slow=True)) is not None:
                self.service.warm(job)
        except Exception as bad:
            log.debug("nothing was read ahead: %s", bad)

    def close(self) -> None:
        for task in self.reading_ahead:
            task.cancel()
        for workers in (self.workers, self.slow_workers):
            workers.shutdown(wait=False, cancel_futures=True)


def fitted(
    context: Context, tokens: list[int], asked: Asked, longest: int | None, *, default: int | None
) -> tuple[list[int], int]:
    """The prompt, cut at its beginning if that was asked for, and how many tokens the answer may have.

    ApiError context_length_exceeded where both together do not fit; default None: all that fits.
    """
    room, keep = context.engine.max_tokens, asked.truncate_prompt_tokens
    if keep is not None:
        name = "truncate_prompt_tokens"
        if keep != -1 and not 1 <= keep < room:
            raise ApiError(400, f"{name} is {keep}; choose 1 to {room - 1} or -1", param=name)
        tokens = tokens[-(max(1, room - (longest or default or 1)) if keep == -1 else keep) :]
    if not tokens:
        raise ApiError(400, "the prompt has no tokens; send at least one", param="prompt", code="empty_prompt")
    wanted = len(tokens) + (1 if longest is None else longest)
    if wanted > room:
        what = "at least 1" if longest is None else str(longest)
        raise ApiError(
            400, f"this model's context has {room} tokens, but {wanted} were asked for: {len(tokens)} of the prompt and"
            f" {what} of the answer; shorten one of them", param="messages" if default is None else "prompt",
            code="context_length_exceeded",
        )  # fmt: skip
    most = default if longest is None else longest
    return tokens, room - len(tokens) if most is None else min(most, room - len(tokens))
