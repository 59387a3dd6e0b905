"""Answer over HTTP as OpenAI's API does.

MODEL is a run, a checkpoint folder or a hub id. Clients ask http://HOST:PORT/v1. SIGTERM and Ctrl-C let answers finish
for `grace` seconds; a second one ends them now.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nautilus
from nautilus.config import setting
from nautilus.data.template import template_of
from nautilus.data.tokenizer import load_tokenizer
from nautilus.model.weights import local_folder
from nautilus.runtime import UserError, installing
from nautilus.serve import Engine
from nautilus.serve.api.settings import Defaults, Limits
from nautilus.serve.draft.settings import drafts_of
from nautilus.serve.events import KvEvents, Publisher
from nautilus.serve.memory import SHARE, memory_bytes

LIBRARIES = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "orjson")


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    name: str = setting("", "what clients call it; by default the folder's name or the hub id")
    template: str = setting("", "how chats are written: a file, or nemotron, the family's (as the model says)")
    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 is every one of this machine")
    port: int = setting(8000, "port to listen at; 0: any that is free")
    keys: str = setting("", "file of keys, one a line, each of 16 characters or more; without it everybody may ask")
    rows: int = setting(8, "most requests that run together")
    max_tokens: int | None = setting(None, "most tokens of a request, prompt and answer together (none: the model's)")
    cache: str = setting("", "format of keys and values: bf16, fp8, int8 or f32 (as the activations)")
    cache_gb: float | None = setting(None, "most 10^9 bytes of keys and values (none: a quarter of the memory)")
    saved_gb: float = setting(2.0, "10^9 bytes for the states of known prefixes, which are not read again; 0: none")
    saved_folder: Path | None = setting(None, "folder where they outlast the server")
    saved_folder_gb: float = setting(16.0, "most 10^9 bytes of files there")
    drafts: int = setting(0, "most tokens tried at once of what may come next, where that is faster; 0: none")
    eagle: Path | None = setting(None, "with drafts: head of `nautilus eagle`, in place of the model's own block")
    predictor: Path | None = setting(None, "with drafts: payoff.safetensors of `nautilus hvd train`")
    corpus: tuple[str, ...] = setting((), "with drafts: text files or folders that answers may be copied from, for all")
    replicas: int = setting(1, "processes that answer, each with such an engine of its own; several run on Ray Serve")
    kv_events: str = setting("", "where to tell routers of known prefixes, such as tcp://127.0.0.1:5557 (none)")
    kv_replay: str = setting("", "where they ask for what they missed, such as tcp://127.0.0.1:6557 (none)")
    step_seconds: float = setting(0.25, "how long prompts are read before the others get their next token")
    step_limit: float = setting(300.0, "seconds after which a step hangs: not ready, and the log has all stacks")
    grace: float = setting(30.0, "seconds that answers have to finish when the server is told to end")
    log: str = setting("warning", "what is written to stderr: debug, info (a line for every request) or warning")
    defaults: Defaults = Defaults()
    limits: Limits = Limits()


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to serve; write nautilus serve MODEL, a run, a checkpoint folder or a hub id")
    level = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}.get(settings.log)
    if level is None:
        raise UserError(f"log={settings.log!r} was asked for; use debug, info or warning")
    if not (settings.step_limit > 0 and settings.grace >= 0):
        raise UserError(
            f"step_limit={settings.step_limit} and grace={settings.grace} were asked for; give seconds, more than 0 for"
            " the first, 0 or more for the second"
        )
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server, keys = (api_module(name) for name in ("server", "keys"))
    known = keys.keys_from(settings.keys) if settings.keys else keys.Keys()
    with server.bound(settings.host, settings.port) as listening:  # a port in use is told before the model is read
        for warning in api_module("words").warnings(settings):
            print(f"nautilus: {warning}", file=sys.stderr)
        if settings.replicas == 1:
            asyncio.run(serve(engine_of(settings), settings, known, listening))
        else:
            serve_replicas(settings, known, listening)


def engine_of(settings: Settings, rank: int = 0) -> Engine:
    """The engine of one replica. What is not said of its memory is its share of the machine's."""
    model, tokenizer = nautilus.load(settings.model)
    tokenizer.template = template_of(settings.template, tokenizer.template)
    model.requires_grad_(False)  # of weights that could change the engine forgets all prefixes between two requests
    names = "rows max_tokens cache cache_gb saved_gb saved_folder saved_folder_gb step_seconds".split()
    how = {name: getattr(settings, name) for name in names}
    drafting = {"eagle": settings.eagle, "predictor": settings.predictor, "corpus": settings.corpus}
    how["drafts"] = drafts_of(settings.drafts, model, tokenizer, **drafting)
    if settings.replicas > 1:
        how["cache_gb"] = settings.cache_gb or SHARE * memory_bytes() / settings.replicas / 1e9
        how["saved_folder"] = settings.saved_folder and settings.saved_folder / f"replica-{rank}"
    engine = Engine(model, tokenizer, **how)
    if settings.kv_events:
        engine.prefixes.tell(KvEvents(Publisher(settings.kv_events, settings.kv_replay, rank)))
    return engine


def api_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"nautilus.serve.api.{name}")
    except ImportError as bad:
        if bad.name not in LIBRARIES:
            raise
        raise UserError(f"a server needs the library {bad.name!r}; {installing('serve')}") from bad


def name_of(settings: Settings) -> str:
    path = Path(settings.model)
    return settings.name or (path.resolve().name if path.exists() else settings.model)


async def serve(engine: Engine, settings: Settings, keys, listening: socket.socket) -> None:
    from nautilus.serve.service import Service

    await answer(Service(engine, step_limit=settings.step_limit), settings, keys, listening)


def serve_replicas(settings: Settings, keys, listening: socket.socket) -> None:
    """The same over several engines in other processes; here are the connections and the words."""
    from nautilus.serve.scale import cluster

    tokenizer = load_tokenizer(local_folder(nautilus.checkpoint_of(settings.model)))
    tokenizer.template = template_of(settings.template, tokenizer.template)
    make = functools.partial(engine_of, settings)
    cluster.work_with(make, settings.replicas, tokenizer, lambda service: answer(service, settings, keys, listening))


async def answer(service: Any, settings: Settings, keys, listening: socket.socket) -> None:
    """Until a signal ends it, and the service with it."""
    app, context, server = (api_module(name) for name in ("app", "context", "server"))
    told = context.ApiSettings(
        model=name_of(settings), version=nautilus.__version__, keys=keys, limits=settings.limits,
        defaults=settings.defaults, local_only=server.loopback(settings.host) and not settings.keys,
    )  # fmt: skip
    try:
        print(api_module("words").greeting(service.engine, settings, name_of(settings), listening), flush=True)
        running = server.Server(app.create_app(service, told), limits=settings.limits, grace=settings.grace)
        await running.serve([listening])
    finally:
        await service.close()
