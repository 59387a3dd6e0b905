"""Servers for these tests: a real engine behind HTTP in this process, and the command in a process of its own."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import subprocess
import sys
import threading
import time

from nautilus.model.save import save_model
from nautilus.serve import Engine
from nautilus.serve.service import Service
from tests.serve.reliability.parts import TOKENIZER, hybrid

PATH = "/v1/completions"


@dataclasses.dataclass
class Running:
    service: Service
    server: object
    port: int

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def ask(self, body, path=PATH):
        return ask(self.port, body, path)

    def metric(self, name):
        """The sum over its labels."""
        status, _, text = get(self.port, "/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith(name + "{")]
        assert status == 200
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def until(self, holds, seconds=30.0):
        end = time.monotonic() + seconds
        while not (true := holds()) and time.monotonic() < end:
            time.sleep(0.01)
        return true

    def idle(self):
        return self.until(lambda: self.engine.scheduler.idle and not self.service.orders)


def request(port, method, path, body=None):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        given = None if body is None else json.dumps(body)
        connection.request(method, path, given, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def get(port, path):
    return request(port, "GET", path)


def ask(port, body, path=PATH):
    status, headers, content = request(port, "POST", path, body)
    return status, headers, json.loads(content)


def body_of(prompt, sampling, **more):
    """What asks for these over HTTP, with the tokens told."""
    return {
        "prompt": [*prompt], "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": 1,
        "seed": sampling.seed, "return_token_ids": True, **more,
    }  # fmt: skip


def tokens_of(answer):
    return tuple(answer["choices"][0]["token_ids"])


def events(text):
    """The JSON of each event of a stream, without [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@contextlib.contextmanager
def serving(engine, *, limits=None, **how):
    """how: of the service."""
    from nautilus.serve.api.app import create_app
    from nautilus.serve.api.context import ApiSettings
    from nautilus.serve.api.server import Server, bound
    from nautilus.serve.api.settings import Limits

    limits, listening, ready, made = limits or Limits(), bound("127.0.0.1", 0), threading.Event(), []

    async def run():
        service = Service(engine, **how)
        app = create_app(service, ApiSettings(model="tiny", limits=limits))
        server = Server(app, limits=limits, grace=0.1)
        waiting = asyncio.ensure_future(server.serve([listening]))
        while not server.started:
            await asyncio.sleep(0.002)
        made.append(Running(service, server, listening.getsockname()[1]))
        ready.set()
        await waiting
        await service.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield made[0]
    finally:
        made[0].service.loop.call_soon_threadsafe(setattr, made[0].server, "should_exit", True)
        thread.join(60)
    assert not thread.is_alive()


def model_folder(path, **how):
    save_model(hybrid(**how), path, tokenizer=TOKENIZER)
    return path


@contextlib.contextmanager
def command(folder, *words):
    """(process, port) of `nautilus serve`."""
    line = [sys.executable, "-m", "nautilus", "serve", str(folder), "port=0", "defaults.top_p=1", *words]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        greeting = running.stdout.readline()
        assert "answers at http://127.0.0.1:" in greeting, greeting + running.stderr.read()
        yield running, int(greeting.partition("127.0.0.1:")[2].partition("/")[0])
    finally:
        running.kill()
        running.communicate()
