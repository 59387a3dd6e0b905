import pickle

import torch

from nautilus.serve import Sampling
from nautilus.serve.draft.proposal import Counts
from nautilus.serve.load import Load, arms_of, together
from tests.serve.draft.test_policy import MODELS, engine_of, prompts_of

torch.set_num_threads(1)
BARE = {"running": 1, "waiting": 2, "waiting_tokens": 3, "slots": 1, "pages": 0.5, "preempted": 0, "steps": 7}


def sums(load):
    return load.drafts, load.draft_tokens, load.accepted_tokens


def test_drafts_are_counted_over_their_sources_and_are_nothing_where_there_are_none():
    arms = {"cache": Counts(drafts=2, drafted=9, accepted=5), "mtp": Counts(drafts=1, drafted=4)}
    assert sums(Load(**BARE, arms=arms)) == (3, 13, 5)
    assert sums(Load(**BARE, arms={})) == (0, 0, 0)
    assert sums(Load(**BARE)) == (None, None, None)


def test_several_loads_as_one_and_each_stays_as_it_is():
    first = Load(**BARE, arms={"cache": Counts(drafts=2, drafted=9, accepted=5)})
    second = Load(**(BARE | {"pages": 0.25}), arms={"cache": Counts(drafts=1, drafted=1), "mtp": Counts(drafts=4)})
    total = together([first, Load(**BARE), second])
    assert (total.running, total.steps, total.pages) == (3, 21, 1.25 / 3)
    assert total.arms == {"cache": Counts(drafts=3, drafted=10, accepted=5), "mtp": Counts(drafts=4)}
    assert sums(first) == (2, 9, 5)
    assert together([Load(**BARE)] * 2).arms is None and together([]).running == 0


def answered(engine):
    """Requests, all with their answers."""
    for _ in range(2):  # the second time the answers are known
        requests = [engine.request(prompt, Sampling(temperature=0, max_tokens=60)) for prompt in prompts_of(0)]
        for request in requests:
            engine.submit(request)
        while not all(request.finished for request in requests):
            engine.step()
        yield from requests


def test_what_an_engine_has_tried_is_told_as_it_was_then():
    assert arms_of(engine_of(MODELS["MM"], 0)) is None
    engine = engine_of(MODELS["MM"])
    before = arms_of(engine)
    requests = [*answered(engine)]
    after = Load(**BARE, arms=pickle.loads(pickle.dumps(arms_of(engine))))
    assert sums(Load(**BARE, arms=before)) == (0, 0, 0)
    assert 0 < after.drafts < after.accepted_tokens <= after.draft_tokens
    assert after.accepted_tokens == sum(piece.source != "plain" for one in requests for piece in one.pieces)


def test_a_request_knows_how_many_tokens_were_tried_for_it():
    engine = engine_of(MODELS["MM"])
    tried = sum(request.drafted for request in answered(engine))
    assert tried == Load(**BARE, arms=arms_of(engine)).draft_tokens > 0
