import gc
import hashlib
import importlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nautilus.runtime import UserError

HI = {"messages": [{"role": "user", "content": "Hi"}]}
KEY, OTHER = "sk-" + "a" * 40, "sk-" + "b" * 40
CHAT = "/v1/chat/completions"


@pytest.fixture
def limits():
    from nautilus.serve.api.settings import Limits

    return Limits


@pytest.fixture
def keys():
    from nautilus.serve.api.keys import Keys

    return Keys


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def port(here):
    return int(here.url.rpartition(":")[2])


# ----- bodies --------------------------------------------------------------------------------------------------------


def test_a_long_body_is_refused_by_its_header_and_while_it_comes(serve, limits):
    with serve(limits=limits(body=1000)) as here, here.client() as api:
        big = json.dumps({**HI, "user": "x" * 2000})
        headers = {"content-type": "application/json"}
        assert code(api.post(CHAT, content=big, headers=headers)) == (413, "body_too_long")
        in_parts = (big[i : i + 100].encode() for i in range(0, len(big), 100))
        assert code(api.post(CHAT, content=in_parts, headers=headers)) == (413, "body_too_long")
        assert api.post(CHAT, json=HI).status_code == 200


@pytest.mark.parametrize(
    "body, want",
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b'{"a": "\\ud800"}', "invalid_json"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", "too_deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"a": [' + b"0," * 250_000 + b"0]}", "too_many_values"),
    ],
)
def test_what_is_no_json_of_this_api_is_refused(api, body, want):
    answer = api.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert code(answer) == (400, want)


@pytest.mark.parametrize(
    "wrong", [{"prompt": [None] * 10_000}, {"prompt": "a", "logit_bias": {str(i): None for i in range(10_000)}}]
)
def test_of_very_many_faults_few_are_looked_for(wrong):
    from nautilus.serve.api.completions import CompletionRequest
    from nautilus.serve.api.fields import read

    with pytest.raises(Exception, match="prompt.0|logit_bias.0") as refused:
        read(CompletionRequest, wrong)
    assert refused.value.__cause__.error_count() <= 4  # a prompt may be of four types


def test_nobody_looks_for_garbage_while_a_body_is_read(limits):
    from nautilus.serve.api.body import parsed

    looks = []
    gc.callbacks.append(look := lambda *_: looks.append(1))
    try:
        parsed(b'{"a":[' + b"[]," * 200_000 + b"[]]}", limits())
    finally:
        gc.callbacks.remove(look)
    assert len(looks) < 20 and gc.isenabled()
    with pytest.raises(Exception, match="not valid JSON"):
        parsed(b"[", limits())
    assert gc.isenabled()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_page_in_a_browser_cannot_ask_without_a_preflight(api, kind):
    answer = api.post(CHAT, content=json.dumps(HI), headers={"content-type": kind})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in api.options(CHAT, headers={"origin": "http://evil"}).headers


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"n": 9}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop (characters of one)"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"messages": HI["messages"] * 2049}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 257}, "tools"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * (1 << 18)}}}
                ]
            },
            "tools (bytes of one schema)",
        ),
    ],
)
def test_there_is_a_most_of_everything(api, fields, param):
    answer = api.post(CHAT, json={**HI, **fields})
    assert code(answer) == (400, "too_many") and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("path, body", [(CHAT, HI), ("/v1/completions", {"prompt": "x"})])
def test_nobody_goes_before_all_others_unless_the_server_says_so(serve, limits, path, body):
    with serve(limits=limits(priority=-5)) as here, here.client() as api:
        assert api.post(path, json={**body, "priority": -5}).status_code == 200
        refused = api.post(path, json={**body, "priority": -6})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"
    with serve() as here, here.client() as api:
        assert api.post(path, json={**body, "priority": -1}).status_code == 400


def test_rendering_that_takes_too_long_is_given_up(serve, limits, monkeypatch):
    import nautilus.serve.api.chat as chat

    monkeypatch.setattr(chat, "chat_tokens", lambda *given, **more: time.sleep(0.3) or [1])
    with serve(limits=limits(rendering=0.05)) as here, here.client() as api:
        assert code(api.post(CHAT, json=HI)) == (408, "timeout")
        assert here.service.jobs == []


@pytest.mark.parametrize(
    "slow, place, name",
    [
        ({"response_format": {"type": "json_object"}}, "constraints", "compile_grammar"),
        ({"structured_outputs": {"regex": "a"}}, "constraints", "compile_grammar"),
        ({"user": "x" * (1 << 18)}, "chat", "chat_tokens"),
    ],
)
def test_what_takes_long_to_read_keeps_nobody_else_waiting(serve, limits, monkeypatch, slow, place, name):
    module = importlib.import_module(f"nautilus.serve.api.{place}")
    go, begun, own = threading.Event(), [], getattr(module, name)

    def wait(*given, **more):
        begun.append(1)
        go.wait(15)
        return own(*given, **more)

    monkeypatch.setattr(module, name, wait)
    with serve(limits=limits(rendering=20)) as here, here.client() as api, ThreadPoolExecutor(20) as clients:
        try:
            waiting = [clients.submit(api.post, CHAT, json={**HI, **slow}) for _ in range(20)]
            here.until(lambda: len(begun) >= 8, 1)  # fewer may be at it than there are
            assert api.post("/v1/completions", json={"prompt": "x"}, timeout=5).status_code == 200
        finally:
            go.set()
        assert {one.result().status_code for one in waiting} == {200}


# ----- keys ----------------------------------------------------------------------------------------------------------


def test_all_paths_but_health_and_the_page_need_a_key(serve, keys):
    from nautilus.serve.api.page import PAGE

    with serve(keys=keys([KEY, OTHER])) as here, here.client() as api:
        paths = {
            path: methods
            for route in here.server.config.app.routes
            if (path := route.path)
            for methods in [route.methods]
        }
        for path in paths:
            answer = api.request("POST" if "POST" in paths[path] else "GET", path.replace("{name:path}", "tiny"))
            if path in PAGE or path.removeprefix("/v1") in ("/health", "/health/ready", "/ping"):
                assert answer.status_code == 200
            else:
                error = answer.json()["error"]
                assert (answer.status_code, error["type"]) == (401, "authentication_error"), path
                assert "/messages" in path or error["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert api.get("/nowhere").status_code == 401


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {OTHER}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": "Bearer sha256:" + hashlib.sha256(KEY.encode()).hexdigest()}, 401),
        ({"authorization": b"Bearer \xff\xfe"}, 401),
    ],
)
def test_a_key_comes_in_one_of_two_headers(serve, keys, headers, status):
    with serve(keys=keys([KEY, OTHER])) as here, here.client() as api:
        assert api.get("/v1/models", headers=headers).status_code == status


def test_only_hashes_of_keys_are_held_and_all_are_compared(keys, monkeypatch):
    held = keys([KEY, "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()])
    assert KEY not in repr(vars(held)) and held.owner(KEY) != held.owner(OTHER) and held.owner("c" * 40) is None
    compared = []
    monkeypatch.setattr("nautilus.serve.api.keys.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    assert held.owner(KEY) and len(compared) == 2, "no early end"


def test_each_key_has_prefixes_of_its_own(serve, keys):
    with serve(keys=keys([KEY, OTHER])) as here, here.client() as api:
        for key, salt in ((KEY, None), (OTHER, None), (KEY, "s"), (KEY, None)):
            api.post(CHAT, json={**HI, "cache_salt": salt}, headers={"x-api-key": key})
        tenants = [job.tenant for job in here.service.jobs]
        assert len(set(tenants)) == 3 and tenants[0] == tenants[3]
        assert here.until(lambda: len(here.service.warmed) == 4)
        assert {job.tenant for job in here.service.warmed} == set(tenants)
        assert not any(key in tenant for key in (KEY, OTHER) for tenant in tenants)


def test_keys_are_read_from_a_file(tmp_path, keys):
    from nautilus.serve.api.keys import keys_from, others_may_read

    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n{KEY}\nsha256:{hashlib.sha256(OTHER.encode()).hexdigest()}\n")
    file.chmod(0o600)
    found = keys_from(str(file))
    assert found.owner(KEY) and found.owner(OTHER) and not others_may_read(str(file))
    file.chmod(0o644)
    assert others_may_read(str(file))
    for text, message in (
        ("short\n", "at least 16"),
        ("# none\n", "holds no key"),
        ("two words that are long\n", "blanks"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            keys_from(str(file))
    with pytest.raises(UserError, match="no such file"):
        keys_from(str(tmp_path / "absent"))


def test_a_key_has_its_rate_and_its_number_of_requests(serve, keys, limits):
    with serve(keys=keys([KEY, OTHER]), limits=limits(key_rate=3)) as here, here.client() as api:
        ask = lambda key: api.get("/v1/models", headers={"x-api-key": key})
        assert [ask(KEY).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
        assert 1 <= int(ask(KEY).headers["retry-after"]) <= 60 and ask(OTHER).status_code == 200
    with serve(keys=keys([KEY]), limits=limits(key_requests=1)) as here, here.client(headers={"x-api-key": KEY}) as api:
        here.service.answers, here.service.pause = [None, "</think>a"], 0.01
        with api.stream("POST", CHAT, json={**HI, "stream": True}):
            assert code(api.get("/v1/models")) == (429, "concurrency")
        assert here.until(lambda: api.get("/v1/models").status_code == 200)


# ----- hosts and connections -----------------------------------------------------------------------------------------


def test_a_name_that_leads_to_the_loopback_is_not_enough(serve):
    with serve(local_only=True) as here, here.client() as api:
        for host, status in (("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("evil.example", 403)):
            assert api.get("/v1/models", headers={"host": host}).status_code == status
        assert api.get("/health", headers={"host": "evil.example"}).status_code == 200


def test_there_are_so_many_connections_only(serve, limits):
    with serve(limits=limits(connections=2)) as here:
        held = [socket.create_connection(("127.0.0.1", port(here))) for _ in range(2)]
        assert here.until(lambda: len(here.server.server_state.connections) == 2)
        with socket.create_connection(("127.0.0.1", port(here))) as third:
            third.settimeout(5)
            answer = third.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503") and b'"code":"connections"' in answer
        for connection in held:
            connection.close()
        assert here.until(lambda: not here.server.server_state.connections)
        with here.client() as api:
            assert api.get("/health").status_code == 200


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: local"])
def test_who_does_not_say_what_it_wants_is_left(serve, limits, before, sent):
    with serve(limits=limits(idle=0.2)) as here, socket.create_connection(("127.0.0.1", port(here))) as slow:
        slow.settimeout(3)
        if before:
            slow.sendall(before)
            assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        slow.sendall(sent)
        assert slow.recv(4096) == b"", "the server has closed the connection"


def test_who_sends_its_request_too_slowly_is_told_so(serve, limits):
    with serve(limits=limits(sending=0.2)) as here, socket.create_connection(("127.0.0.1", port(here))) as slow:
        slow.settimeout(5)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        slow.sendall(head.encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_long_headers_are_refused(here):
    with socket.create_connection(("127.0.0.1", port(here))) as client:
        client.settimeout(5)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (70 << 10))
        assert client.recv(4096).startswith(b"HTTP/1.1 4")
