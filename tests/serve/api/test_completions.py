import pytest


@pytest.fixture(autouse=True)
def answers(here):
    here.service.answers = ["and so on"]


def ask(client, prompt="Once", **how):
    return client.completions.create(model="tiny", prompt=prompt, **how)


def refusal(api, **fields):
    answer = api.post("/v1/completions", json={"prompt": "Once", **fields})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_text_is_continued(client, here):
    answer = ask(client)
    assert answer.choices[0].text == "and so on" and answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    job, encode = here.service.jobs[0], here.service.engine.tokenizer.encode
    assert list(job.tokens) == encode("Once") and job.sampling.max_tokens == 16 and job.marks == ()
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == len("and so on") + 1


def test_a_stream_adds_up_to_the_text(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "and so on"
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.total_tokens == 14


@pytest.mark.parametrize(
    "prompt, read",
    [("Hi", [b"Hi"]), (["Hi", "Ho"], [b"Hi", b"Ho"]), ([72, 105], [b"Hi"]), ([[72, 105], [72]], [b"Hi", b"H"])],
)
def test_a_prompt_is_text_or_tokens_or_lists_of_them(client, here, prompt, read):
    encode = here.service.engine.tokenizer.encode
    as_ids = lambda value: encode(chr(value))[0] if isinstance(value, int) else [as_ids(one) for one in value]
    answer = ask(client, prompt if isinstance(prompt, str) or isinstance(prompt[0], str) else as_ids(prompt))
    assert [list(job.tokens) for job in here.service.jobs] == [encode(text.decode()) for text in read]
    assert [choice.index for choice in answer.choices] == [*range(len(read))]
    assert answer.usage.prompt_tokens == sum(map(len, read))


def test_several_answers_to_several_prompts(client, here):
    here.service.answers = list("abcd")
    answer = ask(client, ["x", "yy"], n=2, seed=5)
    assert [choice.text for choice in answer.choices] == list("abcd")
    assert [job.sampling.seed for job in here.service.jobs] == [5, 6, 5, 6]
    assert [len(job.tokens) for job in here.service.jobs] == [1, 1, 2, 2] and answer.usage.prompt_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_is_echoed_on_request(client, stream):
    answer = ask(client, echo=True, stream=stream)
    assert "".join(p.choices[0].text for p in answer) == "Onceand so on" if stream else answer.choices[0].text


def test_log_probs_in_four_lists(client, here):
    here.service.answers = ["né"]
    told = ask(client, logprobs=2).choices[0].logprobs
    assert told.token_logprobs == [-0.5] * 4 and len(told.tokens) == 4 and len(told.top_logprobs[0]) == 2
    assert told.tokens[0] == "n" and told.text_offset == [0, 1, 1, 2], "a half character is no text yet"
    parts = [chunk.choices[0].logprobs for chunk in ask(client, logprobs=2, stream=True)]
    assert [offset for part in parts if part for offset in part.text_offset] == [0, 1, 1, 2]
    assert ask(client).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_log_probs_too(client, here, stream):
    answer = ask(client, "né", echo=True, logprobs=1, max_tokens=2, stream=stream)
    parts = [part.choices[0] for part in answer] if stream else answer.choices
    told = [part.logprobs for part in parts if part.logprobs]
    gathered = lambda name: [value for one in told for value in getattr(one, name)]
    assert "".join(part.text for part in parts) == "néan" and parts[-1].finish_reason == "length"
    assert gathered("token_logprobs") == [None, -0.25, -0.25, -0.5, -0.5]
    assert gathered("text_offset") == [0, 1, 1, 2, 3] and gathered("top_logprobs")[0] is None
    assert [len(one) for one in gathered("top_logprobs")[1:]] == [1] * 4
    job = here.service.jobs[0]
    assert job.prompt_logprobs == 1 and job.answer and ask(client, logprobs=1).choices[0].logprobs.text_offset[0] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_be_scored_without_an_answer(client, here, stream):
    answer = ask(client, [[72, 105], [72]], echo=True, logprobs=0, max_tokens=0, stream=stream)
    parts = [part.choices[0] for part in answer] if stream else answer.choices
    decode = here.service.engine.tokenizer.decode
    assert sorted((part.index, part.text, part.finish_reason) for part in parts) == [
        (0, decode([72, 105]), "length"), (1, decode([72]), "length"),
    ]  # fmt: skip
    assert sorted(map(len, (part.logprobs.token_logprobs for part in parts))) == [1, 2]
    assert not any(job.answer for job in here.service.jobs)
    assert stream or answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_told_on_request(client, here, stream):
    answer = ask(client, stream=stream, extra_body={"return_token_ids": True})
    parts = [part.choices[0] for part in answer] if stream else answer.choices
    encode, eos = here.service.engine.tokenizer.encode, here.service.engine.tokenizer.eos
    assert [token for part in parts for token in part.token_ids] == [*encode("and so on"), eos]
    assert parts[0].prompt_token_ids == encode("Once")


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": 5}, "prompt", "valid"),
        ({"prompt": None}, "prompt", "valid"),
        ({"prompt": [1, "a"]}, "prompt.0", "valid"),
        ({"prompt": [10**6]}, "prompt", "1000000"),
        ({"prompt": [[-1]]}, "prompt", "-1"),
        ({"prompt": ["a"] * 40, "n": 2}, "prompt", "80 were sent, at most 64"),
        (
            {"prompt": "a\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace") * 5000},
            "prompt",
            "context",
        ),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"max_tokens": 0}, "max_tokens", "nothing to answer; ask for 1 or more, or for echo"),
        ({"logprobs": True}, "logprobs", "valid integer"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(api, fields, param, message):
    error = refusal(api, **fields)
    assert error["param"] == param and message in error["message"]


def test_a_missing_prompt_is_named(api):
    error = api.post("/v1/completions", json={}).json()["error"]
    assert error["param"] == "prompt" and "required" in error["message"]


def test_where_one_prompt_finds_no_room_none_runs(api, here):
    plain, here.service.submit = here.service.submit, None

    def second_fails(job):
        if len(here.service.jobs) == 1:
            here.service.busy = 3.2
        return plain(job)

    here.service.submit = second_fails
    try:
        answer = api.post("/v1/completions", json={"prompt": ["a", "b"]})
    finally:
        del here.service.submit
    assert answer.status_code == 429 and answer.headers["retry-after"] == "4"
    assert all(reply.closed for reply in here.service.replies) and len(here.service.replies) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_sources_are_told_with_the_characters_of_the_answer(client, here, stream):
    here.service.answers, here.service.sources, here.service.width = ["néan"], ("plain", "grammar"), 2
    answer = ask(client, echo=True, stream=stream, extra_body={"return_token_sources": True})
    parts = [part.choices[0] for part in answer] if stream else answer.choices
    told = [tuple(run) for part in parts if hasattr(part, "nautilus") for run in part.nautilus["sources"]]
    assert told == [
        ("plain", 1, 1), ("grammar", 1, 0), ("plain", 1, 1), ("grammar", 1, 1), ("plain", 1, 1), ("grammar", 1, 0),
    ]  # fmt: skip
    assert "".join(part.text for part in parts) == "Oncenéan"
    assert not hasattr(ask(client).choices[0], "nautilus")
