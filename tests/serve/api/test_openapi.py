"""Every path with whatever its schema allows, and what it does not: nothing is a fault of the server."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")


def operations(app):
    """The app's OpenAPI, with the bodies that its endpoints read by themselves, as operations to be tried."""
    from nautilus.serve.api import anthropic, chat, completions, responses, tokenize

    bodies = {
        "/chat/completions": chat.ChatRequest, "/completions": completions.CompletionRequest,
        "/messages": anthropic.MessagesRequest, "/messages/count_tokens": anthropic.Prompt,
        "/responses": responses.ResponsesRequest, "/tokenize": tokenize.TokenizeChatRequest,
        "/apply-template": tokenize.TokenizeChatRequest, "/detokenize": tokenize.DetokenizeRequest,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two methods of one endpoint share an id, of which nothing here makes use
        described = app.openapi()
    parts = described.setdefault("components", {}).setdefault("schemas", {})
    for path, model in bodies.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= schema.pop("$defs", {})
        content = {"application/json": {"schema": schema}}
        described["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    described["paths"] = {path: item for path, item in described["paths"].items() if not path.startswith("/v1/")}
    found = [result.ok() for result in schemathesis.openapi.from_dict(described).get_all_operations()]
    assert {operation.path for operation in found} >= {*bodies, "/models", "/metrics", "/health"}
    return found


def sent(case, api, url):
    """The answer to a case."""
    given = case.as_transport_kwargs(base_url=url)
    headers = {name: value for name, value in dict(given.get("headers") or {}).items() if value is not None}
    body = {"json": given["json"]} if "json" in given else {"content": given.get("data")}
    return api.request(given["method"], given["url"], headers=headers, params=given.get("params"), **body)


def try_all(operation, mode, api, url):
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case):
        answer = sent(case, api, url)
        assert answer.status_code < 500, (answer.text, case.as_curl_command())
        assert "event: error" not in answer.text, case.as_curl_command()

    one()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_is_a_fault_of_the_server(here, api, mode):
    for operation in operations(here.server.config.app):
        if mode == "POSITIVE" or operation.body:  # what takes nothing takes nothing wrong
            try_all(operation, schemathesis.GenerationMode[mode], api, here.url)
