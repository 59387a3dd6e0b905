"""Every arm gives the plain answers, does what its rule says, and what is told of it is what it did."""

import pytest
import torch

from nautilus.eval import arms, contest
from nautilus.eval.contest import Contest, Means, Question
from nautilus.eval.families import Prompt
from nautilus.eval.speculation import Cycle
from nautilus.model.eagle import Eagle, sizes_for
from nautilus.ops.cpu.library import native
from nautilus.posttrain.depths import depths
from nautilus.posttrain.drafter import mtp_drafter
from nautilus.runtime import Run, UserError, read_metrics
from nautilus.serve.draft.features import NAMES
from nautilus.serve.draft.predictor import Header, Predictor
from nautilus.serve.prefixes import fingerprint
from tests.posttrain.small import FIRST, TOKENIZER, counted, counter

torch.set_num_threads(1)
NATIVE = pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
MOST, TOKENS = 8, 40


def head_of(model):
    words_K = torch.arange(FIRST - 4, FIRST + 20)
    return Eagle(model.config, sizes_for(model.config, len(words_K)), words_K).initialise(model, 0)


def predictor_of(model, mode="survival"):
    """Expects a lot of every draft."""
    grid = (1, 2, 4, 8)
    header = Header(mode=mode, target=fingerprint(model), tokenizer=TOKENIZER.fingerprint, grid=grid)
    outputs = 1 if mode == "paper" else len(grid)
    sizes, tensors = [len(NAMES), 4, 4, outputs], {"means": torch.zeros(len(NAMES)), "scales": torch.ones(len(NAMES))}
    for at in range(3):
        tensors[f"weight_{at}"] = torch.zeros(sizes[at + 1], sizes[at])
        tensors[f"bias_{at}"] = torch.zeros(sizes[at + 1])
    tensors["bias_2"] += 9.0 if mode == "paper" else -9.0
    tensors["knots"] = torch.linspace(0, 1, 4)[None, :, None].repeat(len(grid), 1, 2)
    return Predictor(header, {name: tensor.numpy() for name, tensor in tensors.items()})


def contest_of(model, **more):
    means = Means(most=MOST, depth=2, **more)
    return Contest("counter", model, TOKENIZER, means, 128)


def questions(count=4):
    for number in range(count):
        prompt = Prompt(id=f"{number}", family="open" if number % 2 else "code", set="strides", prompt="1 2 3")
        yield Question(prompt=prompt, tokens=tuple(counted(number, 1 + number % 3, 20)))


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """All answers of a model with everything that there is to speculate with."""
    model, run = counter(), Run.create(tmp_path_factory.mktemp("contest") / "run", {})
    run.state.mkdir()
    more = {"eagle": head_of(model), "predictor": predictor_of(model), "paper": predictor_of(model, "paper")}
    one = contest_of(model, **more)
    return one, run, one.hold(run, [*questions()], tokens=TOKENS, repeats=2)


@NATIVE
def test_all_arms_give_the_plain_answers(held):
    one, _, found = held
    names = [
        "plain", "prompt look-up", "all copied drafts", "mtp 1", "mtp 2", "mtp 3", "mtp 4", "eagle 2", "by score",
        "paper, mtp", "ours, mtp", "paper, eagle", "ours, eagle", "ours, untrained",
        "all-knowing", "oracle",
    ]  # fmt: skip
    assert [*one.contestants()] == names
    assert sorted({each.arm for each in found}) == sorted(names) and len(found) == 2 * 4 * len(names)
    assert all(each.same for each in found)
    for each in found:
        assert sum(cycle.accepted + 1 for cycle in each.cycles) == each.tokens > 30
        assert set(each.spent) == ({"draft", "predict", "verify", "commit"} if each.arm != "plain" else set())
        assert sum(each.spent.values()) == pytest.approx(each.seconds) or each.arm == "plain"


@NATIVE
def test_rules_try_what_they_say(held):
    _, _, found = held
    cycles = lambda arm: [cycle for each in found if each.arm == arm for cycle in each.cycles]
    assert {*cycles("plain")} == {Cycle("plain", 1, 0)}
    assert {cycle.source for cycle in cycles("mtp 3")} <= {"mtp", "plain"}
    widths = [cycle.width for cycle in cycles("mtp 3") if cycle.source == "mtp"]
    assert max(widths) == 4 and widths.count(4) > 0.6 * len(widths)  # shorter only where an answer ends
    assert {cycle.source for cycle in cycles("eagle 2")} <= {"eagle", "plain"}
    copied = [cycle for cycle in cycles("all copied drafts") if cycle.source == "cache"]
    assert copied and max(cycle.accepted for cycle in copied) == MOST  # strides come again after sixteen tokens
    paper = cycles("paper, mtp")
    assert {cycle.source for cycle in paper} >= {"cache"} and all(cycle.width <= MOST + 1 for cycle in paper)
    for cycle in cycles("all-knowing"):
        assert cycle.accepted == cycle.width - 1
    for cycle in cycles("oracle"):
        assert cycle.accepted == cycle.width - 1 or cycle.source == "mtp"  # of which it knows no more than others
    predicted = [draft for each in found if each.arm == "paper, mtp" for draft in each.drafts]
    assert predicted and all(draft.foretold == min(9, MOST) or draft.foretold < MOST for draft in predicted)


@NATIVE
def test_depths_are_what_an_engine_accepts(held):
    one, run, _ = held
    drafter, asked = mtp_drafter(one.model), [*questions()]
    for question, known in one.references(run, asked, TOKENS):
        right = depths(drafter, known.answer, 8)
        assert len(right) == len(known.answer.tokens) and right[0] == 0
        arm = arms.Arm(one.engines["mtp"].speculation, arms.block(4))
        tried = []
        arm.learn = lambda request, proposal, accepted, arm=arm, tried=tried: (
            tried.append((len(request.tokens) - request.prompt - accepted - 1, proposal, accepted)),
            arms.Arm.learn(arm, request, proposal, accepted),
        )
        one.answered("mtp 4", one.engines["mtp"], arm, question, known, TOKENS)
        assert tried
        for at, proposal, accepted in tried:
            told = min(len(proposal.tokens), right[at])
            if (
                accepted != told
            ):  # in another order of adding, of two tokens that are as probable the other one is first
                assert proposal.foretold.probs[min(accepted, told)] < 0.51


@NATIVE
def test_an_interrupted_contest_goes_on_as_if_nothing_had_been(held, tmp_path, monkeypatch):
    one, run, found = held
    again = Run.create(tmp_path / "again", {})
    again.state.mkdir()
    whole, left = Contest.answered, [47]

    def interrupted(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return whole(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Contest, "answered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.hold(again, [*questions()], tokens=TOKENS, repeats=2)
    assert len(read_metrics(again.state / "answers.jsonl")) == 47
    gone_on = one.hold(again, [*questions()], tokens=TOKENS, repeats=2)
    facts = lambda answers: [
        (each.arm, each.prompt, each.tokens, sorted(each.cycles)) for each in answers if "ours" not in each.arm
    ]
    plan = "oracle", "all-knowing"  # by measured costs
    ruled = lambda answers: [fact for fact in facts(answers) if fact[0] not in plan]
    assert ruled(gone_on) == ruled(found)


def test_answers_that_are_too_short_to_be_timed_are_refused(tmp_path):
    run = Run.create(tmp_path / "run", {})
    run.state.mkdir()
    with pytest.raises(UserError, match="none of 2 plain answers"):
        contest_of(counter("")).hold(run, [*questions(2)], tokens=MOST, repeats=1)


def test_without_a_block_rules_go_plainly_where_nothing_is_copied():
    names = [*contest_of(counter("")).contestants()]
    assert names == [
        "plain",
        "prompt look-up",
        "all copied drafts",
        "by score",
        "ours, untrained",
        "all-knowing",
        "oracle",
    ]
    assert contest.Contest.main.fget(contest_of(counter(""))) == ""
