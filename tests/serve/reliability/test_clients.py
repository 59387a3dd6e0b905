"""Clients that leave, do not read, or are too many, and a real engine behind HTTP."""

import contextlib
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from nautilus.serve import Sampling  # noqa: E402
from tests.serve.reliability.parts import Oracle, audit, engine_of, hybrid  # noqa: E402
from tests.serve.reliability.web import PATH, body_of, events, request, serving, tokens_of  # noqa: E402

MODEL = hybrid()
ORACLE = Oracle(MODEL)
LONG = Sampling(seed=1, max_tokens=280, temperature=0.0)


@pytest.fixture
def limits():
    from nautilus.serve.api.settings import Limits

    return Limits


def connect(running, body, receive_buffer=None):
    """A connection of its own on which a request was sent."""
    content = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    connection.settimeout(60)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", running.port))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def read_events(connection, count):
    """Until so many events have come."""
    got = b""
    while got.count(b"data: ") < count and (part := connection.recv(4096)):
        got += part
    return got


def slower(monkeypatch, engine, seconds):
    """So that pieces come one by one."""
    compute = engine.forward.step
    monkeypatch.setattr(engine.forward, "step", lambda *args: (time.sleep(seconds), compute(*args))[1])


def test_a_client_may_leave_at_every_chunk(monkeypatch):
    how = Sampling(seed=2, max_tokens=10)
    prompt = next([n, 5] for n in range(99) if len(ORACLE.answer([n, 5], how).tokens) == 10)
    with serving(engine_of(MODEL)) as running:
        slower(monkeypatch, running.engine, 0.005)
        asked = body_of(prompt, how, stream=True)
        whole = request(running.port, "POST", PATH, asked)[2].decode()
        chunks = len(events(whole))
        assert sum((event["choices"][0]["token_ids"] for event in events(whole)[1:]), []) == [
            *ORACLE.answer(prompt, how).tokens
        ]
        for count in range(chunks + 2):
            connection = connect(running, asked)
            if count:
                read_events(connection, count)
            connection.close()
            status, _, answer = running.ask(body_of([9, count], how))
            assert status == 200 and tokens_of(answer) == ORACLE.answer([9, count], how).tokens
        assert running.idle() and audit(running.engine) == []
        ended = running.metric("vllm:request_success_total")
        assert chunks + 3 <= ended <= 2 * (chunks + 2) + 1, "one that left before it was read was none"
        assert running.metric("vllm:num_requests_running") == running.metric("vllm:num_requests_waiting") == 0


def test_who_reads_a_byte_at_a_time_holds_nobody_up(monkeypatch, limits):
    with serving(engine_of(MODEL, rows=6), limits=limits(stalled=0.5)) as running:
        slow, stop = [connect(running, body_of([n], LONG, stream=True, logprobs=5), 2048) for n in range(4)], []

        def drip():
            while not stop:
                for connection in slow:
                    with contextlib.suppress(OSError):  # it was cut off
                        connection.recv(1)
                time.sleep(0.05)

        dripping = threading.Thread(target=drip)
        dripping.start()
        how = Sampling(seed=3, max_tokens=12)
        for number in range(8):
            status, _, answer = running.ask(body_of([7, number], how))
            assert status == 200 and tokens_of(answer) == ORACLE.answer([7, number], how).tokens
        assert running.idle() and audit(running.engine) == []
        stop.append(True)
        dripping.join()
        for connection in slow:
            connection.close()


def test_ten_times_too_many_are_refused_with_a_time_and_the_others_are_answered(monkeypatch):
    how, most = Sampling(seed=4, max_tokens=15), []
    with serving(engine_of(MODEL, rows=2), most_waiting=4) as running:
        slower(monkeypatch, running.engine, 0.004)

        def one(number):
            most.append(len(running.service.queued))
            return number, running.ask(body_of([number, 1], how))

        with ThreadPoolExecutor(60) as pool:
            answers = [*pool.map(one, range(60))]
        refused = [headers for _, (status, headers, _) in answers if status == 429]
        assert all(int(headers["Retry-After"]) >= 1 for headers in refused)
        answered = [(number, answer) for number, (status, _, answer) in answers if status == 200]
        assert len(refused) + len(answered) == 60 and len(refused) > 10 and len(answered) >= 6
        for number, answer in answered:
            assert tokens_of(answer) == ORACLE.answer([number, 1], how).tokens
        assert max(most) <= 6, "what waits is bounded"
        assert running.idle() and audit(running.engine) == []
        assert running.metric("nautilus:http_rejected_total") == len(refused)


def test_a_fault_is_a_500_for_one_and_the_counters_agree(monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL + 1)
    how = Sampling(seed=4, max_tokens=15)
    with serving(engine_of(MODEL)) as running:
        compute = running.engine.forward.read

        def broken(parts):
            if any(13 in part.tokens for part in parts):
                raise RuntimeError("a secret of the inside")
            logits_BV = compute(parts).clone()
            for row, part in enumerate(parts):
                logits_BV[row] *= float("nan") if 14 in part.tokens else 1.0
            return logits_BV

        monkeypatch.setattr(running.engine.forward, "read", broken)
        with ThreadPoolExecutor(6) as pool:
            answers = [*pool.map(lambda number: running.ask(body_of([number, 1], how)), range(10, 16))]
        assert [status for status, _, _ in answers] == [200, 200, 200, 500, 500, 200]
        assert "secret" not in json.dumps([answer for _, _, answer in answers]) and "NaN" not in str(answers[4][2])
        for number, (status, _, answer) in enumerate(answers, 10):
            assert status == 500 or tokens_of(answer) == ORACLE.answer([number, 1], how).tokens
        assert running.idle() and audit(running.engine) == [] and running.service.ready
        assert running.metric("vllm:request_success_total") == 6
        assert running.metric("vllm:num_requests_running") == 0
