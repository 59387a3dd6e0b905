import dataclasses
import json
import re

import openai
import pytest

from nautilus.data.chat import chat_tokens, render
from nautilus.runtime import UserError
from nautilus.serve.draft.proposal import Counts

HI = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


# ----- what is asked without a body ----------------------------------------------------------------------------------


def test_the_model_is_listed_and_found(here):
    with here.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").max_model_len == here.service.engine.max_tokens
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
            client.models.retrieve("owner/other")
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.chat.completions.create(model="other", **HI)


@pytest.mark.parametrize("path", ["/models", "/models/tiny", "/health", "/health/ready", "/version", "/metrics"])
def test_paths_are_there_with_and_without_v1(api, path):
    assert api.get(path).status_code == api.get("/v1" + path).status_code == 200
    assert api.get("/ping").status_code == 200


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/tokenize", "/detokenize", "/apply-template"])
def test_work_is_there_with_and_without_v1(api, path):
    body = {**HI, "prompt": "Hi", "tokens": [70]}
    assert api.post(path, json=body).status_code == api.post("/v1" + path, json=body).status_code == 200


def test_health_and_readiness_are_different_things(serve):
    with serve() as here, here.client() as api:
        assert api.get("/version").json() == {"version": "1.2.3"}
        here.service.ready = False
        assert (api.get("/health").status_code, api.get("/health/ready").status_code) == (200, 503)
        here.service.broken = RuntimeError("gone")
        assert api.get("/health").status_code == 503


@pytest.mark.parametrize("path, method, status", [("/nowhere", "GET", 404), (CHAT, "GET", 405), ("/docs", "GET", 404)])
def test_other_paths_are_told_in_the_same_form(api, path, method, status):
    answer = api.request(method, path)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert {404: "nothing is at this path", 405: "use the method POST"}[status] in answer.json()["error"]["message"]


# ----- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_of_text_and_back(api, here):
    tokenizer = here.service.engine.tokenizer
    got = api.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True}).json()
    assert got["tokens"] == tokenizer.encode("Hé") and got["count"] == 3 and len(got["token_strs"]) == 3
    assert got["max_model_len"] == here.service.engine.max_tokens
    assert api.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": "Hé"}
    strange = api.post("/detokenize", json={"tokens": [tokenizer.vocab]})
    assert strange.status_code == 400 and str(tokenizer.vocab) in strange.json()["error"]["message"]


def test_tokens_and_text_of_a_chat(api, here):
    tokenizer = here.service.engine.tokenizer
    assert api.post("/tokenize", json=HI).json()["tokens"] == chat_tokens(tokenizer, HI["messages"])
    assert api.post("/apply-template", json=HI).json()["prompt"] == render(tokenizer, HI["messages"])
    bare = {**HI, "add_generation_prompt": False}
    assert api.post("/apply-template", json=bare).json()["prompt"] == render(tokenizer, HI["messages"], generate=False)
    assert api.post("/tokenize", json={"prompt": 5}).json()["error"]["param"] == "prompt"


# ----- errors --------------------------------------------------------------------------------------------------------


def test_a_busy_service_says_when_to_come_again(api, here):
    here.service.busy = 2.5
    answer = api.post(CHAT, json=HI)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "3"


def test_what_goes_wrong_inside_is_not_told(api, here, caplog):
    here.service.fault = ValueError("the secret of 0x7f00deadbeef in /srv/place")
    answer = api.post(CHAT, json=HI)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text and "secret" in caplog.text


def test_an_answer_that_ends_without_a_reason_is_an_error(api, here):
    here.service.fault = StopAsyncIteration()
    answer = api.post(CHAT, json=HI)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"


def test_an_error_of_the_answer_reaches_the_client_without_places(api, here):
    here.service.fault = UserError("the grammar in /home/me/x.py at 0x7f00deadbeef is too costly")
    answer = api.post(CHAT, json=HI)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the grammar in … at … is too costly"


def test_messages_are_not_endless(api):
    answer = api.post(CHAT, json={"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]})
    assert answer.status_code == 400 and len(answer.text) < 3000


# ----- counters and logs ---------------------------------------------------------------------------------------------


def metrics(api):
    text = api.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^([^#{\s]+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)}


NAMES = """num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total prompt_tokens_total
prompt_tokens_cached_total prefix_cache_queries_total prefix_cache_hits_total generation_tokens_total
request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket request_params_n_bucket request_params_max_tokens_bucket
request_decode_time_seconds_bucket"""


def test_the_metrics_have_the_names_of_vllm(api):
    api.post(CHAT, json=HI)
    found = metrics(api)
    assert {f"vllm:{name}" for name in NAMES.split()} <= found.keys()
    assert {"nautilus:ssm_state_slots_used", "nautilus:client_disconnects_total"} <= found.keys()
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert api.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_the_metrics_count(serve):
    with serve() as here, here.client() as api:
        here.service.cached = 5
        usage = [api.post(CHAT, json=HI).json()["usage"] for _ in range(2)]
        api.post(CHAT, json={**HI, "stream": True})
        found = metrics(api)
        assert found["vllm:prompt_tokens_total"] == 3 * usage[0]["prompt_tokens"]
        assert found["vllm:generation_tokens_total"] == 3 * usage[0]["completion_tokens"]
        assert found["vllm:prompt_tokens_cached_total"] == found["vllm:prefix_cache_hits_total"] == 15
        assert found["vllm:e2e_request_latency_seconds_count"] == found["vllm:time_to_first_token_seconds_count"] == 3
        assert found["vllm:inter_token_latency_seconds_count"] == 3 * (usage[0]["completion_tokens"] - 1)
        text = api.get("/metrics").text
        assert 'request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 3.0' in text
        api.post(CHAT, json={"messages": []})
        assert 'reason="wrong_value"} 1.0' in api.get("/metrics").text


def test_drafts_are_counted_in_all_and_by_what_made_them(serve):
    with serve() as here, here.client() as api:
        assert "spec_decode" not in api.get("/metrics").text  # there are none
        here.service.arms = {"cache": Counts(drafts=3, drafted=20, accepted=9), "mtp": Counts(drafts=2, drafted=4)}
        found, text = metrics(api), api.get("/metrics").text
        assert found["vllm:spec_decode_num_drafts_total"] == 5
        assert found["vllm:spec_decode_num_draft_tokens_total"] == 24
        assert found["vllm:spec_decode_num_accepted_tokens_total"] == 9
        for arm, counts in {"cache": (3, 20, 9), "mtp": (2, 4, 0)}.items():
            for name, value in zip(("drafts", "draft_tokens", "accepted_tokens"), counts, strict=True):
                labels = f'arm="{arm}",engine="0",model_name="tiny"'
                assert f"nautilus:spec_decode_{name}_total{{{labels}}} {value}.0" in text
        loads = {"0": here.service.load(), "4": dataclasses.replace(here.service.load(), arms={"cache": Counts()})}
        here.service.loads = lambda: loads
        text = api.get("/metrics").text
        assert 'nautilus:spec_decode_drafts_total{arm="cache",engine="4",model_name="tiny"} 0.0' in text
        assert 'vllm:spec_decode_num_drafts_total{engine="4",model_name="tiny"} 0.0' in text
        del loads["0"]
        assert 'arm="mtp"' not in api.get("/metrics").text  # its replica is gone


def test_no_label_comes_from_a_client(api):
    before = len(api.get("/metrics").text.splitlines())
    for number in range(3):
        api.post(CHAT, json={**HI, "user": f"user-{number}", "model": f"none-{number}", "cache_salt": "pepper"})
        api.get(f"/nowhere-{number}")
    text = api.get("/metrics").text
    assert "user-" not in text and "none-" not in text and "pepper" not in text and "nowhere" not in text
    assert len(text.splitlines()) < before + 10


def test_a_request_is_one_line_in_the_log_without_its_words(api, here, caplog):
    caplog.set_level("INFO")
    words = [{"role": "user", "content": "secret words"}]
    api.post(CHAT, json={"messages": words}, headers={"authorization": "Bearer sk-secret"})
    lines = [json.loads(message) for message in caplog.messages if message.startswith('{"id"')]
    (line,) = lines
    assert line["ended"] == "stop" and line["prompt"] > 10 and line["generated"] > 10 and line["seconds"] >= 0
    assert "secret" not in "".join(message for message in caplog.messages if "httpx" not in message)
