"""A service with the interface of the real one, whose answers come from a script."""

import asyncio
import itertools
import math
from types import SimpleNamespace

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.serve.control import StopStrings
from nautilus.serve.job import Busy, Draining
from nautilus.serve.load import Load
from nautilus.serve.request import Piece
from nautilus.serve.sample import Drawn

TOKENIZER = train_tokenizer([], vocab=SMALLEST)  # one token per byte, and the control tokens
THOUGHT = "Let me see.\n</think>\n\nHello."
ROOM = 4096


class FakeEngine:
    def __init__(self):
        self.tokenizer, self.max_tokens = TOKENIZER, ROOM
        self.model = SimpleNamespace(config=SimpleNamespace(vocab=TOKENIZER.vocab, eos=(TOKENIZER.eos,)))

    def tokens(self, prompt):
        return TOKENIZER.encode(prompt)


class FakeReply:
    """Some tokens of the script at a time; `pause` seconds between them."""

    replica = "0"

    def __init__(self, service, job, script):
        self.service, self.job, self.script = service, job, script
        self.prompt_tokens, self.cached_tokens = len(job.tokens), service.cached
        self.drafted_tokens = None if service.arms is None else 0
        self.closed = False
        self.ended = asyncio.Event()
        self.written = TOKENIZER.stream(skip_special=True)
        self.stops = StopStrings(job.sampling.stop)
        self.count = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.job.answer and self.script is not None:
            self.script = None
            return [Piece(text="", token=-1, logprob=0.0, finish_reason="length", prompt=self.prompt())]
        if self.script is None and self.service.fault is not None:
            raise self.service.fault
        if self.closed or self.script is None:
            raise StopAsyncIteration
        if self.count:
            await asyncio.sleep(self.service.pause)
        elif self.service.delay:
            await asyncio.sleep(self.service.delay)
        if self.service.fault is not None and self.count >= 2:
            self.script = None
            return [Piece(text="", token=-1, logprob=0.0, finish_reason="error")]  # then the fault itself
        if self.service.cut.is_set():
            self.script = None
            return [Piece(text="", token=-1, logprob=0.0, finish_reason="cancelled")]
        pieces = []
        for token in itertools.islice(self.script, self.service.width):
            pieces.append(self.piece(token))
            if pieces[-1].finish_reason:
                self.script = None
                break
        return pieces

    def piece(self, token):
        self.count += 1
        end = token == TOKENIZER.eos
        text = self.stops.add(self.written.push(token))
        reason = "stop" if end or self.stops.hit else "length" if self.count >= self.job.sampling.max_tokens else None
        text += self.stops.add(self.written.close()) + self.stops.finish() if reason else ""
        text *= self.service.blow
        top = tuple((token + i, -0.5 - i) for i in range(self.job.sampling.top_logprobs))
        prompt = self.prompt() if self.count == 1 else ()
        source = self.service.sources[(self.count - 1) % len(self.service.sources)]
        if self.drafted_tokens is not None:
            self.drafted_tokens += 2 * (source != "plain")  # of two that are tried one is right
        return Piece(
            text=text, token=token, logprob=-0.5, finish_reason=reason, top=top, stop=self.stops.hit, prompt=prompt,
            source=source,
        )  # fmt: skip

    def prompt(self):
        """Log-probs of the prompt, -0.25 each, where they are asked for."""
        tops = self.job.prompt_logprobs
        if tops is None:
            return ()
        top = lambda token: tuple(((token + i) % TOKENIZER.vocab, -0.25 - i) for i in range(tops))
        first, *others = self.job.tokens
        return (Drawn(first, math.nan, ()), *(Drawn(token, -0.25, top(token)) for token in others))

    async def aclose(self):
        self.closed = True
        self.ended.set()


class FakeService:
    """answers: what is written to each job in turn, the last one to all others. They end by themselves, unless the
    text is None: then they do not end. A job that is not a chat gets its prompt back, in capitals."""

    def __init__(self):
        self.engine, self.ready, self.broken, self.cut = FakeEngine(), True, None, asyncio.Event()
        self.reset()

    def reset(self):
        self.answers, self.jobs, self.warmed, self.replies = [THOUGHT], [], [], []
        self.pause, self.width, self.cached, self.busy, self.fault, self.waiting = 0.0, 1, 0, None, None, 0
        self.delay = 0.0  # seconds to the first token
        self.sources, self.arms = ("plain",), None  # of tokens, in turn; what drafts came to, where there are some
        self.blow = 1  # how often the text of each token is written

    def submit(self, job):
        if not self.ready:
            raise Draining
        if self.busy is not None:
            raise Busy("too many wait", self.busy)
        self.jobs.append(job)
        answer = self.answers[min(len(self.jobs), len(self.answers)) - 1]
        if answer is None:
            script = itertools.cycle(TOKENIZER.encode("on and "))
        else:
            script = [*TOKENIZER.encode(answer, control=True), TOKENIZER.eos]
        self.replies.append(FakeReply(self, job, iter(script)))
        return self.replies[-1]

    def warm(self, job):
        self.warmed.append(job)

    def load(self):
        running = sum(not reply.closed for reply in self.replies)
        return Load(
            running=running, waiting=self.waiting, waiting_tokens=0, slots=running, pages=0.25, preempted=0, steps=0,
            arms=self.arms,
        )  # fmt: skip

    def loads(self):
        return {"0": self.load()}

    async def drain(self, seconds):
        self.ready = False
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(reply.ended.wait() for reply in self.replies))
        except TimeoutError:
            pass
        self.cut.set()
