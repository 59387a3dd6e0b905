"""Our tasks behind HTTP as NeMo Gym asks environments, and its environments as tasks of ours."""

import asyncio
import contextlib
import itertools
import json
import threading
import time

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import Call, GraderBroken, Problem, Reply, Verdict
from nautilus.tasks.asked import asked
from nautilus.tasks.gym import Gym
from nautilus.tasks.items import Misfit, items_of, turns_of, verified
from nautilus.tasks.letters import Count
from nautilus.tasks.named import TASKS
from nautilus.tasks.pivot import Pivot, reply_of
from nautilus.tasks.rows import Rows, chat_tool, posed, row_of

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from nautilus.serve.api.environments import Hosting, create_environments  # noqa: E402
from nautilus.serve.api.server import Server, bound  # noqa: E402
from nautilus.serve.api.settings import Limits  # noqa: E402


@contextlib.contextmanager
def serving(*tasks, **how):
    """The address of a server of these tasks, as long as the block lasts."""
    listening, limits = bound("127.0.0.1", 0), Limits(body=1 << 20)
    app = create_environments({one.name: one for one in tasks}, hosting=Hosting(**how), limits=limits, local_only=True)
    server = Server(app, limits=limits, grace=1)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def url():
    with serving(*(TASKS[name]() for name in ("store", "calculator", "repair", "count"))) as found:
        yield found


@pytest.fixture
def api(url):
    with httpx.Client(base_url=url, timeout=20, verify=False) as found:
        yield found


def some(name, count=5, seed=1):
    return [*itertools.islice(TASKS[name]().problems("train", seed=seed), count)]


def played(episode, problem, change=lambda reply: reply):
    """The worked course of a problem, with what the tools answered on the way."""
    heard = []
    for message in problem.worked:
        if message["role"] == "assistant":
            heard += [one["content"] for one in episode.hear(change(reply_of(message)))]
    return heard


# ----- rows and responses, in this process --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TASKS, "pivot/store"])
def test_a_row_is_the_problem_again(name):
    task = Pivot(TASKS["store"]()) if name.startswith("pivot/") else TASKS[name]()
    for problem in itertools.islice(task.problems("train", seed=3), 10):
        again = posed(json.loads(json.dumps(row_of(problem))), task)
        assert again.id == problem.id and again.level == problem.level and again.tools == problem.tools
        assert json.loads(json.dumps(again.truth)) == json.loads(json.dumps(problem.truth))


def test_rows_of_others_keep_all_that_they_have():
    row = {"responses_create_params": {"input": "1 + 1?"}, "expected_answer": "2", "agent_ref": {"name": "math"}}
    task = Rows("math", [row])
    problem = posed({**row, "_ng_task_index": 3}, task)
    assert task.grade(problem, Reply(content="\\boxed{2}")).reward == 1
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    nested = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    assert chat_tool(flat) == chat_tool(nested) == nested
    with pytest.raises(ValueError, match="a tool without a name"):
        chat_tool({"type": "web_search"})


@pytest.mark.parametrize(
    "reply",
    [
        Reply(content="so"), Reply(content="so", thinking="hm"), Reply(content=""),
        Reply(thinking="hm", calls=(Call(name="f", arguments={"x": [1, "é"]}), Call(name="g", arguments={}))),
    ],
)  # fmt: skip
def test_a_turn_as_items_is_the_same_turn(reply):
    (turn,) = turns_of(json.loads(json.dumps(items_of(reply, 1))))
    assert turn.reply == reply and turn.told == []


def test_items_of_other_servers_are_read():
    output = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}], "summary": []},
        {"role": "assistant", "content": "b"},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "function_call", "name": "g", "arguments": "[", "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "output_text", "text": "y"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
    ]
    first, second = turns_of(output)
    assert (first.thinking, first.content, first.told) == ("a", "b", ["x", "y"])
    assert first.reply.calls == () and "'g' cannot be read" in first.reply.fault
    assert second.reply == Reply(content="c")


@pytest.mark.parametrize("output", [None, "x", [5], [{"type": "image"}], [{"type": "function_call_output"}], []])
def test_what_is_no_response_is_a_misfit(output):
    with pytest.raises(Misfit, match="response.output"):
        verified(TASKS["count"](), some("count", 1)[0], {"output": output})


# ----- our server ---------------------------------------------------------------------------------------------------


def seeded(api, problem):
    answer = api.post("/seed_session", json=row_of(problem))
    assert answer.status_code == 200 and answer.json() == {} and api.cookies.get("session")


@pytest.mark.parametrize("name", ["store", "calculator", "repair"])
def test_an_agent_plays_an_episode_with_tools(api, name):
    for problem in some(name, 6):
        seeded(api, problem)
        output, course = [], [*problem.worked]
        for number, message in enumerate(course):
            if message["role"] != "assistant":
                continue
            reply = reply_of(message)
            output += items_of(reply, number)
            for at, call in enumerate(reply.calls):
                answer = api.post(f"/{call.name}", json=dict(call.arguments))
                assert answer.text == course[number + 1 + at]["content"]
                item = {"type": "function_call_output", "call_id": f"call_{number}_{at}", "output": answer.text}
                output.append(item)
        body = {**row_of(problem), "extra": 1, "response": {"output": output}}
        found = api.post("/verify", json=body).json()
        assert found["reward"] == 1 and found["reward_components"]["faults"] == 0
        assert {**body, "reward": found["reward"], "reward_components": found["reward_components"]} == found
        # The session is over; a verdict can be had again.
        assert api.post(f"/{reply_of(course[0]).calls[0].name}", json={}).json()["error"]["code"] == "no_session"
        assert api.post("/verify", json=body).json() == found


def test_sessions_are_apart(url):
    first, second = some("store", 2)
    with httpx.Client(base_url=url, verify=False) as one, httpx.Client(base_url=url, verify=False) as other:
        for client, problem in ((one, first), (other, second)):
            seeded(client, problem)
            client.post("/put", json={"key": "sun", "value": problem.id})
        assert one.post("/get", json={"key": "sun"}).text == first.id
        assert other.post("/get", json={"key": "sun"}).text == second.id
        seeded(one, first)
        assert one.post("/get", json={"key": "sun"}).text != first.id, "a new session begins anew"


def verify(api, problem, output, **more):
    return api.post("/verify", json={**row_of(problem), "response": {"output": output, **more}})


def test_a_response_whose_tools_said_something_else_is_a_misfit(api):
    problem = some("calculator", 1)[0]
    call = Reply(calls=(Call(name="calculate", arguments={"expression": "1 + 1"}),))
    output = [*items_of(call, 1), {"type": "function_call_output", "call_id": "call_1_0", "output": problem.truth}]
    answer = verify(api, problem, [*output, *items_of(Reply(content=problem.truth), 2)])
    assert answer.status_code == 422 and "here it is ['2']" in answer.json()["error"]["message"]
    assert verify(api, problem, output[:1]).json()["reward"] == 0, "cut off before an answer"


@pytest.mark.parametrize(
    "change, status, said",
    [
        ({"agent_ref": {"name": "walk"}}, 400, "the tasks here are store, calculator, repair, count"),
        ({"agent_ref": None}, 400, "agent_ref.name is 'None'"),
        ({"responses_create_params": {}}, 400, "the row has no messages"),
        ({"responses_create_params": {"input": "?", "tools": [{}]}}, 400, "a tool without a name"),
        ({"responses_create_params": {"input": "?", "tools": 5}}, 400, "tools must be a list"),
        ({"worked": 5}, 400, "worked answer must be a list"),
        ({"before": None}, 422, "the row is no problem of store"),
        ({"response": None}, 400, "response: an object is needed"),
        ({"response": {"output": 5}}, 422, "response.output must be a list"),
    ],
)
def test_what_is_wrong_with_a_body_is_told(api, change, status, said):
    body = {**row_of(some("store", 1)[0]), "response": {"output": items_of(Reply(content="done"), 1)}, **change}
    answer = api.post("/verify", json=body)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("truth, status", [(None, 422), (5, 422), ([], 422), ({}, 422), ("3", 200)])
def test_a_truth_of_another_kind_is_the_rows_fault(api, truth, status):
    body = {**row_of(some("count", 1)[0]), "response": {"output": items_of(Reply(content="3"), 1)}}
    answer = api.post("/verify", json={**body, "expected_answer": truth})
    assert answer.status_code == status and (status == 200 or "no problem of count" in answer.text), answer.text


def test_other_requests_are_refused_as_what_they_are(api):
    for path, content, status in (
        ("/verify", b"{", 400), ("/verify", b"[]", 400), ("/verify", b" " * (2 << 20), 413), ("/get", b"{}", 400),
    ):  # fmt: skip
        answer = api.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["message"], answer.text
    assert api.post("/verify", content=b"{}").status_code == 415
    assert api.get("/verify").status_code == 405 and api.get("/a/b").status_code == 404
    assert "/seed_session" in api.get("/a/b").json()["error"]["message"]
    assert api.get("/health", headers={"host": "evil.example"}).status_code == 200
    assert api.post("/verify", json={}, headers={"host": "evil.example"}).status_code == 403
    seeded(api, some("store", 1)[0])
    gone = api.post("/burn", json={})
    assert gone.status_code == 404 and "there are get, put, remove" in gone.json()["error"]["message"]
    assert api.post("/get", json={"keys": "x"}).text == "error: get takes key"


class Moody(Count):
    """Whose grader fails in every way, as it is told."""

    name = "moody"

    def grade(self, problem: Problem, reply: Reply) -> Verdict:
        match reply.content:
            case "broken":
                raise GraderBroken("no sandbox")
            case "crash":
                raise RuntimeError("secret")
            case "hang":
                time.sleep(1.5)
        return Verdict(reward=0.5, parts={"mood": 0.5})


def test_a_grader_that_fails_costs_its_own_request_and_sessions_are_bounded():
    problem = next(Moody().problems("train"))
    ask = lambda client, said: verify(client, problem, items_of(Reply(content=said), 1))
    with serving(Moody(), seconds=0.5, sessions=2) as url, httpx.Client(base_url=url, verify=False) as api:
        for said, status, code in (("broken", 500, "grader_broken"), ("crash", 500, "internal_error"),
                                   ("hang", 504, "timeout")):  # fmt: skip
            answer = ask(api, said)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
            assert "secret" not in answer.text
            assert ask(api, "fine").json()["reward_components"] == {"mood": 0.5}
        row = row_of(problem)
        others = [httpx.post(f"{url}/seed_session", json=row, verify=False) for _ in range(3)]
        assert [one.status_code for one in others] == [200, 200, 429] and others[2].headers["retry-after"]
        done = {"session": others[0].cookies["session"]}
        body = {**row, "response": {"output": items_of(Reply(content="fine"), 1)}}
        assert httpx.post(f"{url}/verify", json=body, cookies=done, verify=False).json()["reward"] == 0.5
        assert httpx.post(f"{url}/seed_session", json=row, verify=False).status_code == 200
    with serving(Moody(), sessions=1, idle=0.05) as url:
        assert httpx.post(f"{url}/seed_session", json=row, verify=False).status_code == 200
        time.sleep(0.1)
        assert httpx.post(f"{url}/seed_session", json=row, verify=False).status_code == 200, "the first was idle"


# ----- our client ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    def write(*problems):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row_of(one)) + "\n" for one in problems))
        return path

    return write


@pytest.mark.parametrize("name", ["store", "calculator", "repair", "count"])
def test_a_task_behind_our_server_is_the_task(url, file, name):
    """Whole episodes, right ones and others, through both ends."""
    here, problems = TASKS[name](), some(name, 8)
    one = asked(f"gym@{url}#{file(*problems)}*2")
    assert one.share == 2 and one.task.name.startswith(f"gym@{url}#") and one.task.thinks == here.thinks
    for there in one.task.rows:
        problem = next(each for each in problems if each.messages == there.messages)
        assert there.tools == problem.tools and there.worked == problem.worked
        for change in (
            lambda reply: reply,
            lambda reply: Reply(content="no", thinking=reply.thinking) if not reply.calls else reply,
            lambda reply: Reply(calls=reply.calls, content="x" if not reply.calls else "", ended=bool(reply.calls)),
        ):
            episodes = here.episode(problem), one.task.episode(there)
            heard = [played(episode, problem, change) for episode in episodes]
            assert heard[0] == heard[1]
            verdicts = [episode.verdict() for episode in episodes]
            assert verdicts[0].reward == verdicts[1].reward and dict(verdicts[0].parts) == dict(verdicts[1].parts)


def test_a_server_that_is_gone_or_fails_is_a_broken_grader(file):
    problem = next(Moody().problems("train"))
    path = file(problem)
    with serving(Moody()) as url:
        task = asked(f"gym@{url}#{path}").task
        for said in ("broken", "crash"):
            episode = task.episode(task.rows[0])
            episode.hear(Reply(content=said))
            with pytest.raises(GraderBroken, match="/verify was answered with status 500"):
                episode.verdict()
        episode = task.episode(task.rows[0])
        episode.hear(Reply(content="fine"))
        assert episode.verdict().reward == 0.5
    with pytest.raises(GraderBroken, match="/seed_session got no answer"):
        task.episode(task.rows[0]).hear(Reply(content="fine"))


def test_a_dead_environment_costs_its_own_rollouts(file):
    from nautilus.posttrain.rollout import Dropped, Player, Playing
    from nautilus.serve.request import Completion

    with bound("127.0.0.1", 0) as listening:
        free = listening.getsockname()[1]
    task = asked(f"gym@http://127.0.0.1:{free}#{file(*some('count', 1))}").task
    player = Player(answers=None, tokenizer=None, playing=Playing())  # type: ignore[arg-type]
    episode = task.episode(task.rows[0])
    with pytest.raises(Dropped, match="got no answer") as found:
        asyncio.run(player.in_time(episode, episode.hear, Reply(content="3")))
    assert found.value.kind == "grader" and Completion


@pytest.mark.parametrize(
    "answer, why",
    [
        ({"reward": 1, "mask_sample": True, "failure_kind": "judge_error"}, "judge_error"),
        ({"reward": None}, "reward None"),
        ({}, "reward None"),
    ],
)
def test_an_answer_that_was_not_judged_is_left_out(monkeypatch, file, answer, why):
    task = asked(f"gym@http://127.0.0.1:1#{file(*some('count', 1))}").task
    monkeypatch.setattr("nautilus.tasks.wire.Wire.json", lambda self, method, path, body=None: answer)
    episode = task.episode(task.rows[0])
    episode.hear(Reply(content="3"))
    with pytest.raises(GraderBroken, match=why):
        episode.verdict()


@pytest.mark.parametrize("words", ["gym@http://h:1", "gym@http://h:1#", "gym@http://h:1#/nowhere", "sort@http://h:1"])
def test_addresses_that_name_no_task_are_refused(words):
    with pytest.raises(UserError, match="gym@URL#ROWS.jsonl|which is not there"):
        asked(words)


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows"):
        asked(f"gym@http://h:1#{tmp_path / 'rows.jsonl'}")
    with pytest.raises(ValueError, match="has no rows"):
        Gym("gym", "http://h:1", [])
