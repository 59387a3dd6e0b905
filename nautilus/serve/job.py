"""What is asked of who serves: a job, and why one may not be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nautilus.serve.rules import Rule
from nautilus.serve.sampling import Sampling


class Busy(RuntimeError):
    """Too much waits already; come again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(RuntimeError):
    """The server ends, or its engine hangs or has failed: it takes nothing new."""


class Lost(RuntimeError):
    """What worked at an answer has ended, or nothing is there that could; another try may go well."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt and how to answer it; see Request for tenant, priority, marks, kept and answer, Engine.request for
    prompt_logprobs. rules: grammars, for example."""

    tokens: Sequence[int]
    sampling: Sampling = Sampling()
    rules: Sequence[Rule] = ()
    tenant: str = ""
    priority: int = 0
    marks: Sequence[int] = ()
    kept: bool = True
    prompt_logprobs: int | None = None
    answer: bool = True
