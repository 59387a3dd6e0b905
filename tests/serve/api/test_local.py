"""A server for the same process: what it tells of a prompt is what held-out loss finds."""

import random

import httpx
import pytest
import torch

from nautilus.eval.loss import document_nats
from nautilus.serve import Engine
from nautilus.serve.api.context import ApiSettings
from nautilus.serve.api.local import serving
from tests.serve.test_scheduler import MODEL, TOKENIZER, VOCAB

torch.set_num_threads(1)


def test_echoed_log_probs_are_those_of_held_out_loss():
    draw = random.Random(1)
    prompts = [[draw.randrange(VOCAB) for _ in range(count)] for count in (2, 40, 90)]
    asked = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    engine = Engine(MODEL, TOKENIZER, max_tokens=96, saved_gb=0.01)
    with (
        serving(engine, ApiSettings(model="tiny")) as url,
        httpx.Client(base_url=url, timeout=60, verify=False) as client,
    ):
        answer = client.post("/v1/completions", json=asked).raise_for_status().json()
        told = client.post("/v1/completions", json={**asked, "max_tokens": 0}).raise_for_status().json()
    for choice, short, prompt in zip(answer["choices"], told["choices"], prompts, strict=True):
        found = choice["logprobs"]["token_logprobs"]
        assert len(found) == len(prompt) + 1 and found[0] is None and choice["logprobs"]["top_logprobs"][0] is None
        want = document_nats(MODEL, [prompt[1:]], start=prompt[0])[0]
        assert [-value for value in found[1:-1]] == pytest.approx(want.tolist(), abs=2e-5)
        logits_TV = MODEL(torch.tensor([prompt]))[0][0]
        for place, best in enumerate(logits_TV.argmax(-1).tolist(), start=1):
            greedy = found[place] == max(choice["logprobs"]["top_logprobs"][place].values())
            assert greedy == (place == len(prompt) or best == prompt[place])
        assert short["logprobs"]["token_logprobs"] == found[:-1] and short["finish_reason"] == "length"


def test_what_fails_in_the_block_ends_the_server_too():
    with pytest.raises(KeyError), serving(Engine(MODEL, TOKENIZER, max_tokens=96), ApiSettings(model="tiny")) as url:
        raise KeyError
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
