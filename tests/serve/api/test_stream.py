import json
import shutil
import socket
import subprocess
import time

import openai
import pytest

HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def limits():
    from nautilus.serve.api.settings import Limits

    return Limits


def connect(here, path="/v1/chat/completions", **fields):
    """A request sent over a socket of its own."""
    body = json.dumps({**HI, **fields}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", int(here.url.rpartition(":")[2])), timeout=10)
    connection.sendall(head.encode() + b"\r\n" + body)
    return connection


def read_until(connection, end, most=1 << 20):
    got = b""
    while end not in got and len(got) < most and (part := connection.recv(65536)):
        got += part
    return got


# ----- what is written -----------------------------------------------------------------------------------------------


def test_events_are_framed_as_the_standard_says(api, here):
    here.service.answers = ["</think>a\r\n\n\u2028data: b"]
    with api.stream("POST", "/v1/chat/completions", json={**HI, "stream": True}) as answer:
        text = answer.read().decode()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    events = text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event and "\r" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "a\r\n\n\u2028data: b"


def test_usage_in_every_chunk_on_request(api):
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = api.post("/v1/chat/completions", json={**HI, "stream": True, "stream_options": options}).text
    chunks = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 0 and chunks[-1]["choices"] == []


def test_a_character_is_never_cut(api, here):
    here.service.answers = ["</think>\U0001f419\u00e9"]
    answer = api.post("/v1/chat/completions", json={**HI, "stream": True})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert [text for text in texts if text] == ["\U0001f419", "\u00e9"]


def test_tokens_of_one_step_are_one_event(api, here):
    here.service.answers, here.service.width = ["</think>" + "word " * 20], 1000
    answer = api.post("/v1/chat/completions", json={**HI, "stream": True})
    assert answer.text.count("data: {") == 3, "the role, the text, the reason"


def test_a_silent_stream_has_comments_that_clients_skip(serve, limits):
    with serve(limits=limits(ping=0.05)) as here:
        here.service.answers, here.service.pause = ["</think>ab"], 0.12
        with here.client() as api:
            assert ": ping\n\n" in api.post("/v1/chat/completions", json={**HI, "stream": True}).text
        with here.openai() as client:
            parts = client.chat.completions.create(model="tiny", stream=True, **HI)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == "ab"


def test_an_error_after_the_first_byte_is_an_event_and_the_last_one(api, here):
    here.service.fault = RuntimeError("secret at /srv/place/file.py")
    answer = api.post("/v1/chat/completions", json={**HI, "stream": True})
    assert answer.status_code == 200
    last = answer.text.rstrip("\n").split("\n\n")[-1]
    assert '"finish_reason":"error"' not in answer.text
    assert last.startswith("event: error\ndata: ") and "[DONE]" not in answer.text and "secret" not in answer.text
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "internal_error"
    assert here.service.replies[0].closed
    with here.openai() as client, pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="tiny", stream=True, **HI))


def test_an_error_before_the_first_byte_has_its_status(api, here):
    here.service.busy = 7
    answer = api.post("/v1/chat/completions", json={**HI, "stream": True})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_reads_a_stream(here):
    command = ["curl", "-sS", "-N", f"{here.url}/v1/chat/completions", "--json", json.dumps({**HI, "stream": True})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout.endswith("data: [DONE]\n\n"), done


# ----- clients that leave or do not read -----------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"n": 3}, {"stream": True, "n": 3}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_has_its_answers_cancelled(here, path, fields):
    here.service.answers, here.service.pause = [None], 0.01
    connection = connect(here, path, prompt="Hi", **fields)
    assert here.until(lambda: here.service.replies and here.service.replies[-1].count > 3)
    if fields.get("stream"):
        assert b"200 OK" in read_until(connection, b"\r\n\r\n")
    assert not here.service.replies[0].closed
    connection.close()
    assert here.until(lambda: all(reply.closed for reply in here.service.replies))
    assert len(here.service.replies) == fields.get("n", 1)


def test_disconnects_are_counted(here, api):
    count = lambda: float(api.get("/metrics").text.partition("\nnautilus:client_disconnects_total{")[2].split()[1])
    before = count()
    here.service.answers, here.service.pause = [None], 0.01
    for stream in (True, False):
        connection = connect(here, stream=stream)
        assert here.until(lambda: here.service.replies and here.service.replies[-1].count > 3)
        connection.close()
        assert here.until(lambda: here.service.replies[-1].closed)
        here.service.replies.clear()
    assert here.until(lambda: count() == before + 2)


def test_a_reader_that_is_too_slow_is_cut_off_and_nobody_else_waits(serve, limits):
    with serve(limits=limits(chunks=50)) as here, here.client() as api:
        here.service.answers, here.service.width = [None, "</think>quick"], 4000
        slow = connect(here, stream=True, max_tokens=4000, prompt="Hi")
        assert here.until(lambda: here.service.replies)
        answer = api.post("/v1/chat/completions", json=HI)
        assert answer.json()["choices"][0]["message"]["content"] == "quick"
        slow.close()


def test_what_a_slow_reader_has_not_read_is_bounded(serve, limits):
    with serve(limits=limits(chunks=20, chunk_bytes=1 << 20)) as here, here.client() as api:
        here.service.engine.max_tokens = 10**9
        here.service.answers, here.service.blow = [None], 50_000
        slow = connect(here, "/v1/completions", stream=True, prompt="Hi", max_tokens=10**8)
        assert here.until(lambda: here.service.replies and here.service.replies[0].closed)
        assert here.service.replies[0].count < 1000
        assert 'nautilus:slow_readers_total{engine="0",model_name="tiny"} 1.0' in api.get("/metrics").text
        slow.close()


def test_who_reads_nothing_for_a_while_is_cut_off(serve, limits):
    with serve(limits=limits(stalled=0.1, chunk_bytes=1 << 30)) as here, here.client() as api:
        here.service.answers, here.service.blow = ["</think>" + "a" * 90], 100_000
        slow = connect(here, "/v1/completions", stream=True, prompt="Hi", max_tokens=90)
        count = lambda: float(api.get("/metrics").text.partition("\nnautilus:slow_readers_total{")[2].split()[1])
        assert here.until(lambda: count() == 1)
        mine = slow.getsockname()
        places = lambda: [place.client for place in here.server.server_state.connections]
        assert here.until(lambda: mine not in places()), "nor does it keep its connection"
        slow.close()


def test_a_reader_that_pauses_gets_all_of_it(here):
    here.service.answers, here.service.width = ["</think>" + "word " * 700], 50
    slow = connect(here, stream=True)
    assert here.until(lambda: here.service.replies and here.service.replies[0].closed)
    time.sleep(0.05)
    assert read_until(slow, b"[DONE]").count(b"word") == 700
    slow.close()


def test_a_request_has_a_longest_time(serve, limits):
    with serve(limits=limits(seconds=0.1)) as here, here.client() as api:
        here.service.answers, here.service.pause = [None], 0.02
        answer = api.post("/v1/chat/completions", json=HI)
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
        streamed = api.post("/v1/chat/completions", json={**HI, "stream": True})
        assert "event: error" in streamed.text and '"timeout"' in streamed.text
        assert all(reply.closed for reply in here.service.replies)


def test_the_first_token_may_have_a_time_of_its_own(serve, limits):
    with serve(limits=limits(first=0.1)) as here, here.client() as api:
        here.service.pause, here.service.answers = 0.02, ["</think>" + "a" * 10]
        assert api.post("/v1/chat/completions", json=HI).status_code == 200
        here.service.delay = 0.5
        assert api.post("/v1/chat/completions", json=HI).status_code == 408


def test_a_connection_is_used_again(here):
    with here.client() as api:
        connections = []
        for _ in range(2):
            assert "[DONE]" in api.post("/v1/chat/completions", json={**HI, "stream": True}).text
            connections.append(set(here.server.server_state.connections))
        assert connections[1] <= connections[0]
