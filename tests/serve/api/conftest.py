"""A server in this process, on a port of its own, over the fake service."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import pathlib
import threading
import time

import pytest

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "orjson", "httpx", "openai")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    collect_ignore_glob = ["test_*"]  # the extras `serve` and `bench` are not installed
else:
    import httpx
    import openai

    from nautilus.serve.api.app import create_app
    from nautilus.serve.api.context import ApiSettings
    from nautilus.serve.api.server import Server, bound
    from nautilus.serve.api.settings import Limits

    # Files of tests are no package, so this one is found by its place.
    spec = importlib.util.spec_from_file_location("fake_service", pathlib.Path(__file__).with_name("fake.py"))
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)


@dataclasses.dataclass
class Running:
    service: object
    server: object
    url: str
    loop: asyncio.AbstractEventLoop

    def client(self, **more):
        return httpx.Client(base_url=self.url, timeout=20, verify=False, **more)  # to make a TLS context takes long

    def openai(self, **more):
        return openai.OpenAI(
            base_url=self.url + "/v1", api_key="none", max_retries=0, http_client=httpx.Client(verify=False), **more
        )

    def until(self, holds, seconds=5.0):
        """Whether something comes true in this time."""
        end = time.monotonic() + seconds
        while not (true := holds()) and time.monotonic() < end:
            time.sleep(0.005)
        return true


@contextlib.contextmanager
def serving(limits=None, grace=0.2, **settings):
    limits = limits or Limits()
    service, listening, ready = fake.FakeService(), bound("127.0.0.1", 0), threading.Event()
    server = Server(
        create_app(service, ApiSettings(model="tiny", version="1.2.3", limits=limits, **settings)),
        limits=limits, grace=grace,
    )  # fmt: skip
    failures = []

    async def run():
        server.config.lifespan = "on"
        waiting = asyncio.ensure_future(server.serve([listening]))
        while not server.started and not waiting.done():
            await asyncio.sleep(0.002)
        running.loop = asyncio.get_running_loop()
        ready.set()
        await waiting

    def work():
        try:
            asyncio.run(run())
        except BaseException as bad:
            failures.append(bad)
        finally:
            ready.set()

    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = Running(service, server, url, None)  # type: ignore[arg-type]
    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(10)
    try:
        yield running
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended already
            running.loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        thread.join(10)
    assert not thread.is_alive() and not failures, failures


@pytest.fixture
def serve():
    """serve(limits=..., keys=..., ...): a server with settings of its own, as a context."""
    return serving


@pytest.fixture(scope="module")
def shared():
    with serving() as running:
        yield running


@pytest.fixture
def here(shared):
    """One server for the tests of a file; what it answers begins anew."""
    assert shared.until(lambda: not shared.server.config.app.state.context.reading_ahead)
    shared.service.reset()
    return shared


@pytest.fixture(scope="module")
def shared_clients(shared):
    with shared.client() as client, shared.openai() as official:
        yield client, official


@pytest.fixture
def api(here, shared_clients):
    return shared_clients[0]


@pytest.fixture
def client(here, shared_clients):
    """The official one."""
    return shared_clients[1]
