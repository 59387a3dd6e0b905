"""A tiny hybrid, an oracle that computes everything anew, and an audit of who holds what."""

import random
from collections import Counter

import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.ops.pages import PAGE
from nautilus.serve import Engine, Sampling
from nautilus.serve.memory import pages_for
from tests.serve.disagreements import disagreements

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([], vocab=SMALLEST)  # one token per byte, and the control tokens
VOCAB = TOKENIZER.vocab
ROOM = 320  # tokens of a request
MAMBA = Mamba(heads=4, head_width=16, state=8, groups=2)
ATTENTION = Attention(heads=4, groups=2, head_width=16)
PAGE_BYTES = PAGE * 2 * 2 * 16 * 4  # of the keys and values of the one layer that has them, in float32


def hybrid(seed=3, mtp=False, room=ROOM):
    """2 Mamba layers, experts, attention. Sharp enough that answers differ from each other and end now and then."""
    layers, block = (lay(p, MAMBA, ATTENTION, Experts(experts=6, active=2, hidden=32)) for p in ("ME*M", "*E"))
    sizes = {"vocab": VOCAB, "width": 64, "positions": room, "layers": layers, "mtp": block if mtp else ()}
    model = Language(Config(**sizes, eos=(TOKENIZER.eos,)))
    model.initialise(seed).head_weight.data *= 12
    return model.requires_grad_(False).eval()


def engine_of(model, *, pages=0, **limits):
    """pages: of all requests together; 0: enough for all."""
    cache_gb = pages * PAGE_BYTES / 1e9 if pages else None
    how = {"rows": 4, "chunk": 24, "step_seconds": 0.0, "saved_gb": 1e-3} | limits
    return Engine(model, TOKENIZER, cache_gb=cache_gb, **how)


def facts(completion):
    """What must be the same in any company. Without native kernels log-probs differ by rounding."""
    return completion.tokens, completion.logprobs if native().functions is not None else None, completion.finish_reason


class Oracle:
    """Answers of an engine that has one request at a time, reads every prompt in one piece and keeps nothing."""

    def __init__(self, model):
        self.engine, self.known = Engine(model, TOKENIZER, rows=1), {}

    def answer(self, prompt, sampling):
        asked = (*prompt,), sampling
        if asked not in self.known:
            self.known[asked] = self.engine.generate([list(prompt)], sampling)[0]
        return self.known[asked]

    def agrees(self, request):
        """With a request that ended by itself; of one that was cancelled or failed, with what it had until then."""
        got = request.completion()
        want = self.answer(got.prompt, request.sampling)
        if got.finish_reason in ("cancelled", "error"):
            return got.tokens == want.tokens[: len(got.tokens)]
        return facts(got) == facts(want)


def audit(engine):
    """What is wrong, in words: slots, pages and saved states, against those who hold them; nothing if all is well."""
    scheduler, berths, saved = engine.scheduler, engine.berths, engine.prefixes.saved
    live = [request.berth for request in scheduler.active]
    wrong = [f"{len(live) - len([*filter(None, live)])} requests run without memory"] if None in live else []
    live = [*filter(None, live)]
    wrong += ["one that waits has memory"] * any(request.berth for request in scheduler.waiting)
    wrong += ["one that is finished is still here"] * any(r.finished for r in (*scheduler.active, *scheduler.waiting))
    if (slots := sorted([*berths.slots, *(berth.slot for berth in live)])) != [*range(engine.rows)]:
        wrong.append(f"the slots are {slots}")
    pool, held = berths.pool, Counter(page for berth in live for page in berth.pages)
    left = {page: count - held[page] for page, count in enumerate(pool.references) if count != held[page]}
    wrong += disagreements(saved, left) if saved is not None else [f"pages are held by nobody: {left}"] if left else []
    if sorted(pool.unused) != [page for page, count in enumerate(pool.references) if not count]:
        wrong.append("the free pages are not those without references")
    if saved is not None and any(entry.locks for entry in saved.entries()):
        wrong.append("a saved state is locked")
    short = [berth.length for berth in live if len(berth.pages) < pages_for(berth.length)]
    return wrong + [f"a request of {length} tokens has too few pages" for length in short]


def words(draw, count):
    return [draw.randrange(VOCAB) for _ in range(count)]


def some_requests(engine, count, *, seed=0, longest=60):
    draw = random.Random(seed)
    prompts = [words(draw, draw.randint(1, longest)) for _ in range(count)]
    samplings = [Sampling(seed=draw.randrange(99), max_tokens=draw.randint(2, 30)) for _ in range(count)]
    return [engine.request(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]


def run(engine, *requests, most=2000):
    """Until all have ended, with an audit after every step."""
    for request in requests:
        engine.submit(request)
    for _ in range(most):
        if engine.scheduler.idle:
            return
        engine.step()
        assert audit(engine) == []
    raise AssertionError(f"{len(engine.scheduler.active)} requests still run after {most} steps")
