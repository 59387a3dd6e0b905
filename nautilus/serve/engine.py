"""Generation: prompts in, tokens with their log-probs and text out. Letters: B requests, V vocabulary.

Requests begin as soon as there is room for them. Every step reads prompts for a while, and adds one token to each
request whose prompt has been read. See `scheduler.py` for whose turn it is, `forward.py` for the model's part.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nautilus.config.keys import short
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.ops.state_format import StateFormat
from nautilus.runtime import UserError
from nautilus.serve.draft.proposal import PLAIN, Proposal
from nautilus.serve.draft.settings import Drafts
from nautilus.serve.forward import Forward
from nautilus.serve.limits import checked_limits, checked_weights, engine_failed
from nautilus.serve.memory import Berths
from nautilus.serve.prefixes import Prefixes
from nautilus.serve.prompt import Prompt, new_request, prompt_tokens
from nautilus.serve.request import Completion, Piece, Request
from nautilus.serve.rules import Rule
from nautilus.serve.sample import Logits, draw_one, drawn_ahead, looked_at
from nautilus.serve.sampling import Sampling
from nautilus.serve.scheduler import Scheduler

log = logging.getLogger("nautilus.serve")


class Engine:
    """Answers of a model to prompts; a prompt is text to continue, a list of token ids, or messages of a chat.

        engine = nautilus.Engine(*nautilus.load("runs/demo"), max_tokens=512)
        first, second = engine.generate(["Return the", "def f("], Sampling(max_tokens=20))   each a Completion
        for piece in engine.stream([{"role": "user", "content": "Hello"}]):                  a Piece for every token
            print(piece.text, end="")

    `Sampling`, of `nautilus.serve`, says how tokens are chosen and when an answer ends.

    model, tokenizer: as `nautilus.load` gives them; it computes where its weights are. A model in training may be asked
        too, and is handed back as it was.
    max_tokens: most tokens of a request, prompt and answer together, from 2 to the positions of the model's config;
        None, the default: as many as these.
    rows: most requests that run together (32 by default); others wait for their turn. A state is kept for each.
    chunk: most tokens of a prompt that are read at a time (512 by default); more of them take more memory.
    cache: the format of keys and values, "bf16", "fp8", "int8" or "f32"; "": as the activations.
    cache_gb: most memory of keys and values, in 10^9 bytes; a quarter of the machine's by default. There is room for
        rows x max_tokens of them, but in no more than that, unless one request takes more. Where it is short, some
        requests wait, and what they had read is read again.
    state: how recurrent states are stored between tokens: "fp32", exact, or a narrower format by its name in
        `nautilus.ops.state_format`, such as "fp16_sr". A state is rounded after the prompt, then after every token.
    state_seed: of the random bits of formats that round stochastically, such as that one; 0 by default.
    drafts: most tokens that are tried at once, where that is faster than token by token; 0, none, by default. They are
        copied from the request and from earlier answers to the same tenant, foretold by the model's own block for
        multi-token prediction, or by a grammar. Takes states in fp32, and seconds to measure what passes cost.
        `Drafts` says more: a draft head, a predictor, no block.
    step_seconds: how long prompts are read before those that are answered get their next token; for ever by default,
        which is fastest in all.
    saved_gb: memory for the states of known prefixes, in 10^9 bytes, which are then not read again; none by default.
    saved_folder: where states go that memory has no room for, and come back from, also in another process.
    saved_folder_gb: most 10^9 bytes of files there; 16 by default.

    `rows`, `chunk`, `drafts` and `step_seconds` do not change results beyond rounding; on native kernels they change
    no bit.
    UserError for a max_tokens, rows, chunk, cache or state that cannot be, and where there is no memory for them.
    """

    def __init__(
        self, model: Language, tokenizer: Tokenizer, *, max_tokens: int | None = None, rows: int = 32, chunk: int = 512,
        cache: str = "", cache_gb: float | None = None, state: str = "fp32", state_seed: int = 0,
        drafts: int | Drafts = 0, step_seconds: float = float("inf"), saved_gb: float = 0,
        saved_folder: Path | None = None, saved_folder_gb: float = 16,
    ):  # fmt: skip
        amounts = {"cache_gb": cache_gb, "saved_gb": saved_gb, "saved_folder_gb": saved_folder_gb}
        drafting = drafts if isinstance(drafts, Drafts) else Drafts(most=drafts)
        self.max_tokens = checked_limits(model, max_tokens, rows, chunk, drafting.most, step_seconds, amounts)
        self.model, self.tokenizer, self.rows, self.chunk = model, tokenizer, rows, chunk
        stored = StateFormat(name=state, seed=state_seed)
        most = None if cache_gb is None else cache_gb * 1e9
        head = drafting.head(model)
        self.berths = Berths(
            model, rows=rows, max_tokens=self.max_tokens, cache=cache, cache_bytes=most, state=stored,
            window=1 + drafting.most if drafting.most else 0, beside=head.layers if head else (),
        )  # fmt: skip
        self.forward = Forward(model, self.berths)
        self.scheduler = Scheduler(self.berths, chunk=chunk, step_seconds=step_seconds, grow=stored.lossless)
        self.speculation = drafting.made(self.forward, tokenizer, head)
        self.prefixes = Prefixes(self.berths, self.scheduler, model, saved_gb, saved_folder, saved_folder_gb)

    # ----- answers ----------------------------------------------------------------------------------------------------

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Iterator[Piece]:
        """The answer to one prompt, token by token. A prompt is messages, tokens, or text to continue.

        Streams that are read in turns go on together: what one has to wait for takes the others on too.
        """
        request = self.request(prompt, sampling)  # outside the generator: bad input is an error here and now
        return self.follow(request)

    def follow(self, request: Request) -> Iterator[Piece]:
        self.submit(request)
        try:
            told = 0
            while told < len(request.pieces) or not request.finished:
                while told == len(request.pieces):
                    self.step()
                told += 1
                request.raise_error()
                yield request.pieces[told - 1]
        finally:
            self.cancel(request)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Completion]:
        """The answers to several prompts, in their order. Each gets the tokens that it would get alone."""
        if isinstance(prompts, str | Mapping | None):
            raise UserError(
                f"answers to {short(prompts)} were asked for; give a list of prompts, or use stream for one"
            )
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if len(samplings) != len(prompts):
            raise UserError(
                f"answers to {len(prompts)} prompts were asked for with {len(samplings)} samplings; give one sampling "
                "for all prompts or one for each"
            )
        requests = [self.request(*pair) for pair in zip(prompts, samplings, strict=True)]
        try:
            for request in requests:
                self.submit(request)
            while not all(request.finished for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        for request in requests:
            request.raise_error()
        return [request.completion() for request in requests]

    def request(self, prompt: Prompt, sampling: Sampling, rules: Sequence[Rule] = (), **more) -> Request:
        """See `new_request`."""
        limits = {"config": self.model.config, "max_tokens": self.max_tokens}
        return new_request(self.tokens(prompt), sampling, rules, tokenizer=self.tokenizer, **limits, **more)

    def tokens(self, prompt: Prompt) -> list[int]:
        return prompt_tokens(prompt, self.tokenizer)

    # ----- one step ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        if self.scheduler.idle and any(parameter.requires_grad for parameter in self.model.parameters()):
            self.forget()  # the weights may have changed since the last request, but do not during one
        self.scheduler.add(request)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Other values for weights, by their names in the model's state_dict, between two steps: reinforcement learning
        does so. UserError, before anything is changed, for a name or a shape that the model does not have."""
        own = self.model.state_dict()
        checked_weights(own, weights)
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        self.forget()

    def forget(self) -> None:
        """What is known of the weights, because they have changed: packed matrices, recorded steps, saved prefixes.
        Requests under way go on with the states that they have, from which no other one may."""
        for request in self.scheduler.active:
            if request.berth:
                request.berth.mixed = True
        self.forward.forget()
        if self.speculation:
            self.speculation.forget()
        self.prefixes.clear()

    def cancel(self, request: Request) -> None:
        """Its memory is free at once. Nothing happens to one that is finished."""
        if not request.finished:
            self.end(request, "cancelled")

    def step(self) -> list[tuple[Request, Piece]]:
        """Prompts are read, then every request whose prompt has been read gets a token. What came for whom.

        What goes wrong at one request ends that one alone, with an error. Where it was in a call for several, all of
        them are read again and go on in calls of their own, which give the same and show whose fault it is.
        """
        found = self.admit()
        for batch in self.scheduler.readings():
            try:
                found += self.read(batch)
            except Exception as bad:
                found += self.put_apart([one for one, _ in batch], bad)
        self.make_room()
        running = self.scheduler.running()
        alone = [[request] for request in running if request.apart]
        for group in ([request for request in running if not request.apart], *alone):
            found += self.advance(group) if group else []
        return found

    def admit(self) -> list[tuple[Request, Piece]]:
        """Those who wait take memory in their order, until one of them finds none."""
        found, coming = [], {one for active in self.scheduler.active for one in self.prefixes.ahead(active)}
        for request in self.scheduler.in_order() if self.berths.slots else ():
            if self.prefixes.comes(request, coming):
                continue
            try:
                request.berth = self.prefixes.board(request)
            except Exception as bad:
                found += self.fail(request, bad)
                continue
            if request.berth is None:
                break
            self.scheduler.begin(request)
            coming.update(self.prefixes.ahead(request))
        return found

    def read(self, batch: list[tuple[Request, int]]) -> list[tuple[Request, Piece]]:
        """The next so many tokens of prompts; the first token of the answer where that was the last of them. One whose
        tokens have no log-probs ends with the error, alone."""
        begin, parts = time.monotonic(), [request.part(size) for request, size in batch]
        try:
            logits_BV = self.forward.read(parts)
        except UserError as bad:
            if len(batch) > 1:
                raise
            batch[0][0].error = bad
            return [(batch[0][0], self.end(batch[0][0], "error"))]
        self.scheduler.measured(batch, time.monotonic() - begin)
        requests = [request for request, _ in batch]
        for request in requests:
            if len(request.tokens) - request.unread in request.marks:
                self.prefixes.keep(request)
        found = [(one, self.end(one, "length")) for one in requests if not (one.unread or one.answered)]
        answered = [one for one, part in zip(requests, parts, strict=True) if part.last]
        return found + (self.accept(answered, looked_at(logits_BV)) if logits_BV is not None else [])

    def end(self, request: Request, reason: str) -> Piece:
        piece = request.end(reason)
        self.leave(request)
        return piece

    def leave(self, request: Request) -> None:
        self.scheduler.leave(request)
        if self.speculation:
            self.speculation.finish(request)

    def advance(self, requests: list[Request]) -> list[tuple[Request, Piece]]:
        """A token for each, and those of its draft that come true. Where that fails they are put off: what is in their
        memory then is of no use. States that are rounded as they rest would not be the same when they are read again,
        so with these they end."""
        proposals = self.speculation.propose(requests) if self.speculation else {}
        berths, begin = [request.berth for request in requests if request.berth], time.monotonic()
        try:
            if proposals:
                self.forward.attempt(berths, [[o.tokens[-1], *proposals.get(o, PLAIN).tokens] for o in requests])
            else:
                self.forward.step(berths, [request.tokens[-1] for request in requests])
        except Exception as bad:
            return self.put_apart(requests, bad)
        rows = self.forward.looked_at()
        if self.speculation:
            self.speculation.costs.add(len(rows), time.monotonic() - begin)
        return self.verify(requests, proposals, rows) if proposals else self.accept(requests, rows)

    def verify(
        self, requests: list[Request], proposals: Mapping[Request, Proposal], logits: list[Logits]
    ) -> list[tuple[Request, Piece]]:
        """Every token is drawn as it would have been without a draft; as long as it is that of the draft, the logits of
        the next one are there already."""
        assert self.speculation
        rows, found = iter(logits), dict[Request, list[tuple[Request, Piece]]]()
        for request in requests:
            proposal = proposals.get(request, PLAIN)
            mine = [(next(rows), foretold) for foretold in (*proposal.tokens, None)]
            found[request] = self.take_along(request, mine, proposal.source)
            if proposal.tokens:
                request.drafted += len(proposal.tokens)
                self.speculation.learn(request, proposal, sum(piece.source != "plain" for _, piece in found[request]))
        self.forward.accept([one.berth for one in requests if one.berth], [*map(len, found.values())])
        for request in requests:
            self.settle(request)
        return [told for pieces in found.values() for told in pieces]

    def take_along(
        self, request: Request, rows: list[tuple[Logits, int | None]], source: str
    ) -> list[tuple[Request, Piece]]:
        """Tokens up to the first that is not the foretold one."""
        found: list[tuple[Request, Piece]] = []
        for logits, foretold in rows:
            found += self.take(request, logits, foretold, source)
            if request.finished or request.tokens[-1] != foretold:
                break
        return found

    def put_apart(self, requests: list[Request], bad: Exception) -> list[tuple[Request, Piece]]:
        if requests[0].apart or not self.scheduler.grow or (len(requests) == 1 and requests[0].reading):
            return [told for request in requests for told in self.fail(request, bad)]
        log.error("a step of the engine failed; %d requests are read again", len(requests), exc_info=bad)
        for request in requests:
            request.apart = True
            self.scheduler.put_off(request)
        return []

    def fail(self, request: Request, bad: Exception) -> list[tuple[Request, Piece]]:
        log.error("the engine failed at a request", exc_info=bad)
        request.error = engine_failed(bad)
        return [(request, self.end(request, "error"))]

    def make_room(self) -> None:
        """A place for the next token of everyone who runs; the last in the order are put off where there is none."""
        for request in self.scheduler.running():
            while request.berth and not self.berths.grow(request.berth, len(request.tokens)):
                if not self.prefixes.make_room(1):
                    self.scheduler.put_off(self.scheduler.last())

    def accept(self, requests: list[Request], rows: list[Logits]) -> list[tuple[Request, Piece]]:
        """A token for each."""
        drawn = drawn_ahead(rows, *zip(*((one.sampling, len(one.tokens), one.rules) for one in requests), strict=True))
        found = [told for request, logits in zip(requests, drawn, strict=True) for told in self.take(request, logits)]
        for request in requests:
            self.settle(request)
        return found

    def take(
        self, request: Request, logits: Logits, foretold: int | None = None, source: str = "plain"
    ) -> list[tuple[Request, Piece]]:
        """The next token; a request whose logits or rules allow none ends with the error, alone."""
        try:
            drawn = draw_one(logits, request.sampling, len(request.tokens), request.rules)
            came = source if drawn.token == foretold else "plain"
            piece = request.take(drawn, source=came, version=self.forward.version)
        except UserError as bad:
            request.error = bad
            piece = self.end(request, "error")
        except Exception as bad:
            return self.fail(request, bad)
        self.scheduler.served[request.tenant] += 1
        return [(request, piece)]

    def settle(self, request: Request) -> None:
        """A request that has got its last token leaves, and what it has read is kept."""
        if request.finished and request.berth:  # what led to an error is not to be gone on from, and has left
            if self.speculation and self.prefixes.saved:
                self.speculation.leave(request)
            if request.kept and request.scores is None:  # nor would another that is scored go on from it
                self.prefixes.keep(request)
            self.leave(request)
