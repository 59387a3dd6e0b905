"""Thousands of random operations on one server, compared with an oracle that computes every answer anew and alone."""

import logging
import random

import pytest

from nautilus.serve import Sampling
from tests.serve.draft.test_policy import Adversary, Mixed, make_cheap
from tests.serve.reliability.parts import Oracle, audit, engine_of, hybrid, words

OPERATIONS = 2500  # of each seed
LIMITS = {"pages": 40, "saved_gb": 6e-5, "saved_folder_gb": 4e-4}  # so little that all of it runs out all the time


class House:
    """An engine with its folder, the requests that are under way, and what was asked before."""

    def __init__(self, seed, folder, drafts):
        self.drafts, self.sizes = drafts, [1, 12, 40, 110] if drafts else [1, 4, 12, 40]  # with them all is over sooner
        self.draw, self.folder, self.model = random.Random(seed), folder, hybrid(seed, mtp=drafts > 7)
        self.live, self.mixed, self.known = [], set(), [[]]
        self.seen = dict.fromkeys(("ended", "cancelled", "failed", "found"), 0)
        self.put_off = self.restored = self.evicted = self.copied = 0
        self.start()

    def start(self):
        self.oracle = Oracle(self.model)
        self.engine = engine_of(self.model, saved_folder=self.folder, drafts=self.drafts, **LIMITS)
        if self.engine.speculation:
            make_cheap(self.engine.speculation)
            (Adversary if self.drafts == 7 else Mixed)("half", self.answer).speak(self.engine.speculation)
        self.engine.scheduler.seconds_per_token = 1.0  # so that files pay

    def answer(self, request):
        return self.oracle.answer(request.tokens[: request.prompt], request.sampling).tokens

    # ----- operations -------------------------------------------------------------------------------------------------

    def submit(self):
        """A prompt that goes on from one before, or from a part of it."""
        draw, before = self.draw, self.draw.choice(self.known)
        kept = draw.choice([len(before), draw.randint(0, len(before))])
        prompt = [*before[:kept], *words(draw, draw.randint(1, 30))][-200:]
        marks = sorted(draw.sample(range(1, len(prompt) + 1), min(len(prompt), draw.randint(0, 2))))
        sampling = Sampling(
            seed=draw.randrange(3), temperature=draw.choice([0.0, 1.0]), max_tokens=draw.choice(self.sizes)
        )
        fields = {"tenant": draw.choice(["", "a"]), "marks": tuple(marks), "priority": draw.randint(0, 1)}
        self.live.append(self.engine.request(prompt, sampling, warm=draw.random() < 0.05, **fields))
        self.engine.submit(self.live[-1])

    def step(self):
        self.engine.scheduler.chunk = self.draw.choice([1, 5, 16, 40])
        for _ in range(self.draw.randint(1, 6)):
            self.engine.step()

    def cancel(self):
        if self.live:
            self.engine.cancel(self.draw.choice(self.live))

    def break_a_step(self):
        compute = self.engine.forward.run
        self.engine.forward.run = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
        self.engine.step()
        self.engine.forward.run = compute

    def break_a_reading(self):
        compute = self.engine.forward.read
        self.engine.forward.read = lambda *_, **__: (_ for _ in ()).throw(MemoryError("broken"))
        self.engine.step()
        self.engine.forward.read = compute

    def spill(self):
        self.engine.prefixes.spill()

    def drain(self):
        while not self.engine.scheduler.idle:
            self.step()

    def restart(self):
        """With what the folder holds. Those under way are cancelled, as by a server that is told to end."""
        for request in self.live:
            self.engine.cancel(request)
        self.check()
        self.tally()
        self.engine.prefixes.saved.folder.close()
        self.start()

    def swap_weights(self):
        """Those under way go on, to answers that neither weights alone would give: what matters is what comes after."""
        self.check()  # of the weights that were
        self.mixed.update(request for request in self.live if request.berth or request.pieces)
        scale = self.draw.choice([0.9, 1.1])
        self.engine.update({name: scale * tensor for name, tensor in self.model.state_dict().items()})
        self.oracle = Oracle(self.model)

    # ----- what must hold ---------------------------------------------------------------------------------------------

    def check(self):
        assert audit(self.engine) == []
        for request in [request for request in self.live if request.finished]:
            self.live.remove(request)
            reason = request.pieces[-1].finish_reason
            kind = {"cancelled": "cancelled", "error": "failed"}.get(reason, "ended")
            self.seen[kind] += 1
            self.seen["found"] += request.cached > 0
            right = request.warm or request in self.mixed or self.oracle.agrees(request)
            assert right, (request.completion(), request.sampling)
            self.known.append(request.tokens)
        self.known = self.known[-40:]

    def tally(self):
        counts = self.engine.prefixes.saved.counts
        self.put_off += self.engine.scheduler.preempted
        self.copied += sum(one.accepted for one in self.engine.speculation.counts.values()) if self.drafts else 0
        self.restored, self.evicted = self.restored + counts.restored, self.evicted + counts.evictions


WEIGHTS = {
    House.submit: 40, House.step: 45, House.cancel: 6, House.spill: 4, House.drain: 1, House.break_a_step: 1.5,
    House.break_a_reading: 1.5, House.restart: 0.5, House.swap_weights: 0.2,
}  # fmt: skip


@pytest.mark.parametrize(("seed", "drafts"), [(0, 0), (1, 0), (2, 7), (3, 8)])
def test_thousands_of_operations_change_no_answer_and_lose_nothing(seed, drafts, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL + 1, "nautilus.serve")
    house = House(seed, tmp_path / "saved", drafts)
    for _ in range(OPERATIONS):
        (operation,) = house.draw.choices([*WEIGHTS], [*WEIGHTS.values()])
        if operation is House.submit and len(house.engine.scheduler.waiting) > 8:
            operation = House.step
        operation(house)
        house.check()
    house.drain()
    house.check()
    house.tally()
    house.engine.prefixes.saved.folder.close()
    assert not house.live and house.engine.scheduler.idle
    seen = house.seen | {"put off": house.put_off, "restored": house.restored, "evicted": house.evicted}
    assert not drafts or house.copied > 100
    assert min(seen.values()) > 10, f"all of it has happened often: {seen}"
