"""Whatever is sent, the answer is one of ours: an answer, or an error that is the client's."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ],
    "tools": [TOOL], "tool_choice": "auto", "max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
    "n": 1, "stop": ["x"], "seed": 1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1.5},
    "stop_token_ids": [3], "bad_words": ["w"], "chat_template_kwargs": {"enable_thinking": True, "other": [1]},
    "reasoning_effort": "low", "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
    "structured_outputs": {"choice": None}, "truncate_prompt_tokens": 900, "cache_salt": "s", "priority": 1,
    "min_tokens": 1, "presence_penalty": 0.5, "repetition_penalty": 1.5, "thinking_token_budget": 3, "stream": True,
}  # fmt: skip
TEXT = {name: value for name, value in CHAT.items() if name not in ("messages", "logprobs", "tools", "tool_choice")}
TEXT |= {"prompt": ["a", "b"], "logprobs": 2, "echo": False}
MESSAGES = {
    "system": [{"type": "text", "text": "s"}], "tools": [{"name": "f", "description": "d", "input_schema": {}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [
            {"type": "text", "text": "r"},
        ]}]},
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "max_tokens": 5, "stop_sequences": ["x"],
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "thinking": {"type": "enabled", "budget_tokens": 3}, "stream": True,
    "metadata": {"user_id": "u"}, "output_config": {"effort": "low"},
}  # fmt: skip
RESPONSES = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
    ],
    "instructions": "i", "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
    "tool_choice": "auto", "parallel_tool_calls": True, "max_output_tokens": 5, "temperature": 0.5, "top_p": 0.5,
    "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "truncation": "auto", "store": True,
    "metadata": {"a": "b"}, "stream": True, "seed": 1, "previous_response_id": None,
}  # fmt: skip
PATHS = {
    "/v1/messages": MESSAGES, "/v1/messages/count_tokens": MESSAGES, "/v1/responses": RESPONSES,
    "/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/tokenize": {"messages": CHAT["messages"], "tools": [TOOL]},
    "/detokenize": {"tokens": [70, 71]}, "/apply-template": {"messages": CHAT["messages"], "tools": [TOOL]},
}  # fmt: skip

numbers = st.one_of(st.integers(-3, 3), st.integers(-(2**66), 2**66), st.floats(allow_nan=False, allow_infinity=False))
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in pairs:
        yield from places(part, (*path, name))


def changed(value, path, new):
    """The value with another one at a place."""
    if not path:
        return new
    if isinstance(value, dict):
        return {name: changed(part, path[1:], new) if name == path[0] else part for name, part in value.items()}
    return [changed(part, path[1:], new) if i == path[0] else part for i, part in enumerate(value)]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_request_with_something_else_in_one_place(api, here, path, data):
    body = PATHS[path]
    for _ in range(data.draw(st.integers(0, 2))):
        body = changed(body, data.draw(st.sampled_from(list(places(body)))), data.draw(values))
    answer = api.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 429), (answer.text, body)
    assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert "event: error" not in answer.text
