"""The HTTP interface of a server: OpenAI's API, Anthropic's messages, what monitors ask for, and a page to chat on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from nautilus.serve.api import anthropic, chat, completions, responses, tokenize
from nautilus.serve.api.body import read_body
from nautilus.serve.api.context import ApiSettings, Context, Prepared
from nautilus.serve.api.errors import ApiError, ClientGone, described
from nautilus.serve.api.exchange import Exchange
from nautilus.serve.api.gate import Gate
from nautilus.serve.api.keys import Quota
from nautilus.serve.api.page import add_page
from nautilus.serve.api.stream import EventStream, unless_gone
from nautilus.serve.job import Draining
from nautilus.serve.service import Service

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
Read = Callable[[Context, Mapping[str, Any]], Mapping[str, Any]]
Prepare = Callable[[Context, Mapping[str, Any], str], Prepared]


def create_app(service: Service, settings: ApiSettings) -> FastAPI:
    """The application over a service. Its paths are there with and without /v1; `app.state.context` is what they
    share."""
    context = Context(service, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        try:
            yield
        finally:
            context.close()

    app = FastAPI(title="nautilus", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.context = context
    for kind in (HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    add_state(app, context)
    add_work(app, context)
    add_kept(app, context)
    add_page(app)
    app.add_middleware(
        Gate, keys=settings.keys, quota=Quota(settings.limits), local_only=settings.local_only,
        rejected=context.meters.reject,
    )  # fmt: skip
    return app


async def answer_error(request: Request, bad: Exception) -> Response:
    return refused(request, bad)


def refused(request: Request, bad: BaseException) -> Response:
    context, error = request.app.state.context, described(bad)
    if isinstance(error, ClientGone):
        context.meters.gone.inc()
    elif error.status != 500:
        context.meters.reject(error.code or str(error.status))
    return error.response(request.url.path)


def reply(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def route(app: FastAPI, path: str, endpoint: Callable, method: str) -> None:
    """With and without /v1, as clients are configured in both ways."""
    bare = path.removeprefix("/v1")
    for name in (bare, f"/v1{bare}"):
        app.add_api_route(name, endpoint, methods=[method], response_class=Response)


def card(context: Context) -> dict[str, Any]:
    name = context.settings.model
    return {
        "id": name, "object": "model", "created": context.started, "owned_by": "nautilus", "root": name, "parent": None,
        "max_model_len": context.engine.max_tokens,
    }  # fmt: skip


def add_state(app: FastAPI, context: Context) -> None:
    """What is asked without a body."""

    async def models() -> Response:
        return reply({"object": "list", "data": [card(context)]})

    async def model(name: str) -> Response:
        context.check_model(name)
        return reply(card(context))

    async def health() -> Response:
        return Response(status_code=200 if context.service.broken is None else 503)

    async def ready() -> Response:
        return Response(status_code=200 if context.service.ready else 503)

    async def version() -> Response:
        return reply({"version": context.settings.version})

    async def metrics() -> Response:
        return Response(context.meters.text(context.service.loads()), media_type=PROMETHEUS)

    for path, endpoint in {
        "/models": models, "/models/{name:path}": model, "/health": health, "/health/ready": ready,
        "/version": version, "/metrics": metrics,
    }.items():  # fmt: skip
        route(app, path, endpoint, "GET")
    app.add_api_route("/ping", health, methods=["GET", "POST"], response_class=Response)


def add_work(app: FastAPI, context: Context) -> None:
    """What has a body."""

    def told(work: Read) -> Callable:
        async def endpoint(request: Request) -> Response:
            return await guarded(request, tell(context, work, request))

        return endpoint

    def generated(prepare: Prepare) -> Callable:
        async def endpoint(request: Request) -> Response:
            return await guarded(request, generate(context, prepare, request))

        return endpoint

    for path, work in {
        "/tokenize": tokenize.tokenize, "/detokenize": tokenize.detokenize, "/apply-template": tokenize.apply_template,
        "/messages/count_tokens": anthropic.count_tokens,
    }.items():  # fmt: skip
        route(app, path, told(work), "POST")
    for path, prepare in {
        "/chat/completions": chat.prepare, "/completions": completions.prepare, "/messages": anthropic.prepare,
        "/responses": responses.prepare,
    }.items():  # fmt: skip
        route(app, path, generated(prepare), "POST")


def add_kept(app: FastAPI, context: Context) -> None:
    """What is asked of an earlier response."""

    async def response(request: Request, id: str) -> Response:
        return reply(context.kept.response(request.state.owner, id))

    async def cancel(request: Request, id: str) -> Response:
        return reply(context.kept.cancel(request.state.owner, id))

    route(app, "/responses/{id}", response, "GET")
    route(app, "/responses/{id}/cancel", cancel, "POST")


async def guarded(request: Request, work) -> Response:
    """Errors become answers here and not further out, where each would be logged as a fault of the server."""
    try:
        return await work
    except asyncio.CancelledError:  # only the end of the server cancels one, such as one that is still being sent
        return refused(request, Draining())
    except Exception as bad:
        return refused(request, bad)


async def tell(context: Context, work: Read, request: Request) -> Response:
    body = await read_body(request, context.limits)
    return reply(await context.prepared(body, lambda asked: work(context, asked)))


async def generate(context: Context, prepare: Prepare, request: Request) -> Response:
    body, owner = await read_body(request, context.limits), request.state.owner
    prepared = await context.prepared(body, lambda asked: prepare(context, asked, owner))
    exchange = begin(context, prepared)
    await exchange.submit()
    if prepared.asked.stream:
        return EventStream(exchange, context.limits, context.meters)
    async with contextlib.aclosing(exchange):
        return reply(await unless_gone(exchange.answer(), request))


def begin(context: Context, prepared: Prepared) -> Exchange:
    asked, options = prepared.asked, prepared.asked.stream_options
    if options and not asked.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return Exchange(
        service=context.service, limits=context.limits, meters=context.meters, form=prepared.form,
        id=prepared.form.prefix + secrets.token_hex(16), model=context.settings.model, jobs=prepared.jobs,
        choices=prepared.choices,
        finished=lambda: context.read_ahead(prepared.following),
    )  # fmt: skip
