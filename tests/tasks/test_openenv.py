"""Environments of OpenEnv as tasks: over HTTP, and over connections."""

import contextlib
import itertools
import json
import pickle
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import Call, GraderBroken, Reply
from nautilus.tasks.asked import asked

pytest.importorskip("httpx")

SCHEMA = {"type": "object", "properties": {"guess": {"type": "integer"}, "metadata": {}}, "required": ["guess"]}


class Guessing:
    """A number from 0 to 9 is to be found: a tenth for each guess that is nearer, one for the number."""

    def __init__(self, shown="warmer or colder"):
        self.shown, self.steps, self.id, self.hidden = shown, 0, None, 0

    def reset(self, seed):
        self.rng = random.Random(seed)
        self.hidden, self.steps, self.last = self.rng.randrange(10), 0, 99
        self.id = f"{seed} {random.random()}"
        return {"observation": {"says": self.shown, "metadata": {"id": self.id}}, "reward": None, "done": False}

    def step(self, action):
        if not isinstance(action.get("guess"), int):
            raise ValueError("guess must be an integer")
        if action["guess"] == 666:
            raise RuntimeError("no")
        self.steps += 1
        off, self.last, before = abs(action["guess"] - self.hidden), action["guess"], self.last
        nearer = off < abs(before - self.hidden)
        says = "found" if not off else "warmer" if nearer else "colder"
        reward = 1.0 if not off else 0.1 * nearer
        return {"observation": {"says": says, "luck": self.rng.random()}, "reward": reward, "done": not off}

    def state(self):
        return {"episode_id": self.id, "step_count": self.steps}


@contextlib.contextmanager
def over_http(make=Guessing, *, forgets=False, schema=True):
    """One environment for all requests, or a new one for each."""
    kept = make()

    class Answers(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def reply(self, status, value):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            here = make() if forgets else kept
            found = {"/state": here.state(), **({"/schema": {"action": SCHEMA}} if schema else {})}.get(self.path)
            self.reply(200 if found else 404, found or {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here = make() if forgets else kept
            if forgets and self.path == "/step":
                here.reset(1)
            try:
                found = here.reset(body["seed"]) if self.path == "/reset" else here.step(body["action"])
                self.reply(200, found)
            except ValueError as bad:
                self.reply(422, {"detail": str(bad)})
            except RuntimeError:
                self.reply(500, {"detail": "crashed"})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextlib.contextmanager
def over_connections(most=99):
    """An environment for each connection. A request that is none of a connection is answered with the schema."""
    sync = pytest.importorskip("websockets.sync.server")
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    open_now = []

    def plain(connection, request):
        if request.path == "/schema":
            data = json.dumps({"action": SCHEMA}).encode()
            return Response(200, "OK", Headers({"Content-Length": str(len(data)), "Connection": "close"}), data)
        return None

    def answer(connection):
        error = lambda code, why: connection.send(json.dumps({"type": "error", "data": {"code": code, "message": why}}))
        open_now.append(connection)
        here = Guessing()
        for text in connection:
            asked = json.loads(text)
            try:
                if len(open_now) > most:
                    error("CAPACITY_REACHED", "no room")
                    continue
                given = asked["data"]
                found = here.reset(given["seed"]) if asked["type"] == "reset" else here.step(given)
                connection.send(json.dumps({"type": "observation", "data": found}))
            except ValueError as bad:
                error("VALIDATION_ERROR", str(bad))
            except RuntimeError:
                error("EXECUTION_ERROR", "crashed")
        open_now.remove(connection)

    with sync.serve(answer, "127.0.0.1", 0, process_request=plain, close_timeout=1) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", open_now
        finally:
            server.shutdown()
            thread.join(10)


def guess(*numbers):
    return Reply(calls=tuple(Call(name="step", arguments={"guess": number}) for number in numbers))


def some(task, count=3):
    return [*itertools.islice(task.problems("train", seed=1), count)]


def solved(task, problem):
    """Guesses from 0 upwards, to the end."""
    hidden = random.Random(problem.truth["seed"]).randrange(10)
    episode = task.episode(problem)
    for number in range(hidden):
        (told,) = episode.hear(guess(number))
        assert json.loads(told["content"])["says"] == "warmer"
    assert not episode.hear(guess(hidden))
    return episode.verdict(), hidden


def test_an_episode_over_http():
    with over_http() as url:
        one = asked(f"openenv@{url}*0.5")
        assert one.task.name == f"openenv@{url}" and one.share == 0.5
        problems = some(one.task)
        assert len({problem.id for problem in problems}) == 3, "told apart by their seeds"
        assert some(pickle.loads(pickle.dumps(one.task))) == problems
        for problem in problems:
            assert problem.messages[0]["content"].endswith('{"says": "warmer or colder"}')
            parameters = problem.tools[0]["function"]["parameters"]
            assert parameters["required"] == ["guess"] and [*parameters["properties"]] == ["guess"]
            verdict, hidden = solved(one.task, problem)
            assert verdict.reward == pytest.approx(1 + 0.1 * hidden)
            assert verdict.parts == {"steps": hidden + 1, "done": 1}


def test_episodes_share_the_one_environment_of_a_server():
    with over_http() as url:
        task = asked(f"openenv@{url}").task
        problems = [*some(task), some(task)[0]]
        hidden = [random.Random(problem.truth["seed"]).randrange(10) for problem in problems]
        episodes, alone = [task.episode(problem) for problem in problems], []
        for problem in problems:
            episode = task.episode(problem)
            alone.append([episode.hear(guess(number)) for number in range(-3, 0)])
        together = [[episode.hear(guess(number)) for episode in episodes] for number in range(-3, 0)]
        assert [[*turns] for turns in zip(*together, strict=True)] == alone
        for episode, number in zip(episodes, hidden, strict=True):
            assert not episode.hear(guess(number)) and episode.verdict().parts["done"]


def test_an_episode_over_a_connection_of_its_own():
    with over_connections() as (url, open_now):
        task = asked(f"openenv@{url}").task
        problems = some(task)
        episodes = [task.episode(problem) for problem in problems]
        told = [episode.hear(guess(-1)) for episode in episodes]
        assert len(told) == 3 and all(told)
        for problem in problems:
            assert solved(task, problem)[0].reward >= 1
        del episodes
        for _ in range(200):
            if not open_now:
                break
            threading.Event().wait(0.02)
        assert not open_now, "closed when nobody holds them"


@pytest.mark.parametrize("kind", ["http", "connections"])
def test_mistakes_are_told_to_the_model_and_crashes_cost_the_episode(kind):
    with over_http() if kind == "http" else over_connections() as found:
        task = asked(f"openenv@{found if kind == 'http' else found[0]}").task
        problem = some(task, 1)[0]
        episode = task.episode(problem)
        assert "guess must be an integer" in episode.hear(guess("x"))[0]["content"]
        assert episode.hear(Reply(fault="unreadable"))[0]["content"] == "error: unreadable"
        assert len(episode.hear(guess(-2, -1))) == 2 and episode.verdict().parts["steps"] == 2
        assert not episode.hear(Reply(content="I give up.")) and not episode.verdict().parts["done"]
        episode = task.episode(problem)
        with pytest.raises(GraderBroken, match="500|crashed"):
            episode.hear(guess(666))
        assert solved(task, problem)[0].reward >= 1, "others go on"


def test_older_servers_have_no_schema():
    with over_http(schema=False) as url:
        task = asked(f"openenv@{url}").task
        assert some(task, 1)[0].tools[0]["function"]["parameters"]["properties"] == {}


def test_an_environment_that_forgets_is_found_out():
    with over_http(forgets=True) as url:
        task = asked(f"openenv@{url}").task
        with pytest.raises(GraderBroken, match="it forgets between requests.*write ws://"):
            task.episode(some(task, 1)[0]).hear(guess(-1))


def test_an_environment_that_does_something_else_with_the_same_seed_is_found_out():
    count = itertools.count()

    class Starts(Guessing):
        def reset(self, seed):
            self.shown = f"{next(count)}"
            return super().reset(seed)

    class Steps(Guessing):
        def step(self, action):
            found = super().step(action)
            return {**found, "observation": {"says": next(count)}}

    with over_http(Starts) as url:
        task = asked(f"openenv@{url}").task
        with pytest.raises(GraderBroken, match="does not begin alike with seed"):
            task.episode(some(task, 1)[0]).hear(guess(-1))
    with over_http(Steps) as url:
        task = asked(f"openenv@{url}").task
        one, other = (task.episode(problem) for problem in some(task, 2))
        one.hear(guess(-1))
        other.hear(guess(-1))
        with pytest.raises(GraderBroken, match="does not do the same again"):
            one.hear(guess(-1))


@pytest.mark.parametrize("kind", ["http", "ws"])
def test_an_environment_that_is_not_there(kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"{kind}://127.0.0.1:{taken.getsockname()[1]}"
    task = asked(f"openenv@{place}").task
    with pytest.raises(UserError, match="is there an environment at"):
        some(task, 1)
    with over_http() as url:
        problem = some(asked(f"openenv@{url}").task, 1)[0]
    with pytest.raises(GraderBroken, match="answer"):
        task.episode(problem).hear(guess(1))


def test_a_server_without_room_costs_the_episodes_it_has_none_for():
    with over_connections(most=1) as (url, _):
        task = asked(f"openenv@{url}").task
        problem = some(task, 1)[0]
        task.drawing = None
        threading.Event().wait(0.2)
        one, other = task.episode(problem), task.episode(problem)
        assert one.hear(guess(-1))
        with pytest.raises(GraderBroken, match="CAPACITY_REACHED"):
            other.hear(guess(-1))


@pytest.mark.parametrize("words", ["openenv@http://h:1#rows", "openenv@h:1"])
def test_addresses_that_are_none_are_refused(words):
    with pytest.raises(UserError):
        asked(words)
