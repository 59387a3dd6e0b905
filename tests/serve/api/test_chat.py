import json

import pytest

from nautilus.data.chat import ChatSettings, chat_tokens

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = "<tool_call>\n<function=weather>\n<parameter=place>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
CALL += "</function>\n</tool_call>\n"
HI = [{"role": "user", "content": "Hi"}]


def ask(client, messages=HI, **how):
    return client.chat.completions.create(model="tiny", messages=messages, **how)


def post(api, **fields):
    return api.post("/v1/chat/completions", json={"messages": HI, **fields})


def refusal(api, **fields):
    answer = post(api, **fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


# ----- answers -------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_with_reasoning_apart(client, here):
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.message.content == "Hello." and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == choice.message.reasoning == "Let me see."
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    assert list(here.service.jobs[0].tokens) == chat_tokens(here.service.engine.tokenizer, HI)


def test_usage_tells_cached_and_reasoning_tokens(client, here):
    here.service.cached = 7
    usage = ask(client).usage
    assert usage.prompt_tokens == len(here.service.jobs[0].tokens)
    assert usage.completion_tokens == len("Let me see.\n\n\nHello.") + 2, "one for the tag, one for the end"
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 7
    assert usage.completion_tokens_details.reasoning_tokens == len("Let me see.\n")


@pytest.mark.parametrize("width", [1, 4, 1000])
def test_a_stream_adds_up_to_the_answer(client, here, width):
    here.service.width = width
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == "Hello."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len("Let me see.\n\n\nHello.") + 2
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_have_json_arguments(client, here, stream):
    here.service.answers, here.service.width = ["Rome, I think.\n</think>\n\nI look.\n" + CALL], 3
    answer = ask(client, tools=[WEATHER], stream=stream)
    if stream:
        parts = [chunk.choices[0] for chunk in answer]
        calls = [call for part in parts for call in part.delta.tool_calls or []]
        assert [call.function.name for call in calls if call.id] == ["weather"] and parts[
            -1
        ].finish_reason == "tool_calls"
        arguments = "".join(call.function.arguments for call in calls)
    else:
        choice = answer.choices[0]
        (call,) = choice.message.tool_calls
        assert call.id and call.function.name == "weather" and choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        arguments = call.function.arguments
    assert json.loads(arguments) == {"place": "Rome", "days": 3}


def test_without_parallel_calls_only_the_first_is_told(client, here):
    here.service.answers = ["</think>\n" + CALL + CALL]
    assert len(ask(client, tools=[WEATHER]).choices[0].message.tool_calls) == 2
    assert len(ask(client, tools=[WEATHER], parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_with_tool_choice_none_tools_are_told_of_but_none_is_called(client, here):
    """The prompt is that of the turns in which they may be, and begins like these."""
    here.service.answers = ["</think>\n" + CALL]
    choice = ask(client, tools=[WEATHER], tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and "<tool_call>" in choice.message.content
    tokenizer = here.service.engine.tokenizer
    assert list(here.service.jobs[0].tokens) == chat_tokens(tokenizer, HI, tools=[WEATHER])
    assert here.service.jobs[0].sampling.bad_tokens == ((tokenizer.control["<tool_call>"],),)
    ask(client, tools=[WEATHER])
    assert here.service.jobs[1].sampling.bad_tokens == ()


def test_several_answers_have_seeds_that_follow_each_other(client, here):
    here.service.answers = ["</think>One", "</think>Two", "</think>Three"]
    answer = ask(client, n=3, seed=2**64 - 2)
    assert [choice.message.content for choice in answer.choices] == ["One", "Two", "Three"]
    assert [job.sampling.seed for job in here.service.jobs] == [2**64 - 2, 2**64 - 1, 0]
    assert answer.usage.prompt_tokens == len(here.service.jobs[0].tokens), "the prompt counts once"
    streamed = {0: "", 1: "", 2: ""}
    here.service.jobs.clear()
    for chunk in ask(client, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == {0: "One", 1: "Two", 2: "Three"}


def test_a_seed_may_be_any_whole_number(client, here):
    for seed, want in ((-1, 2**64 - 1), (0, 0), (2**63, 2**63)):
        ask(client, seed=seed)
        assert here.service.jobs[-1].sampling.seed == want


def test_without_a_seed_answers_differ_from_each_other(client, here):
    ask(client)
    ask(client)
    assert here.service.jobs[0].sampling.seed != here.service.jobs[1].sampling.seed


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_there_for_every_token_with_its_bytes(client, here, stream):
    here.service.answers, here.service.width = ["</think>é!"], 2
    answer = ask(client, logprobs=True, top_logprobs=2, stream=stream)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    told = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert bytes(byte for entry in told[1:-1] for byte in entry.bytes).decode() == "é!"
    assert {entry.logprob for entry in told} == {-0.5} and {len(entry.top_logprobs) for entry in told} == {2}
    assert len(told) == 5


def test_token_ids_are_told_on_request(api, here):
    answer = post(api, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == list(here.service.jobs[0].tokens)
    written = here.service.engine.tokenizer.encode("Let me see.\n</think>\n\nHello.", control=True)
    assert answer["choices"][0]["token_ids"] == [*written, here.service.engine.tokenizer.eos]


def runs(parts):
    return [tuple(run) for part in parts for run in part.get("nautilus", {}).get("sources", [])]


def streamed(api, **fields):
    """The choices of a stream."""
    lines = post(api, stream=True, **fields).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]]


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_sources_are_told_beside_the_text_they_made(api, here, width):
    here.service.width, here.service.sources = width, ("plain", "cache", "cache")
    here.service.answers = ["So so.\n</think>\n\nHé! <b>"]
    written = ["S", "o", " ", "s", "o", ".", "", "", "", "", "H", "", "é", "!", " ", "<", "b", ">", ""]
    want = [(("plain", "cache", "cache")[at % 3], text) for at, text in enumerate(written)]
    parts = streamed(api, return_token_sources=True)
    seen = []
    for part in parts:
        text = part["delta"].get("reasoning_content") or part["delta"].get("content") or ""
        assert sum(run[2] for run in runs([part])) == len(text)
        for source, _, size in runs([part]):
            seen += [(source, char) for char in text[:size]]
            text = text[size:]
    assert seen == [(source, char) for source, char in want if char]
    for source in ("plain", "cache"):
        assert sum(run[1] for run in runs(parts) if run[0] == source) == sum(one[0] == source for one in want)
    (whole,) = post(api, return_token_sources=True).json()["choices"]
    message = whole["message"]
    assert sum(run[2] for run in runs([whole])) == len(message["reasoning_content"] + message["content"])
    assert runs([whole])[:3] == [("plain", 1, 1), ("cache", 2, 2), ("plain", 1, 1)]
    assert sum(run[1] for run in runs([whole])) == len(want)


def test_sources_of_several_answers_of_calls_and_of_thoughts_that_are_not_told(api, here):
    here.service.sources = ("mtp", "plain")
    parts = streamed(api, return_token_sources=True, n=2, include_reasoning=False)
    for index in range(2):
        mine = [part for part in parts if part["index"] == index]
        assert sum(run[1] for run in runs(mine)) == len("Let me see.\n\n\nHello.") + 2
        assert sum(run[2] for run in runs(mine)) == len("Hello.")
    here.service.answers = ["</think>See\n" + CALL]
    parts, tokens = streamed(api, return_token_sources=True, tools=[WEATHER]), here.service.engine.tokenizer.encode
    assert sum(run[1] for run in runs(parts)) == len(tokens("</think>See\n" + CALL, control=True)) + 1
    assert sum(run[2] for run in runs(parts)) == len("See")


def test_without_being_asked_for_sources_are_not_told(api, here):
    here.service.sources = ("cache",)
    assert "nautilus" not in post(api).text and "nautilus" not in post(api, stream=True).text


def test_usage_tells_of_drafts_where_there_are_some(client, here):
    assert ask(client).usage.completion_tokens_details.accepted_prediction_tokens is None
    here.service.arms, here.service.sources = {}, ("plain", "cache", "cache")
    usage = ask(client, n=2).usage
    accepted = 2 * sum(at % 3 > 0 for at in range(usage.completion_tokens // 2))
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == accepted  # one of each two
    *_, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens_details.accepted_prediction_tokens == accepted // 2


def test_reasoning_may_be_left_out_or_counted_as_content(client, here):
    message = ask(client, extra_body={"include_reasoning": False}).choices[0].message
    assert message.content == "Hello." and not hasattr(message, "reasoning_content")
    here.service.answers = ["All of it is thought."]
    kwargs = {"chat_template_kwargs": {"force_nonempty_content": True}}
    assert ask(client, extra_body=kwargs).choices[0].message.content == "All of it is thought."


def test_length_is_the_reason_where_the_tokens_are_used_up(client):
    answer = ask(client, max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5


# ----- what is asked -------------------------------------------------------------------------------------------------


def test_fields_become_sampling(client, here):
    more = {
        "top_k": 9, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "ignore_eos": True, "stop_token_ids": [7],
        "thinking_token_budget": 5, "thinking_token_grace": 2, "bad_words": ["no"], "cache_salt": "salt",
        "priority": 3,
    }  # fmt: skip
    ask(
        client, temperature=0.5, top_p=0.8, seed=4, stop=["x", "yy"], presence_penalty=0.5, frequency_penalty=-0.5,
        max_tokens=50, logit_bias={"65": -100}, logprobs=True, top_logprobs=3, extra_body=more,
    )  # fmt: skip
    job, encode = here.service.jobs[0], here.service.engine.tokenizer.encode
    got = job.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.seed) == (0.5, 0.8, 9, 0.1, 4)
    assert (got.presence_penalty, got.frequency_penalty, got.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (got.min_tokens, got.max_tokens, got.ignore_eos) == (3, 50, True)
    assert (got.stop, got.stop_tokens) == (("x", "yy"), (7,))
    assert (got.thinking_budget, got.thinking_grace) == (5, 2)
    assert got.bad_tokens == (tuple(encode("no")), tuple(encode(" no")))
    assert got.logit_bias == {65: -100} and got.top_logprobs == 3
    assert job.priority == 3 and job.tenant == ":salt"


def test_what_is_not_asked_is_as_the_server_says(serve):
    from nautilus.serve.api.settings import Defaults

    with serve(defaults=Defaults(temperature=0.6, top_k=7)) as here, here.client() as api:
        assert post(api, top_p=0.5).status_code == 200
        got, prompt = here.service.jobs[0].sampling, here.service.jobs[0].tokens
        assert (got.temperature, got.top_p, got.top_k) == (0.6, 0.5, 7)
        assert got.max_tokens == here.service.engine.max_tokens - len(prompt), "all that fits"


def test_null_is_as_good_as_absent(api):
    nothing = ("temperature", "stop", "n", "tools", "seed", "logit_bias", "stream_options", "response_format", "stream")
    assert post(api, **dict.fromkeys(nothing)).status_code == 200


def test_unknown_fields_are_left_out_with_a_message(api, caplog):
    caplog.set_level("DEBUG", logger="nautilus.serve.api")
    assert post(api, novelty=1, user="me", store=True, service_tier="auto", metadata={"a": "b"}).status_code == 200
    assert any("fields left out" in message and "novelty" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "temperature=-1.0 was asked for"),
        ({"guided_json": {}}, "guided_json", "send structured_outputs.json instead"),
        ({"grammar": 'root ::= "a"'}, "grammar", "send structured_outputs.grammar, in lark instead"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"thinking_token_budget": -3}, "thinking_token_budget", "greater than or equal to 0"),
        ({"thinking_token_grace": -1}, "thinking_token_grace", "greater than or equal to 0"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"return_token_sources": "yes"}, "return_token_sources", "valid boolean"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "friend", "content": "Hi"}]}, "messages.0.role", "system"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "valid string"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"": 0}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"logit_bias": {"5": 1000}}, "logit_bias", "100"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ({"stop": ""}, "stop", "not empty"),
        ({"bad_words": [""]}, "bad_words", "empty"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"echo": True}, "echo", "completions"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"chat_template": "x"}, "chat_template", "not supported"),
        ({"documents": [{}]}, "documents", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "no tools"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "none"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs", "true or false"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens is 0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(api, fields, param, message):
    error = refusal(api, **fields)
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


def test_media_are_refused_politely(api):
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert "this model reads text" in refusal(api, messages=[{"role": "user", "content": image}])["message"]


def test_text_parts_are_joined(api, here):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert post(api, messages=[{"role": "user", "content": parts}]).status_code == 200
    assert list(here.service.jobs[0].tokens) == chat_tokens(here.service.engine.tokenizer, HI)


FORBIDDEN = ["chat_template", "tokenize", "tools", "documents", "conversation", "continue_final_message", "padding"]
FORBIDDEN += [
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "messages",
    "add_generation_prompt",
    "eos_token",
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_template_is_not_told_what_the_renderer_decides(api, name):
    assert f"may not set {name}" in refusal(api, chat_template_kwargs={name: "x"})["message"]


@pytest.mark.parametrize(
    "fields, settings",
    [
        ({"reasoning_effort": "none"}, ChatSettings(enable_thinking=False)),
        ({"chat_template_kwargs": {"enable_thinking": False}}, ChatSettings(enable_thinking=False)),
        ({"reasoning_effort": "medium"}, ChatSettings(effort="medium")),
        ({"chat_template_kwargs": {"medium_effort": True}}, ChatSettings(effort="medium")),
        ({"reasoning_effort": "high"}, ChatSettings()),
        ({"chat_template_kwargs": {"truncate_history_thinking": False}}, ChatSettings(truncate_history_thinking=False)),
    ],
)
def test_settings_of_the_template_are_passed_on(api, here, fields, settings):
    talk = [*HI, {"role": "assistant", "content": "a", "reasoning_content": "b"}, *HI]
    assert post(api, messages=talk, **fields).status_code == 200
    assert list(here.service.jobs[0].tokens) == chat_tokens(here.service.engine.tokenizer, talk, settings=settings)


def test_without_thinking_all_is_content(client, here):
    here.service.answers = ["Hello."]
    message = ask(client, reasoning_effort="none").choices[0].message
    assert message.content == "Hello." and not hasattr(message, "reasoning_content")


def test_the_last_message_may_be_continued(client, here):
    here.service.answers = [" and more"]
    talk = [*HI, {"role": "assistant", "content": "Once"}]
    answer = ask(client, talk, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    assert here.service.engine.tokenizer.decode(here.service.jobs[0].tokens).endswith("<think></think>Once")
    assert answer.choices[0].message.content == " and more"
    talk[-1]["content"] = "<think>\nLet me"
    here.service.answers = [" see.\n</think>\nNow."]
    message = ask(client, talk, extra_body={"continue_final_message": True}).choices[0].message
    assert message.reasoning_content == " see." and message.content == "Now."


def test_only_a_message_of_the_assistant_can_be_continued(api):
    assert "last message of the assistant" in refusal(api, continue_final_message=True)["message"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert "exclude each other" in refusal(api, **both)["message"]


def test_a_chat_that_does_not_fit_is_told_both_numbers(api, here):
    room, prompt = here.service.engine.max_tokens, len(chat_tokens(here.service.engine.tokenizer, HI))
    error = refusal(api, max_tokens=room)
    assert error["code"] == "context_length_exceeded"
    assert f"context has {room} tokens" in error["message"] and f"{room + prompt} were asked for" in error["message"]
    long = [{"role": "user", "content": "a" * 5000}]
    assert refusal(api, messages=long)["code"] == "context_length_exceeded"
    assert post(api, messages=long, truncate_prompt_tokens=100).status_code == 200
    assert len(here.service.jobs[-1].tokens) == 100 and here.service.jobs[-1].marks == ()
    assert post(api, messages=long, truncate_prompt_tokens=-1, max_tokens=96).status_code == 200
    assert len(here.service.jobs[-1].tokens) == room - 96


def test_words_of_a_message_are_no_control_tokens(api, here):
    assert post(api, messages=[{"role": "user", "content": "<|im_end|>"}]).status_code == 200
    tokens = list(here.service.jobs[0].tokens)
    assert tokens.count(here.service.engine.tokenizer.eos) == 2, "of the system's and of the user's turn"


# ----- the next turn -------------------------------------------------------------------------------------------------


def test_after_an_answer_the_next_turn_is_read_ahead(api, here):
    assert post(api).status_code == 200
    assert here.until(lambda: here.service.warmed)
    (job,) = here.service.warmed
    answer = {"role": "assistant", "content": "Hello.", "reasoning_content": "Let me see."}
    again = chat_tokens(here.service.engine.tokenizer, [*HI, answer, {"role": "user", "content": "Why?"}])
    text = here.service.engine.tokenizer.decode(job.tokens)
    assert again[: len(job.tokens)] == list(job.tokens) and job.marks == (len(job.tokens),)
    assert text.endswith("<think></think>\nHello.<|im_end|>\n<|im_start|>user"), "one token is given back"


def test_nothing_is_read_ahead_while_others_wait_or_for_several_answers(api, here):
    here.service.waiting = 1
    assert post(api).status_code == 200
    here.service.waiting = 0
    assert post(api, n=2).status_code == 200
    assert not here.until(lambda: here.service.warmed, 0.1)


def test_an_answer_does_not_depend_on_what_is_read_ahead(api, here, monkeypatch):
    monkeypatch.setattr(here.service, "warm", None)
    assert post(api, stream=True).text.endswith("[DONE]\n\n")
    monkeypatch.setattr("nautilus.serve.api.chat.following_turn", None)
    assert post(api).status_code == 200


def test_after_a_tool_call_the_next_turn_is_the_tool(api, here):
    here.service.answers = ["Hm.\n</think>\n" + CALL]
    assert post(api, tools=[WEATHER]).status_code == 200
    assert here.until(lambda: here.service.warmed)
    text = here.service.engine.tokenizer.decode(here.service.warmed[0].tokens)
    assert "Hm." in text and text.endswith("<tool_response>")
