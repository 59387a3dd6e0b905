"""A server of this process for clients of this process: on loopback, on any free port, as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from nautilus.serve import Engine
from nautilus.serve.api.app import create_app
from nautilus.serve.api.context import ApiSettings
from nautilus.serve.api.server import Server, bound
from nautilus.serve.service import Service


@contextlib.contextmanager
def serving(engine: Engine, settings: ApiSettings) -> Iterator[str]:
    """http://127.0.0.1:PORT, where the engine answers inside the block. What runs at its end is cancelled."""
    listening, begun = bound("127.0.0.1", 0), Future()

    async def serve() -> None:
        service = Service(engine)
        try:
            server = Server(create_app(service, settings), limits=settings.limits, grace=0)
            begun.set_result(server)
            await server.serve([listening])
        finally:
            await service.close()

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as bad:
            if begun.done():
                raise
            begun.set_exception(bad)

    thread = threading.Thread(target=work, name="server")
    thread.start()
    server = begun.result()  # from now on it listens; what comes early waits
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
