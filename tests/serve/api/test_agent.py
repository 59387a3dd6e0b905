"""An agent at the real command: turn after turn it calls a tool, and what it has said before is not read again."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.template import template_text
from nautilus.data.tokenizer import train_tokenizer
from nautilus.model.language import Language

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("llguidance"), reason="calls are held to a grammar by llguidance"),
]
SPARE = 128  # tokens that may be read beside those of a new message: what frames it, and the end of what was before
SETTINGS = {"enable_thinking": True}


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": f"To {name}.", "parameters": schema}}


NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
TOOLS = [
    tool("add", a=NUMBER, b=NUMBER),
    tool("measure", text={"type": "string", "maxLength": 120}),
    tool("turn", way={"type": "string", "enum": ["left", "right"]}, steps=NUMBER),
]


def computed(name, given):
    """What the tools do. The arguments hold to their schemas, or this fails."""
    if name == "add":
        assert given.keys() == {"a", "b"} and all(0 <= number <= 999 for number in given.values())
        return str(given["a"] + given["b"])
    if name == "measure":
        return f"{len(given['text'])} characters"
    assert name == "turn" and given["way"] in ("left", "right")
    return f"at {(given['steps'] if given['way'] == 'left' else -given['steps']) % 360} degrees"


@pytest.fixture(scope="module", params=["spaced"])
def folder(request, tmp_path_factory):
    texts = [template_text(request.param), json.dumps(TOOLS), "at 12 degrees 345 characters left right " * 20]
    tokenizer = train_tokenizer(texts, vocab=900, template=template_text(request.param))
    mamba = Mamba(heads=4, head_width=16, state=16, groups=2)
    experts = Experts(experts=8, active=2, hidden=32, shared=32)
    layers = lay("ME*M", mamba, Attention(heads=2, groups=1, head_width=32), experts)
    config = Config(vocab=tokenizer.vocab, width=64, layers=layers, eos=(tokenizer.eos,), positions=1 << 15)
    model = Language(config).initialise(3)
    model.head_weight.data *= 12  # so that it does not say the same to all
    path = tmp_path_factory.mktemp("agent") / "tiny"
    model.save(path, precision="fp32", tokenizer=tokenizer)
    return path


@contextlib.contextmanager
def server(folder, *words):
    """`nautilus serve` in a process of its own: the address that it tells, and the process."""
    command = [sys.executable, "-m", "nautilus", "serve", str(folder), "port=0", "name=tiny", "grace=1", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield re.search(r"http://[^/]+", process.stdout.readline())[0], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0


@pytest.fixture(scope="module")
def both(folder):
    """A server that knows prefixes, one that reads every prompt from its beginning, and how to wait for the first."""
    with server(folder) as (knowing, pid), server(folder, "saved_gb=0") as (fresh, _):
        yield knowing, fresh, lambda: idle(pid)


def idle(pid):
    """Wait until none of its threads has anything to do."""
    tasks, calm, until = Path(f"/proc/{pid}/task"), 0, time.monotonic() + 60
    if not tasks.is_dir():
        time.sleep(2)
    while tasks.is_dir() and calm < 3 and time.monotonic() < until:
        time.sleep(0.05)
        states = [task.joinpath("stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
        calm = calm + 1 if {*states} == {"S"} else 0


def official(url):
    import httpx
    import openai

    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=httpx.Client(verify=False)
    )


def said(answer):
    """All of an answer that is not drawn anew by every server, with the bits of its log-probs."""
    choice = answer.choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    thought, bits = getattr(choice.message, "reasoning_content", None), choice.logprobs.content
    return thought, choice.message.content, calls, choice.finish_reason, [(one.token, one.logprob) for one in bits]


class Agent:
    """The loop that every agent of OpenAI's client runs: what the assistant said goes back as it came."""

    def __init__(self, client, **how):
        self.client, self.how = client, how
        self.messages = [{"role": "system", "content": "You are an agent. " * 20}]

    def count(self, text):
        """Tokens of a text."""
        base = str(self.client.base_url).removesuffix("/v1/")
        return self.client.post(f"{base}/tokenize", body={"prompt": text}, cast_to=object)["count"]

    def request(self, **how):
        return {
            "model": "tiny", "messages": self.messages, "tools": TOOLS, "logprobs": True, "max_tokens": 600,
            "extra_body": {"chat_template_kwargs": SETTINGS, "thinking_token_budget": 12}, "temperature": 1.5,
            **self.how, **how,
        }  # fmt: skip

    def turn(self, new, **how):
        """An answer to these new messages, and how many tokens of the prompt were read beside those of their texts."""
        self.messages += new
        answer = self.client.chat.completions.create(**self.request(**how))
        self.messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        texts = sum(self.count(message["content"]) for message in new)
        return answer, answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens - texts

    def results(self, answer):
        return [
            {
                "role": "tool", "tool_call_id": call.id,
                "content": computed(call.function.name, json.loads(call.function.arguments)),
            }
            for call in answer.choices[0].message.tool_calls
        ]  # fmt: skip


@pytest.mark.parametrize("folder, parallel", [("spaced", False), ("glued", True)], indirect=["folder"])
def test_fifty_turns_are_answered_as_by_a_server_that_knows_nothing(both, parallel):
    """Nine turns of tools, then one in which the model answers and the user asks anew. Tools and users take a moment,
    in which the next turn is read as far as it is known: a random model writes other tokens than the text of its answer
    has, so that what it had in mind is of no use."""
    with official(both[0]) as client, official(both[1]) as fresh:
        agent, new, again, used = Agent(client, parallel_tool_calls=parallel), [user("Begin.")], [], set()
        for number in range(50):
            ends = number % 10 == 9
            how = {"tool_choice": choice_of(number), "seed": number} | ({"max_tokens": 40} if ends else {})
            asked = [*agent.messages, *new]
            answer, reread = agent.turn(new, **how)
            alone = fresh.chat.completions.create(**agent.request(**how) | {"messages": asked})
            assert said(answer) == said(alone) and alone.usage.prompt_tokens_details.cached_tokens == 0
            assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
            again.append(reread)
            both[2]()
            if ends:
                new = [user(f"Go on after {number}.")]
                continue
            assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.reasoning_content
            new = agent.results(answer)
            used |= {call.function.name for call in answer.choices[0].message.tool_calls}
    assert used == {"add", "measure", "turn"}
    assert max(again[1:]) <= SPARE, str(again)


def user(text):
    return {"role": "user", "content": text}


def choice_of(number):
    """That calls are certain is the grammar's doing: the model is random. In every second turn it chooses the tool."""
    if number % 10 == 9:
        return "none"
    name = TOOLS[number % 3]["function"]["name"]
    return "required" if number % 2 else {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("folder", ["spaced"], indirect=True)
def test_the_same_with_the_other_client(both):
    anthropic = pytest.importorskip("anthropic")
    web = [anthropic.DefaultHttpxClient(verify=False) for _ in range(2)]
    knowing, fresh = (
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, http_client=client)
        for url, client in zip(both[:2], web, strict=True)
    )
    with knowing, fresh:
        tools = [{"name": one["function"]["name"], "input_schema": one["function"]["parameters"]} for one in TOOLS]
        messages = [user("Begin, with this client. " * 10)]
        for number in range(8):
            asked = {
                "model": "tiny", "max_tokens": 600, "messages": messages, "tools": tools,
                "tool_choice": {"type": "any"}, "thinking": {"type": "enabled", "budget_tokens": 12},
                "extra_body": {"seed": number, "top_k": 40},
            }  # fmt: skip
            answer, alone = knowing.messages.create(**asked), fresh.messages.create(**asked)
            assert plain(answer) == plain(alone) and answer.stop_reason == "tool_use"
            assert {block.type for block in answer.content} >= {"thinking", "tool_use"}
            used = answer.usage
            assert used.input_tokens + used.cache_read_input_tokens == alone.usage.input_tokens
            assert not number or used.input_tokens <= SPARE, "the new message is within that, too"
            messages += [
                {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
                results(answer),
            ]
            both[2]()


def plain(answer):
    return [block.model_dump(exclude={"id"}) for block in answer.content]


def results(answer):
    return {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": computed(block.name, block.input)}
            for block in answer.content
            if block.type == "tool_use"
        ],
    }
