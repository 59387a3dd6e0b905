"""Two replicas of a small model in processes of their own, asked over HTTP as a client asks."""

import concurrent.futures
import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from nautilus.cli import main
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.model.save import save_model
from nautilus.presets import preset, shrink

httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")

START = 300  # seconds, for a dozen processes; 15 where nothing else runs
HARMLESS = {"RAY_memory_monitor_refresh_ms": "0"}  # it would end replicas where other programs fill the memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    config = dataclasses.replace(
        shrink(preset("lightning")), vocab=tokenizer.vocab, positions=60_000, eos=tokenizer.stop
    )
    path = tmp_path_factory.mktemp("scale") / "tiny"
    save_model(Language(config).initialise(1), path, tokenizer=tokenizer)
    (path.parent / "keys").write_text(f"{KEY}\n{OTHER}\n")
    (path.parent / "keys").chmod(0o600)
    return path


KEY, OTHER = "k" * 40, "o" * 40


class Server:
    def __init__(self, folder):
        settings = f"replicas=2 port=0 keys={folder.parent / 'keys'} saved_gb=0.1 cache_gb=0.1 grace=60"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nautilus", "serve", str(folder), *settings.split()], stdout=subprocess.PIPE,
            text=True, env={**os.environ, **HARMLESS},
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        self.listening = threading.Thread(target=lambda: [lines.put(line) for line in self.process.stdout])
        self.listening.start()
        try:
            said = lines.get(timeout=START)
        except queue.Empty:
            self.process.terminate()
            raise
        assert "16 requests together in 2 replicas" in said
        self.url = re.search(r"http://\S+?(?=/v1)", said)[0]

    def openai(self, key=KEY):
        return openai.OpenAI(
            base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=120, http_client=httpx.Client(verify=False)
        )

    def api(self, key=KEY):
        return httpx.Client(
            base_url=self.url, timeout=120, verify=False, headers={"Authorization": f"Bearer {key}"}
        )  # fmt: skip

    def metric(self, name):
        """By replica."""
        with self.api() as api:
            text = api.get("/metrics").text
        found = re.findall(rf'^vllm:{name}{{engine="(\d)",[^}}]*}} (\S+)$', text, re.MULTILINE)
        return {rank: float(value) for rank, value in found}

    def until(self, holds, seconds):
        end = time.monotonic() + seconds
        while not (true := holds()) and time.monotonic() < end:
            time.sleep(0.2)
        return true


@pytest.fixture(scope="module")
def server(folder):
    pytest.importorskip("ray.serve")
    running = Server(folder)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        try:
            running.process.wait(60)
        finally:
            running.process.kill()
            running.listening.join()
            running.process.stdout.close()


def chat(client, messages, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 6, "temperature": 0} | more)


def said(role, content):
    return {"role": role, "content": content}


def begun(client, text, tokens=50_000):
    """A long answer of which the stream has begun: it was taken, and a replica may or may not know of it yet."""
    stream = chat(client, [said("user", text)], stream=True, max_tokens=tokens, extra_body={"ignore_eos": True})
    next(iter(stream))
    return stream


@pytest.mark.slow
def test_streams_come_piece_by_piece_and_as_a_whole_they_are_the_same(server):
    with server.openai() as client:
        more = {"max_tokens": 600, "extra_body": {"ignore_eos": True}}  # it takes much longer than a piece is held back
        whole = chat(client, [said("user", "Tell me of rivers")], **more)
        parts = [*chat(client, [said("user", "Tell me of rivers")], **more, stream=True)]
    content = "".join(
        (part.choices[0].delta.content or "") + (getattr(part.choices[0].delta, "reasoning_content", None) or "")
        for part in parts
        if part.choices
    )
    message = whole.choices[0].message
    assert content == (getattr(message, "reasoning_content", None) or "") + (message.content or "")
    assert len(parts) > 3 and parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.slow
def test_conversations_stay_with_the_replica_that_knows_them(server):
    before = server.metric("prompt_tokens_cached_total")
    with server.openai() as client:
        talks = [[said("user", f"{text} " * 40)] for text in ("one thing", "and another")]
        for turn in range(3):
            for talk in talks:
                answer = chat(client, talk)
                cached = answer.usage.prompt_tokens_details.cached_tokens
                assert turn == 0 or cached > 350 + 10 * turn, (turn, cached)
                talk += [said("assistant", answer.choices[0].message.content or "-"), said("user", "go on, please")]
    gained = {rank: value - before.get(rank, 0) for rank, value in server.metric("prompt_tokens_cached_total").items()}
    assert min(gained.values()) > 700, "each replica has one of them"


@pytest.mark.slow
def test_keys_and_tenants_are_as_with_one_engine(server):
    with server.api("wrong") as stranger:
        assert stranger.get("/v1/models").status_code == 401
    talk = [said("user", "what only one of us has said " * 4)]
    with server.openai() as mine, server.openai(OTHER) as theirs:
        chat(mine, talk)
        assert chat(theirs, talk).usage.prompt_tokens_details.cached_tokens == 0
        assert chat(mine, talk).usage.prompt_tokens_details.cached_tokens > 60


@pytest.mark.slow
def test_grammars_hold_and_bad_requests_are_refused(server):
    with server.openai() as client:
        answer = chat(
            client, [said("user", "a or b?")], max_tokens=200, extra_body={"structured_outputs": {"choice": ["a", "b"]},
            "chat_template_kwargs": {"enable_thinking": False}},
        )  # fmt: skip
        assert answer.choices[0].message.content in ("a", "b")
        with pytest.raises(openai.BadRequestError, match="context"):
            chat(client, [said("user", "far too long " * 6000)])


@pytest.mark.slow
def test_who_leaves_frees_the_replica(server):
    with server.openai() as client:
        stream = begun(client, "Something long")
        assert server.until(lambda: sum(server.metric("num_requests_running").values()) == 1, 20)
        stream.close()
    assert server.until(lambda: sum(server.metric("num_requests_running").values()) == 0, 20)


def replicas():
    """Process ids by what Ray calls its workers."""
    found = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout
    return {int(line.split()[0]) for line in found.splitlines() if "ray::ServeReplica:nautilus" in line}


@pytest.mark.slow
def test_a_replica_that_is_killed_costs_its_own_answers_and_comes_back(server):
    before = replicas()
    assert len(before) == 2

    killed = threading.Event()

    def read(stream):
        """How much came after that, and the error."""
        count = 0
        try:
            for _ in stream:
                count += killed.is_set()
                if count > 300:
                    break
        except openai.APIError as bad:
            return count, bad
        finally:
            stream.close()
        return count, None

    with server.openai() as client, concurrent.futures.ThreadPoolExecutor() as threads:
        reading = [threads.submit(read, begun(client, text)) for text in ("Of the first", "Of the other")]
        assert server.until(lambda: [*server.metric("num_requests_running").values()] == [1, 1], 20)
        os.kill(min(before), signal.SIGKILL)
        killed.set()
        ended = [each.result(120) for each in reading]
        (failed,) = [bad for _, bad in ended if bad is not None]
        assert failed.body["code"] == "lost" and "ask again" in failed.message
        assert max(count for count, _ in ended) > 300, "the other one goes on"
        assert chat(client, [said("user", "Still there?")]).usage.completion_tokens
    # The numbers of the one that was killed may be told for a while.
    assert server.until(lambda: len(replicas() - before) == 1, START)
    assert server.until(lambda: len(server.metric("num_requests_running")) == 2, START)


@pytest.mark.slow
def test_the_ports_are_of_this_machine_or_ask_for_the_token(server):
    """Ray binds one port of each replica to every address. It must refuse who has no token."""
    grpc = pytest.importorskip("grpc")
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout.splitlines()
    mine = [line for line in listening if re.search(r'"(raylet|gcs_server|ray::)', line)]
    assert len(mine) > 5
    wide = [
        line.split()[3]
        for line in mine
        if not re.match(r"(127\.0\.0\.1|\[::1\]|\[::ffff:127\.0\.0\.1\]):", line.split()[3])
    ]
    assert len(wide) <= 2
    for place in wide:
        with grpc.insecure_channel(f"127.0.0.1:{place.rpartition(':')[2]}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=20)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_at_the_end_what_runs_may_finish_and_nothing_is_left(server):
    """The last one: it ends the server."""
    with server.openai() as client, server.api() as api, concurrent.futures.ThreadPoolExecutor() as threads:
        rest = threads.submit(list, begun(client, "The last of all", tokens=3000))
        server.process.send_signal(signal.SIGTERM)
        assert server.until(lambda: api.get("/health/ready").status_code == 503, 20)
        refused = api.post("/v1/chat/completions", json={"messages": [said("user", "Me too")]})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert rest.result(120)[-1].choices[0].finish_reason == "length"
    assert server.process.wait(60) == 0 and not replicas()


# ----- without a cluster ----------------------------------------------------------------------------------------------


def test_without_ray_it_says_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", str(folder), "replicas=2", "port=0"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"several replicas need the library 'ray(\.serve)?'", told) and "scale" in told


def test_less_than_one_replica_is_refused(folder, capsys):
    assert main(["serve", str(folder), "replicas=0", "port=0"]) == 2
    assert "replicas=0 were asked for; give 1 or more" in capsys.readouterr().err


def test_events_that_anybody_could_read_are_warned_of():
    from nautilus.recipes import serve

    told = lambda place: serve.api_module("words").warnings(serve.Settings(model="x", kv_events=place))
    assert told("") == told("tcp://127.0.0.1:5557") == []
    assert "can read the tokens of all prompts" in told("tcp://0.0.0.0:5557")[0]
