"""A model that has learnt to count in strides, but whose block drafts badly far ahead; its own answers."""

import functools
import random

import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.batch import Batch
from nautilus.data.mix import Stream
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.own_text import Answer
from nautilus.serve import Engine, Sampling
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw

TOKENIZER = train_tokenizer([], vocab=SMALLEST)
FIRST, WORDS = 100, 16  # tokens that are counted with
LENGTH = 40


def config(mtp="*E"):
    mamba, attention = Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=2, groups=1, head_width=16)
    experts = Experts(experts=4, active=2, hidden=32, shared=32)
    layers = lay("M*EM", mamba, attention, experts)
    eos = (TOKENIZER.eos,)
    return Config(vocab=TOKENIZER.vocab, width=32, layers=layers, mtp=lay(mtp, attention, experts), eos=eos)


def counted(start, stride, length=LENGTH):
    return [FIRST + (start + stride * place) % WORDS for place in range(length)]


def strides(rows=160, seed=0):
    draw = random.Random(seed)
    tokens = torch.tensor([counted(draw.randrange(WORDS), draw.randint(1, 3)) for _ in range(rows)])
    weights = torch.ones(tokens.shape)
    weights[:, 0] = 0
    return Batch(tokens, {"next_token": weights})


@functools.cache
def weights_of(mtp):
    model = Language(config(mtp)).initialise(1)
    stream = Stream({"strides": strides()}, rows=16, micro=16, seed=0)
    optim = OptimConfig(lr=1e-2, weight_decay=0.0)
    fit(model, stream, pretrain(mtp_depths=1 if mtp else 0), adamw(model, optim), steps=70)
    return model.state_dict()


def counter(mtp="*E"):
    """The same every time, and nobody else's."""
    model = Language(config(mtp))
    model.load_state_dict(weights_of(mtp))
    return model.requires_grad_(False).eval()


def greedy(model, count=8, length=LENGTH, seed=5):
    """Its answers to two or three numbers of a count."""
    draw = random.Random(seed)
    prompts = [counted(draw.randrange(WORDS), draw.randint(1, 3), draw.randint(2, 3)) for _ in range(count)]
    found = Engine(model, TOKENIZER, max_tokens=64).generate(prompts, Sampling(temperature=0, max_tokens=length))
    return [Answer(prompt=one.prompt, tokens=one.tokens) for one in found]
