import json

import pytest

from nautilus.data.chat import ChatSettings, chat_tokens

HI = [{"role": "user", "content": "Hi"}]
QUIET = ChatSettings(enable_thinking=False)
THINK = {"type": "enabled", "budget_tokens": 1024}
TOOL = {
    "name": "weather",
    "description": "The weather of a place",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
}
CALL = "<tool_call>\n<function=weather>\n<parameter=place>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
CALL += "</function>\n</tool_call>\n"


@pytest.fixture
def client(here):
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(
        base_url=here.url, api_key="none", max_retries=0, http_client=anthropic.DefaultHttpxClient(verify=False)
    ) as made:
        yield made


def post(api, path="/v1/messages", **fields):
    return api.post(path, json={"max_tokens": 50, "messages": HI, **fields})


def ask(client, messages=HI, **how):
    return client.messages.create(**{"model": "tiny", "messages": messages, "max_tokens": 200, **how})


def prompt(here):
    return list(here.service.jobs[-1].tokens)


def test_without_thinking_all_is_text(client, here):
    here.service.answers, here.service.cached = ["Hello."], 7
    answer = ask(client, system=[{"type": "text", "text": "Be brief."}])
    assert [block.type for block in answer.content] == ["text"] and answer.content[0].text == "Hello."
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == ("message", "assistant", "tiny", "end_turn")
    want = chat_tokens(here.service.engine.tokenizer, [{"role": "system", "content": "Be brief."}, *HI], settings=QUIET)
    assert prompt(here) == want and here.service.jobs[0].sampling.thinking_budget is None
    assert answer.usage.input_tokens == len(want) - 7 and answer.usage.cache_read_input_tokens == 7
    assert answer.usage.output_tokens == len("Hello.") + 1


def test_with_thinking_there_is_a_block_of_it_and_a_budget(client, here):
    how = {"top_k": 5, "temperature": 0.5, "top_p": 0.75}  # the client itself has them no more
    answer = ask(client, thinking=THINK, metadata={"user_id": "me"}, extra_body=how)
    thought, text = answer.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "Let me see.", "Hello.") and thought.signature
    sampling = here.service.jobs[0].sampling
    assert (sampling.thinking_budget, sampling.top_k, sampling.temperature, sampling.top_p) == (1024, 5, 0.5, 0.75)


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_events_come_in_order_and_build_the_same_message(client, here, width):
    here.service.answers, here.service.width = ["Rome.\n</think>\n\nI look.\n" + CALL + CALL], width
    with client.messages.stream(model="tiny", messages=HI, max_tokens=900, thinking=THINK, tools=[TOOL]) as stream:
        list(stream)
        built = stream.get_final_message()
    assert [block.type for block in built.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert built.content[2].input == {"place": "Rome", "days": 3} and built.stop_reason == "tool_use"
    here.service.jobs.clear()
    whole = ask(client, max_tokens=900, thinking=THINK, tools=[TOOL])
    shown = [block.model_dump(exclude={"id"}, exclude_none=True) for block in whole.content]
    stripped = [block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in built.content]
    assert shown == stripped and whole.usage.output_tokens == built.usage.output_tokens
    assert whole.content[2].id != whole.content[3].id


def test_the_events_are_those_of_the_api(api, here):
    here.service.answers, here.service.width = ["Rome.\n</think>\n\nI look.\n" + CALL], 1000
    text = post(api, max_tokens=900, stream=True, thinking=THINK, tools=[TOOL]).text
    events = [event.split("\n") for event in text.split("\n\n") if event]
    parts = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [part["type"] for part in parts]
    kinds = [part.get("delta", {}).get("type") or part["type"] for part in parts]
    assert kinds == [
        "message_start", "ping", "content_block_start", "thinking_delta", "signature_delta", "content_block_stop",
        "content_block_start", "text_delta", "content_block_stop", "content_block_start", "input_json_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert [part["index"] for part in parts if "index" in part] == [0] * 4 + [1] * 3 + [2] * 3
    assert parts[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert parts[0]["message"]["content"] == [] and parts[0]["message"]["stop_reason"] is None


@pytest.mark.parametrize("tokens", range(1, 100, 9))
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_still_one_block_of_json(client, here, stream, tokens):
    here.service.answers = [CALL]
    if stream:
        with client.messages.stream(model="tiny", messages=HI, max_tokens=tokens, tools=[TOOL]) as events:
            answer = events.get_final_message()
    else:
        answer = ask(client, max_tokens=tokens, tools=[TOOL])
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "max_tokens" and len(calls) == (tokens >= 20)
    assert all(call.id and call.name == "weather" and isinstance(call.input, dict) for call in calls)


@pytest.mark.parametrize("stream", [False, True])
def test_reasons_to_stop(client, here, stream):
    def ended(**how):
        answer = ask(client, stream=stream, **how)
        end = [event for event in answer if event.type == "message_delta"][0].delta if stream else answer
        return end.stop_reason, end.stop_sequence

    here.service.answers = ["One, two, three."]
    assert ended() == ("end_turn", None)
    assert ended(max_tokens=4) == ("max_tokens", None)
    assert ended(stop_sequences=["four", ", t"]) == ("stop_sequence", ", t")


def test_a_conversation_with_tools_is_rendered_as_a_chat(client, here):
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "a", "name": "weather", "input": {"place": "Rome"}},
        {"type": "tool_use", "id": "b", "name": "weather", "input": {}},
    ]  # fmt: skip
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "Sun"}]},
        {"type": "tool_result", "tool_use_id": "b", "content": "Rain", "is_error": True},
        {"type": "text", "text": "Well?"},
    ]
    talk = [*HI, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    ask(client, talk, tools=[TOOL], thinking=THINK)
    function = {"name": "weather", "description": TOOL["description"], "parameters": TOOL["input_schema"]}
    calls = [
        {"id": id, "function": {"name": "weather", "arguments": how}}
        for id, how in (("a", {"place": "Rome"}), ("b", {}))
    ]
    want = [
        *HI, {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "content": "Sun", "tool_call_id": "a"},
        {"role": "tool", "content": "Rain", "tool_call_id": "b"},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": function}]
    assert prompt(here) == chat_tokens(here.service.engine.tokenizer, want, tools=tools)


def test_a_last_message_of_the_assistant_is_continued(client, here):
    here.service.answers = [" and more"]
    answer = ask(client, [*HI, {"role": "assistant", "content": "Once"}])
    assert here.service.engine.tokenizer.decode(prompt(here)).endswith("<think></think>Once")
    assert answer.content[0].text == " and more"


def test_choices_of_tools(client, here):
    here.service.answers = [CALL + CALL]
    several = ask(client, max_tokens=900, tools=[TOOL], tool_choice={"type": "auto"})
    assert len(several.content) == 2 and here.service.jobs[-1].rules == []
    alone = ask(client, max_tokens=900, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert len(alone.content) == 1
    for forced in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        ask(client, tools=[TOOL], tool_choice=forced)
        assert len(here.service.jobs[-1].rules) == 1, "a grammar"
    here.service.jobs.clear()
    assert ask(client, max_tokens=900, tools=[TOOL], tool_choice={"type": "none"}).content[0].type == "text"


def test_tokens_are_counted(client, here):
    count = client.messages.count_tokens(model="tiny", messages=HI, system="Be brief.").input_tokens
    ask(client, system="Be brief.")
    assert count == len(prompt(here)) and len(here.service.jobs) == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": []}]}, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "type thinking"),
        ({"tools": [{"name": "a", "type": "web_search_20250305"}]}, "tools.0"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "needs a name"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_the_shape_of_this_api(api, fields, message):
    answer = post(api, **fields)
    assert answer.status_code == 400 and answer.json()["type"] == "error"
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and message in error["message"] and len(error) == 2


def test_other_errors_have_its_names(client, api, here):
    import anthropic

    with pytest.raises(anthropic.NotFoundError) as found:
        ask(client, model="other")
    assert found.value.body["error"]["type"] == "not_found_error"
    here.service.busy = 3.0
    with pytest.raises(anthropic.RateLimitError) as found:
        ask(client)
    assert (
        found.value.body["error"]["type"] == "rate_limit_error" and found.value.response.headers["retry-after"] == "3"
    )
    here.service.busy, here.service.fault = None, RuntimeError("secret")
    text = post(api, stream=True).text
    assert "secret" not in text and "message_stop" not in text
    assert '{"type":"error","error":{"type":"api_error"' in text.rpartition("event: error")[2]


def test_a_key_may_be_given_as_this_api_does(serve):
    from nautilus.serve.api.keys import Keys

    key = "0123456789abcdef-key"
    with serve(keys=Keys([key])) as here, here.client() as api:
        assert api.post("/v1/messages", json={"max_tokens": 5, "messages": HI}, headers={"x-api-key": key}).is_success
        refused = post(api)
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        assert refused.json()["type"] == "error"
