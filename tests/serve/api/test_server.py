import json
import os
import signal
import socket
import threading
import time

import pytest

from nautilus.runtime import UserError

HI = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture
def bound():
    from nautilus.serve.api.server import bound

    return bound


def end(here):
    here.loop.call_soon_threadsafe(here.server.end)


def stream_in_thread(here, got, **fields):
    def work():
        with here.client() as api:
            got.append(api.post(CHAT, json={**HI, **fields}))

    thread = threading.Thread(target=work)
    thread.start()
    assert here.until(lambda: here.service.replies and here.service.replies[-1].count > 2)
    return thread


def test_what_runs_may_finish_and_nothing_new_begins(serve):
    with serve(grace=10) as here, here.client() as api:
        here.service.pause, got = 0.02, []
        thread = stream_in_thread(here, got, stream=True)
        end(here)
        assert here.until(lambda: not here.service.ready)
        assert api.get("/health/ready").status_code == 503 and api.get("/health").status_code == 200
        refused = api.post(CHAT, json=HI)
        assert (
            refused.status_code == 503
            and refused.headers["retry-after"]
            and refused.json()["error"]["code"] == "draining"
        )
        thread.join(10)
        assert got[0].text.endswith("data: [DONE]\n\n")
        assert here.until(lambda: not here.server.started or here.server.should_exit)


@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_finish_in_time_is_ended_with_an_error(serve, stream):
    with serve(grace=0.1) as here:
        here.service.answers, here.service.pause, got = [None], 0.01, []
        thread = stream_in_thread(here, got, stream=stream)
        end(here)
        thread.join(10)
        if stream:
            error = json.loads(got[0].text.rpartition("event: error\ndata: ")[2])["error"]
        else:
            error = got[0].json()["error"]
            assert got[0].status_code == 503
        assert error["code"] == "cancelled" and "[DONE]" not in got[0].text


def test_who_is_still_sending_at_the_end_is_told_so(serve, caplog):
    with serve(grace=0) as here:
        here.server.config.timeout_graceful_shutdown = 0.2
        with socket.create_connection(("127.0.0.1", int(here.url.rpartition(":")[2]))) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert here.until(lambda: here.server.server_state.tasks)
            end(here)
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert b" 503 " in answer.partition(b"\r\n")[0] and b"the server takes nothing new" in answer
    assert "Traceback" not in caplog.text


def test_a_second_wish_to_end_does_not_wait(serve):
    with serve(grace=60) as here:
        here.service.answers, here.service.pause, got = [None], 0.01, []
        thread = stream_in_thread(here, got, stream=True)
        start = time.monotonic()
        end(here)
        assert here.until(lambda: not here.service.ready)
        end(here)
        thread.join(10)
        assert time.monotonic() - start < 5 and "event: error" in got[0].text


def test_a_signal_ends_the_server(bound, serve, caplog):
    """In the main thread, as the command runs it."""
    import asyncio

    with serve() as other:  # only for its application and service
        from nautilus.serve.api.server import Server
        from nautilus.serve.api.settings import Limits

        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        server = Server(other.server.config.app, limits=Limits(), grace=1)

        async def run():
            waiting = asyncio.ensure_future(server.serve([bound("127.0.0.1", 0)]))
            while not server.started:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(waiting, 10)

        asyncio.run(run())
        assert server.draining is not None and not other.service.ready
        assert "those that run have 1 seconds" in caplog.text, "without log=info too"
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_port_in_use_is_told_and_what_to_do(bound):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="something else .* another port"),
    ):
        bound("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    "host, port", [("no.such.host.invalid", 0), ("203.0.113.1", 0), ("127.0.0.1", 1 << 20), ("a" * 99, 1)]
)
def test_where_nobody_can_listen_is_told(bound, host, port):
    with pytest.raises(UserError, match=f"host={host} port={port}"):
        bound(host, port)


def test_which_hosts_are_this_machine_alone():
    from nautilus.serve.api.server import loopback

    assert all(map(loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))
