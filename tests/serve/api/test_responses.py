import json

import openai
import pytest

from nautilus.data.chat import chat_tokens

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": False,
}
CALL = "<tool_call>\n<function=weather>\n<parameter=place>\nRome\n</parameter>\n</function>\n</tool_call>\n"
BOTH = "Rome.\n</think>\n\nI look.\n" + CALL


def ask(client, input="Hi", **how):
    return client.responses.create(model="tiny", input=input, **how)


def post(api, **fields):
    return api.post("/v1/responses", json={"input": "Hi", **fields})


def prompt(here):
    return list(here.service.jobs[-1].tokens)


def test_a_text_is_answered(client, here):
    here.service.cached = 7
    answer = ask(client, instructions="Be brief.", temperature=0.5, top_p=0.75, max_output_tokens=100)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output_text == "Hello." and answer.output[0].content[0].text == "Let me see."
    assert answer.id.startswith("resp_") and answer.status == "completed" and answer.instructions == "Be brief."
    want = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt(here) == chat_tokens(here.service.engine.tokenizer, want)
    usage, sampling = answer.usage, here.service.jobs[0].sampling
    assert usage.input_tokens == len(prompt(here)) and usage.input_tokens_details.cached_tokens == 7
    assert usage.output_tokens_details.reasoning_tokens == len("Let me see.\n")
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.75, 100)
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.75, 100)


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_events_are_numbered_and_build_the_same_response(client, here, width):
    here.service.answers, here.service.width = [BOTH], width
    events = list(ask(client, tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    assert once == [
        "created", "in_progress",
        "output_item.added", "reasoning_part.added", "reasoning_text.delta", "reasoning_text.done",
        "reasoning_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    last = events[-1].response
    assert [event.item for event in events if event.type == "response.output_item.done"] == last.output
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert json.loads(arguments) == {"place": "Rome"} and last.output[2].arguments == arguments
    here.service.jobs.clear()
    whole = ask(client, tools=[TOOL])
    assert [item.model_dump(exclude={"id", "call_id"}) for item in whole.output] == [
        item.model_dump(exclude={"id", "call_id"}) for item in last.output
    ]
    assert whole.usage == last.usage


def test_the_client_builds_a_response_from_events(client, here):
    with client.responses.stream(model="tiny", input="Hi") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(texts) == "Hello."


def test_a_conversation_of_items_is_rendered_as_a_chat(client, here):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"place": "Rome"}'},
        {"type": "function_call_output", "call_id": "a", "output": "Sun"},
    ]
    ask(client, items, tools=[TOOL])
    function = {name: TOOL[name] for name in ("name", "description", "parameters", "strict")}
    call = {"id": "a", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
    want = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "Sun", "tool_call_id": "a"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": function}]
    assert prompt(here) == chat_tokens(here.service.engine.tokenizer, want, tools=tools)


def test_what_is_asked_becomes_what_a_chat_is_asked(client, here):
    shape = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    ask(client, text={"format": shape}, reasoning={"effort": "none"}, extra_body={"seed": 5, "top_k": 3})
    job = here.service.jobs[-1]
    assert len(job.rules) == 1 and (job.sampling.seed, job.sampling.top_k) == (5, 3)
    assert here.service.engine.tokenizer.decode(prompt(here)).endswith("<think></think>")
    ask(client, tools=[TOOL], tool_choice={"type": "function", "name": "weather"})
    assert len(here.service.jobs[-1].rules) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_was_cut_is_incomplete(client, stream):
    answer = ask(client, max_output_tokens=5, stream=stream)
    if stream:
        last = list(answer)[-1]
        assert last.type == "response.incomplete"
        answer = last.response
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[-1].status == "incomplete"


def test_a_response_is_kept_and_may_be_gone_on_from(client, here):
    here.service.answers = [BOTH, "</think>Sun."]
    first = ask(client, tools=[TOOL], instructions="Be brief.")
    assert client.responses.retrieve(first.id).model_dump() == first.model_dump()
    output = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "Sun"}
    second = ask(client, [output], previous_response_id=first.id, tools=[TOOL])
    text = here.service.engine.tokenizer.decode(prompt(here))
    assert "I look." in text and "Rome.</think>" in text.replace("\n", "") and "Sun" in text and "brief" not in text
    assert second.previous_response_id == first.id and second.output_text == "Sun."
    assert client.responses.cancel(first.id).status == "completed", "it has ended already"


def test_what_is_not_kept_is_not_found(client, here):
    unkept = ask(client, store=False)
    for work in (client.responses.retrieve, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            work(unkept.id)
    with pytest.raises(openai.NotFoundError) as found:
        ask(client, previous_response_id="resp_x")
    assert found.value.param == "previous_response_id"


def test_the_oldest_give_way_and_keys_see_only_their_own():
    from nautilus.serve.api.errors import ApiError
    from nautilus.serve.api.kept import KeptResponses
    from nautilus.serve.api.settings import Limits

    kept = KeptResponses(Limits(responses=2, response_bytes=200))
    for id in "abc":
        kept.keep("me", {"id": id}, [{"said": id}])
    assert kept.talk("me", "c") == [{"said": "c"}] and kept.response("me", "b") == {"id": "b"}
    for owner, id in (("me", "a"), ("you", "c")):
        with pytest.raises(ApiError):
            kept.response(owner, id)
    kept.keep("me", {"id": "d"}, [{"said": "x" * 170}])
    assert [*kept.owners["me"]] == ["d"]
    kept.keep("me", {"id": "e"}, [{"said": "x" * 300}])
    assert not kept.owners["me"], "too large alone"


def test_one_that_runs_can_be_seen_and_cancelled(client, here):
    here.service.answers, here.service.pause = [None], 0.01
    stream = ask(client, stream=True)
    id = next(iter(stream)).response.id
    assert client.responses.retrieve(id).status == "in_progress"
    assert client.responses.cancel(id).status == "cancelled"
    last = list(stream)[-1]
    assert last.type == "response.failed" and last.response.status == "cancelled" and last.response.error is None
    assert client.responses.retrieve(id).status == "cancelled" and here.service.replies[0].closed


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"max_output_tokens": "x"}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(api, fields, param):
    answer = post(api, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_an_error_after_the_first_byte_is_the_last_event(client, here):
    here.service.fault = RuntimeError("secret")
    last = list(ask(client, stream=True))[-1]
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "internal_error" and "secret" not in last.response.error.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_trainer_is_told_tokens_and_log_probs_on_the_last_item(api, client, here, stream):
    here.service.answers = [BOTH]
    more = {"tools": [TOOL], "extra_body": {"return_token_ids": True}}
    output = (list(ask(client, stream=True, **more))[-1].response if stream else ask(client, **more)).output
    *others, last = [item.model_dump() for item in output]
    assert [item["type"] for item in others] == ["reasoning", "message"] and last["type"] == "function_call"
    assert not any("generation_token_ids" in item for item in others)
    tokenizer = here.service.engine.tokenizer
    drawn = [*tokenizer.encode(BOTH, control=True), tokenizer.eos]
    assert last["prompt_token_ids"] == prompt(here) and last["generation_token_ids"] == drawn
    assert last["generation_log_probs"] == [-0.5] * len(drawn)
    # An agent sends the items back as they are; without being asked for, nothing of this is told.
    assert post(api, input=[{"role": "user", "content": "Hi"}, *others, last]).status_code == 200
    assert "generation_token_ids" not in ask(client, tools=[TOOL]).output[-1].model_dump()
