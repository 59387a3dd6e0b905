"""Two hundred prompts and every way to draft: the tokens are those of plain steps, whatever the model's weights lie in.

Prompts and answers cross pages, chunks and the places at which states are kept; a prompt that was answered before goes
on from what was kept of it.
"""

import random

import pytest
import torch

from nautilus.eval import arms
from nautilus.eval.arms import Arm
from nautilus.model.linear import Linear
from nautilus.model.moe import ExpertWeights
from nautilus.ops.cpu.library import native
from nautilus.ops.encode import encode
from nautilus.serve import Engine, Sampling
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.policy import Judge
from tests.eval.test_contest import predictor_of
from tests.posttrain.small import FIRST, TOKENIZER, WORDS, counted, counter
from tests.serve.draft.test_policy import make_cheap

torch.set_num_threads(1)
NATIVE = pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
PROMPTS, MOST, ANSWER = 200, 12, 32


def model_of(kind):
    """fp32, bf16, or bf16 with matrices of few bits."""
    model = counter()
    if kind == "fp32":
        return model
    model = model.bfloat16()
    for module in model.modules() if kind != "bf16" else ():
        if isinstance(module, Linear):
            module.hold(encode(module.weight.float(), kind))
        elif isinstance(module, ExpertWeights):
            for name, stack in list(module.named_parameters(recurse=False)):
                module.hold(name, tuple(encode(one.float(), kind) for one in stack))
    return model.requires_grad_(False).eval()


def prompts():
    """Strides that the model knows, broken ones, noise; of 3 to 150 tokens."""
    draw = random.Random(0)
    for number in range(PROMPTS):
        text = counted(draw.randrange(WORDS), draw.randint(1, 3), draw.randint(3, 150))
        if number % 3 == 1:
            text = text + text[: draw.randint(1, len(text))]
        if number % 3 == 2:
            text[draw.randrange(len(text))] = FIRST + draw.randrange(WORDS)
        yield text[:150]


def arms_of(engine, model):
    judge = Judge(predictor=predictor_of(model), spelling=Spelling(TOKENIZER))
    ours = Arm(engine.speculation, judge=judge)
    make_cheap(ours)
    return {
        "plain": None,
        "copies": Arm(engine.speculation, arms.copies),
        "mtp 3": Arm(engine.speculation, arms.block(3)),
        "paper": Arm(engine.speculation, arms.by_paper(predictor_of(model, "paper"), 3), judge=judge),
        "ours": ours,
    }


@pytest.mark.slow
@NATIVE
@pytest.mark.parametrize("kind", ["fp32", "nvfp4"])
def test_answers_are_the_same(kind):
    model = model_of(kind)
    engine = Engine(model, TOKENIZER, max_tokens=200, rows=1, chunk=32, drafts=MOST, saved_gb=0.01)
    all_of, tried = arms_of(engine, model), dict.fromkeys(("copies", "mtp 3", "paper", "ours"), 0)
    for number, prompt in enumerate(prompts()):
        sampling = Sampling(temperature=0 if number % 4 else 0.7, seed=number, max_tokens=ANSWER)
        found = {}
        for name, arm in all_of.items():
            engine.speculation = arm
            found[name] = engine.generate([prompt], sampling)[0].tokens
            tried[name] = sum(count.accepted for count in arm.counts.values()) if arm else 0
        assert len({*found.values()}) == 1, (number, found)
    assert min(count for name, count in tried.items() if name != "plain") > PROMPTS, tried
