"""The command in a process of its own: killed, started again, told to end."""

import json
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import nautilus  # noqa: E402
from nautilus.serve import Engine, Sampling  # noqa: E402
from tests.serve.reliability.web import PATH, ask, body_of, command, get, model_folder, tokens_of  # noqa: E402

pytestmark = pytest.mark.slow
HOW = Sampling(seed=1, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("served") / "model", room=32768)


def want(folder, prompt, sampling):
    model, tokenizer = nautilus.load(folder)
    return Engine(model, tokenizer, rows=1).generate([prompt], sampling)[0].tokens


def body(prompt, **more):
    return body_of(prompt, HOW, ignore_eos=True, **more)


def test_a_server_that_is_killed_finds_what_it_knew(folder, tmp_path):
    states, prompt = tmp_path / "states", [*range(3, 203)]
    words = (f"saved_folder={states}", "saved_gb=0.01", "rows=2")
    with command(folder, *words) as (running, port):
        status, _, first = ask(port, body(prompt))
        assert status == 200
        end = time.monotonic() + 60
        while not [*states.glob("*.safetensors")] and time.monotonic() < end:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
    following = [*prompt, *tokens_of(first), 7]
    with command(folder, *words) as (_, port):
        _, _, second = ask(port, body(following))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 200
    assert tokens_of(first) == want(folder, prompt, HOW) and tokens_of(second) == want(folder, following, HOW)


def stream(port, count):
    """A stream of which the first event has come, and what reads the rest of it."""
    content = json.dumps(body([1, 2], stream=True) | {"max_tokens": count}).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    got = connection.recv(4096)

    def rest():
        nonlocal got
        with connection:
            while part := connection.recv(65536):
                got += part
        return got.decode()

    return rest


def test_sigterm_lets_an_answer_end_and_takes_nothing_new(folder):
    with command(folder, "rows=1", "grace=60") as (running, port):
        rests = [stream(port, 1500) for _ in range(8)]  # one after another: the last has not begun
        running.send_signal(signal.SIGTERM)
        end = time.monotonic() + 30
        while get(port, "/health/ready")[0] != 503 and time.monotonic() < end:
            time.sleep(0.005)
        status, headers, answer = ask(port, body([5]))
        assert status == 503 and headers["Retry-After"] and answer["error"]["code"] == "draining"
        for rest in rests:
            text = rest()
            assert text.count('"finish_reason":"length"') == 1 and "data: [DONE]" in text
        assert running.wait(60) == 0


def test_a_second_sigterm_ends_streams_with_an_error(folder):
    with command(folder, "rows=1", "grace=60") as (running, port):
        texts, rests = [], [stream(port, 20_000) for _ in range(3)]  # far more than end between the two signals
        readers = [threading.Thread(target=lambda rest=rest: texts.append(rest())) for rest in rests]
        for reader in readers:
            reader.start()
        running.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join()
        assert running.wait(60) == 0
        ended = [("event: error" in text, "data: [DONE]" in text) for text in texts]
        assert (True, False) in ended and {*ended} <= {(True, False), (False, True)}
        assert all('"code":"cancelled"' in text for text in texts if "event: error" in text)
