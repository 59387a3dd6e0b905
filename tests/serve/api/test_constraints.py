"""Which grammar a request asks for; what grammars hold is tested where they are made."""

import json

import pytest

from nautilus.serve import grammar

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("first", "second")
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture
def asked(here, monkeypatch):
    """What was asked of compile_grammar: (kind, text, thinking, parallel) of each."""
    seen = []

    class Rule:
        forks = 0

        def fork(self):
            Rule.forks += 1
            return self

    def compiled(kind, text, tokenizer, *, thinking=False, parallel=True):
        seen.append((kind, text, thinking, parallel))
        return Rule()

    monkeypatch.setattr("nautilus.serve.api.constraints.compile_grammar", compiled)
    return seen


def post(api, **fields):
    return api.post("/v1/chat/completions", json={"messages": HI, **fields})


@pytest.mark.parametrize(
    "fields, kind, text",
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": FORMAT}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools", TOOLS),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "second"}}}, "tools", TOOLS[1:]),
    ],
)  # fmt: skip
def test_a_request_asks_for_a_grammar(api, here, asked, fields, kind, text):
    assert post(api, **fields).status_code == 200
    got = json.loads(asked[0][1]) if isinstance(text, list | dict) else asked[0][1]
    assert asked[0][0] == kind and got == text and asked[0][2:] == (True, True), "the prompt opens a thinking block"
    assert len(here.service.jobs[0].rules) == 1


def test_thinking_and_parallel_calls_are_passed_on(api, asked):
    assert post(api, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).status_code == 200
    assert post(api, response_format={"type": "json_object"}, reasoning_effort="none").status_code == 200
    assert [more for _, _, *more in asked] == [[True, False], [False, True]]


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"tools": TOOLS, "tool_choice": "auto"}])
def test_without_such_a_wish_there_is_no_rule(api, here, asked, fields):
    assert post(api, **fields).status_code == 200
    assert asked == [] and list(here.service.jobs[0].rules) == []


def test_every_answer_has_a_rule_of_its_own(api, here, asked):
    assert post(api, n=3, response_format={"type": "json_object"}).status_code == 200
    assert len(asked) == 1 and type(here.service.jobs[0].rules[0]).forks == 3
    body = {"prompt": ["a", "b"], "n": 2, "structured_outputs": {"choice": ["x"]}}
    assert api.post("/v1/completions", json=body).status_code == 200
    assert len(asked) == 2 and [len(job.rules) for job in here.service.jobs] == [1] * 7 and not asked[1][2]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "exclude each other"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs (choice) and structured_outputs (regex) exclude each other",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "no tool could be called"),
        ({"response_format": {"type": "json_schema"}}, "no json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"response_format": {"type": "xml"}}, "json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "third"}}}, "'third', which"),
    ],
)  # fmt: skip
def test_what_excludes_each_other_is_refused(api, fields, message):
    answer = post(api, **fields)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_real_grammar_reaches_the_job_and_a_bad_one_the_client(api, here):
    pytest.importorskip("llguidance")
    assert post(api, response_format=FORMAT).is_success
    assert isinstance(here.service.jobs[0].rules[0], grammar.Grammar)
    answer = post(api, structured_outputs={"regex": "(("})
    assert answer.status_code == 400 and "grammar" in answer.json()["error"]["message"]
