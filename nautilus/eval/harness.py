"""The tasks of EleutherAI's `lm-eval`, asked of our own server by the clients that it brings along.

It sends prompts as token ids to /v1/completions, and reads the log-probs of what a task scores from their echo; in a
chat it sends messages to /v1/chat/completions, which have no such log-probs. Answers are kept in a file as they come.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nautilus.eval.suite import Cell, Z, wilson
from nautilus.runtime import UserError, installing
from nautilus.serve import Engine

NAME = "model"  # that the client asks for
PATIENT = "seconds", "rendering", "sending", "stalled", "idle"  # limits of the server that are
HOURS = 24  # for requests and connections alike


@dataclass(frozen=True, kw_only=True)
class Asked:
    """tasks: names, groups or patterns of `lm-eval`; include: a folder with more of them, as YAML files; limit:
    examples of each task, 0: all; fewshot: examples before each, None: as the task says; chat: through the chat
    template, with `thinking` tokens of reasoning at most."""

    tasks: Sequence[str]
    include: Path | None = None
    limit: int = 0
    fewshot: int | None = None
    chat: bool = False
    thinking: int = 0


def lm_eval() -> ModuleType:
    """UserError where it cannot be imported, or the server that it asks."""
    for name, extra in (("lm_eval", "eval"), ("aiohttp", "eval"), ("transformers", "eval"), ("uvicorn", "serve")):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"suite=lm-eval was asked for, which needs the library {name!r}; {installing(extra)}")
    return importlib.import_module("lm_eval")


def known_tasks(asked: Asked) -> Any:
    """The task manager of `lm-eval`. UserError for tasks that it does not know, and for a folder that is none."""
    library = lm_eval()
    if not asked.tasks:
        raise UserError("suite=lm-eval was asked for without tasks; give names, such as tasks=lambada_openai,piqa")
    if asked.include is not None and not asked.include.is_dir():
        raise UserError(f"the tasks of include={asked.include} were asked for, but that is no folder; check the path")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    managed = importlib.import_module("lm_eval.tasks").TaskManager
    if asked.include is not None:  # to look through the library's own ten thousand takes many seconds
        manager = managed(include_path=str(asked.include), include_defaults=False)
        if {*asked.tasks} <= {*manager.all_subtasks}:
            return manager
    manager = managed(include_path=str(asked.include) if asked.include else None)
    for name in asked.tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists them"
            raise UserError(f"lm-eval {library.__version__} has no task {name!r}; {hint} include=FOLDER brings others")
    return manager


def harness(engine: Engine, tokenizer: Path, asked: Asked, manager: Any, kept: Path) -> dict[str, Any]:
    """What `lm-eval` found. tokenizer: the folder that has it; manager: of `known_tasks`; kept: how the names of its
    files of answers begin. UserError where a task cannot be asked of the model in this way."""
    from nautilus.serve.api.context import ApiSettings
    from nautilus.serve.api.local import serving
    from nautilus.serve.api.settings import Limits

    limits = replace(Limits(), **dict.fromkeys(PATIENT, HOURS * 3600), stop=256)
    with serving(engine, ApiSettings(model=NAME, limits=limits)) as url, past_proxies():
        try:
            found = lm_eval().simple_evaluate(
                model="local-chat-completions" if asked.chat else "local-completions",
                model_args=client(engine, tokenizer, asked, url),
                tasks=[*asked.tasks],
                task_manager=manager,
                num_fewshot=asked.fewshot,
                limit=asked.limit or None,
                apply_chat_template=asked.chat,
                gen_kwargs=reasoning(asked) if asked.chat else None,
                use_cache=str(kept),
                bootstrap_iters=1000,
            )
        except NotImplementedError as bad:
            raise UserError(
                f"chat=true was asked for with a task that scores log-probs of given answers: {bad}; leave chat out"
            ) from bad
    assert found is not None  # of the first process, and there is one only
    return found


def client(engine: Engine, tokenizer: Path, asked: Asked, url: str) -> dict[str, Any]:
    """How the client is set up. Many prompts are under way, so that the engine batches them: in one request, since not
    all answers to concurrent ones can be kept (lm-eval 0.4.13 fails over rolling log-probs); a chat is one a request.
    """
    found: dict[str, Any] = {
        "model": NAME,
        "base_url": f"{url}/v1/{'chat/' if asked.chat else ''}completions",
        "max_length": engine.max_tokens,
        "timeout": HOURS * 3600,
    }
    if asked.chat:  # the server does all of it
        return found | {"num_concurrent": 2 * engine.rows}
    return found | {
        "tokenizer_backend": "huggingface", "tokenizer": str(tokenizer), "batch_size": min(4 * engine.rows, 64),
    }  # fmt: skip


@contextlib.contextmanager
def past_proxies() -> Iterator[None]:
    """Inside, clients ask this machine itself, whatever the environment says of other places."""
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = ",".join(filter(None, ["127.0.0.1", before or os.environ.get("NO_PROXY")]))
    try:
        yield
    finally:
        del os.environ["no_proxy"]
        if before is not None:
            os.environ["no_proxy"] = before


def reasoning(asked: Asked) -> dict[str, Any]:
    """Fields of each request for an answer."""
    found: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": asked.thinking > 0}}
    return found | ({"thinking_token_budget": asked.thinking} if asked.thinking else {})


def cells_of(found: Mapping[str, Any]) -> list[Cell]:
    """One for every metric of every task, with Wilson's interval for shares of what was right, and 1.96 standard errors
    to either side of what else has one."""
    cells = []
    for task, metrics in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in OTHER:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            half = Z * error if isinstance(error, int | float) else float("nan")
            low, high = wilson(value, count) if metric in SHARES and 0 <= value <= 1 else (value - half, value + half)
            column = metric if kind in ("", "none") else f"{metric} ({kind})"
            cells.append(Cell(task=task, column=column, count=count, score=value, low=low, high=high))
    return cells


SHARES = ("acc", "acc_norm", "exact_match", "pass@1", "prompt_level_strict_acc", "prompt_level_loose_acc")
OTHER = ("alias", "sample_len", "sample_count", "name")  # entries of a task that are no metrics
