"""Episodes played: what a task is told, which tokens count, and what is lost when something breaks."""

import asyncio
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from nautilus.config import Attention, Config, Mamba, lay
from nautilus.data.chat import ChatSettings, chat_tokens, render
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.credit import Effort
from nautilus.posttrain.rollout import Dropped, Player, Playing, reply_of
from nautilus.posttrain.stream import Scoring, play_group
from nautilus.serve import Engine
from nautilus.serve.request import Completion, Piece
from nautilus.serve.service import Service
from nautilus.tasks import Episode, GraderBroken, Problem, Reply, Task, Verdict
from nautilus.tasks.named import TASKS

KEEP = ChatSettings(truncate_history_thinking=False)


@pytest.fixture(scope="module", params=["spaced", "glued"])
def tokenizer(request):
    plain = train_tokenizer([], vocab=SMALLEST)
    return Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text(request.param))


class Script:
    """Answers with these texts, one a turn, whatever is asked; each ends unless it is to be cut."""

    def __init__(self, tokenizer, *texts, cut=()):
        self.tokenizer, self.texts, self.cut, self.jobs = tokenizer, [*texts], cut, []

    def submit(self, job):
        number = len(self.jobs)
        self.jobs.append(job)
        tokens = self.tokenizer.encode(self.texts[number], control=True)
        whole = number not in self.cut
        ids = [*tokens, self.tokenizer.eos] if whole else tokens
        stream = self.tokenizer.stream(skip_special=True)
        pieces = [Piece(text=stream.push(token), token=token, logprob=-0.5) for token in tokens]
        last = Piece(
            text=stream.close(),
            token=ids[-1] if whole else -1,
            logprob=-0.25,
            finish_reason="stop" if whole else "length",
        )

        async def told():
            yield [*pieces, last]

        return told()


def played(answers, tokenizer, task, problem, **playing):
    return asyncio.run(Player(answers, tokenizer, Playing(chat=KEEP, **playing)).play(task, problem, 0))


def problem_of(name: str, level: int = 1) -> Problem:
    return next(TASKS[name]().problems("train", level=level, seed=2))


def test_one_turn(tokenizer):
    task, problem = TASKS["arithmetic"](), problem_of("arithmetic")
    found = played(Script(tokenizer, f"easy\n</think>\n{problem.truth}"), tokenizer, task, problem)
    prompt = chat_tokens(tokenizer, problem.messages, settings=KEEP)
    assert (
        found.verdict.reward == 1
        and found.ended
        and found.turns[0].reply == Reply(content=problem.truth, thinking="easy")
    )
    assert found.tokens[: len(prompt)] == tuple(prompt) and found.tokens[-1] == tokenizer.eos
    assert found.drawn == [False] * len(prompt) + [True] * (len(found.tokens) - len(prompt))
    assert found.logprobs[len(prompt) :] == (-0.5,) * (found.length - 1) + (-0.25,)
    assert not any(found.logprobs[: len(prompt)])


def calls(*pairs) -> str:
    """As a model writes calls behind its thinking."""
    written = "".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())
        + "</function>\n</tool_call>\n"
        for name, given in pairs
    )
    return f"go\n</think>\n{written}"


def test_turns_with_tools_go_on_from_the_tokens_that_were_drawn(tokenizer):
    task, problem = TASKS["store"](), problem_of("store")
    key = next(iter(problem.truth["before"]))
    script = Script(
        tokenizer, calls(("get", {"key": key}), ("remove", {"key": "nothing"})), calls(("burn", {"key": key})),
        "so\n</think>\nit  is done ",
    )  # fmt: skip
    found = played(script, tokenizer, task, problem, tokens=8192, turn_tokens=2000)
    assert [turn.reply.fault for turn in found.turns] == [
        "",
        "there is no function burn; there are get, put, remove",
        "",
    ]
    for before, after in zip(found.turns, found.turns[1:], strict=False):
        assert script.jobs[found.turns.index(after)].tokens == list(found.tokens[: after.begin])
        assert found.tokens[before.end - 1] == tokenizer.eos
    text = tokenizer.decode(found.tokens, skip_special=False)
    assert text.count("<tool_response>") == 3 and problem.truth["before"][key] in text
    assert "error: there is no key 'nothing'" in text and "it  is done " in text
    drawn = tokenizer.decode(
        [token for token, own in zip(found.tokens, found.drawn, strict=True) if own], skip_special=False
    )
    assert "tool_response" not in drawn and drawn.count("<|im_end|>") == 3
    # What a template would write of the same turns, as far as they say what it would.
    first = [*problem.messages, {"role": "assistant", "content": "X", "reasoning_content": "go"}]
    told = [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}]
    whole = render(tokenizer, [*first, *told], tools=problem.tools, settings=KEEP)
    assert whole[whole.index("<|im_end|>\n<|im_start|>user\n<tool_response>") :].replace(
        "\na\n", f"\n{problem.truth['before'][key]}\n"
    ).replace("\nb\n", "\nerror: there is no key 'nothing'\n").removeprefix("<|im_end|>") == tokenizer.decode(
        found.tokens[found.turns[0].end : found.turns[1].begin], skip_special=False
    )


@pytest.mark.parametrize(
    "text, fault",
    [
        (
            "<tool_call>\n<function=get>\n<parameter=key>\na\n</parameter>\n</function>\n",
            "1 calls were opened, 0 closed",
        ),
        ("<tool_call>\nget a\n</tool_call>", "1 calls were opened, 1 closed and 0 could be read"),
        (calls(("fly", {})).partition("</think>\n")[2], "no function fly"), ("just words", ""),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_read_are_faults(text, fault):
    answer = Completion(prompt=(), text=f"x\n</think>\n{text}", tokens=(), logprobs=(), finish_reason="stop")
    reply = reply_of(answer, inside=True, tools=problem_of("store").tools)
    assert fault in reply.fault and bool(fault) == bool(reply.fault) and not reply.calls


def test_an_answer_that_is_cut_ends_the_episode(tokenizer):
    task, problem = TASKS["store"](), problem_of("store")
    found = played(Script(tokenizer, calls(("get", {"key": "a"})), cut=[0]), tokenizer, task, problem, tokens=8192)
    assert len(found.turns) == 1 and not found.ended and found.verdict.reward == 0


def test_forced_ends_of_thinking_are_not_the_models_own(tokenizer):
    task, problem = TASKS["arithmetic"](), problem_of("arithmetic")
    closing = tokenizer.encode("</think>", control=True)
    found = played(Script(tokenizer, f"12345</think>{problem.truth}"), tokenizer, task, problem, thinking_budget=5)
    (turn,) = found.turns
    assert turn.forced == frozenset(range(turn.begin + 5, turn.begin + 5 + len(closing)))
    assert sum(found.drawn) == found.length - len(closing)
    free = played(Script(tokenizer, f"123</think>{problem.truth}"), tokenizer, task, problem, thinking_budget=5)
    assert not free.turns[0].forced and sum(free.drawn) == free.length


def test_who_thinks_on_behind_the_end_of_thinking_earns_nothing(tokenizer):
    task, problem = TASKS["arithmetic"](), problem_of("arithmetic")
    more = played(Script(tokenizer, f"123</think>1+1=2; {problem.truth}"), tokenizer, task, problem).verdict
    assert more.reward == 0 and "no number alone" in more.why
    for name, before in (("arithmetic", "123</think>1+1=2</think>"), ("choice", "123</think>1+1=2</think>")):
        task, problem = TASKS[name](), problem_of(name)
        said = problem.worked[-1]["content"]
        twice = played(Script(tokenizer, before + said), tokenizer, task, problem, thinking=True)
        assert twice.verdict.reward == 0 and (name == "arithmetic" or "behind its end" in twice.verdict.why)
        assert "</think>" not in twice.turns[0].reply.content, "what is kept of it is what was said"
        once = played(Script(tokenizer, f"123</think>\n</think>{said}"), tokenizer, task, problem, thinking=True)
        assert once.verdict.reward == 1, "an end that comes twice with nothing between is no thinking"
    store = problem_of("store")
    call = "1</think>2</think><tool_call>\n<function=get>\n<parameter=key>\na\n</parameter>\n</function>\n</tool_call>"
    turns = played(Script(tokenizer, call, "1</think>done"), tokenizer, TASKS["store"](), store, tokens=4096).turns
    assert turns[0].reply.stray and not turns[1].reply.stray, "any turn counts"


def test_some_groups_have_a_budget_that_all_their_answers_share(tokenizer):
    task, problem = TASKS["arithmetic"](), problem_of("arithmetic")
    given, seen = {"budgeted": 0.25, "budgets": (4, 9)}, Counter()
    for seed in range(120):
        script = Script(tokenizer, *["1</think>2"] * 3)
        player = Player(script, tokenizer, Playing(chat=KEEP, thinking_budget=50, **given))
        asyncio.run(play_group(player, task, problem, 3, seed))
        (budget,) = {job.sampling.thinking_budget for job in script.jobs}
        seen[budget] += 1
        chosen = Player(Script(tokenizer, "12345678901</think>2"), tokenizer, player.playing).within(seed)
        turn = asyncio.run(chosen.play(task, problem, seed)).turns[0]
        assert bool(turn.forced) == (budget < 50), "what the drawn budget wrote is not the model's own"
    assert seen.keys() == {4, 9, 50} and 0.15 < (seen[4] + seen[9]) / 120 < 0.38


def test_some_groups_are_asked_for_less_effort_as_the_template_does_and_earn_more_for_short_answers(tokenizer):
    task, problem = TASKS["arithmetic"](), problem_of("arithmetic")
    plain, less = (
        chat_tokens(tokenizer, problem.messages, settings=replace(KEEP, effort=one)) for one in (None, "low")
    )
    assert tokenizer.decode(less).count("{reasoning effort: low}") == 1
    scoring, seen = Scoring(effort=Effort(weight=1.0, upper=100)), Counter()
    for seed in range(120):
        script = Script(tokenizer, *[f"1</think>{problem.truth}"] * 2)
        player = Player(script, tokenizer, Playing(chat=KEEP, less_effort=0.25))
        asyncio.run(player.play(task, problem, seed))
        group = asyncio.run(play_group(player, task, problem, 1, seed))
        first, job = script.jobs
        assert first.tokens == plain, "who plays alone is asked for no less, as in what is measured"
        assert job.tokens == (less if group.less else plain)
        assert (scoring.rewards(group)[0] > 1) == group.less
        seen[group.less] += 1
    assert 0.15 < seen[True] / 120 < 0.38
    assert not Player(script, tokenizer, Playing(chat=KEEP)).within(0).playing.chat.effort


class Odd(Task):
    """Hangs, breaks or fails where it is told to."""

    name, turns = "odd", 2

    def __init__(self, where: str, bad=None):
        self.where, self.bad = where, bad

    def draw(self, rng, level):
        raise AssertionError

    def episode(self, problem):
        return OddEpisode(problem, self)


class OddEpisode(Episode):
    def __init__(self, problem, task):
        super().__init__(problem)
        self.task = task

    def act(self, where):
        if self.task.where == where:
            if self.task.bad is None:
                time.sleep(3)
            else:
                raise self.task.bad

    def answer(self, reply):
        self.act("answer")
        return ()

    def judged(self, last):
        self.act("judge")
        return Verdict(reward=1.0)


@pytest.mark.parametrize("where", ["answer", "judge"])
@pytest.mark.parametrize(
    "bad, kind",
    [(None, "time"), (GraderBroken("no truth"), "grader"), (ZeroDivisionError("1/0"), "task"), (SystemExit(3), "task")],
)
def test_what_breaks_costs_its_own_rollout_and_says_why(tokenizer, where, bad, kind):
    problem = Problem(task="odd", level=1, messages=({"role": "user", "content": "?"},))
    begin = time.monotonic()
    with pytest.raises(Dropped) as lost:
        asyncio.run(one_with_a_short_time(tokenizer, Odd(where, bad), problem))
    assert lost.value.kind == kind and ("odd" in str(lost.value) or "no truth" in str(lost.value))
    assert time.monotonic() - begin < 2, "nobody waits for what hangs"


@pytest.mark.parametrize("verdict", [None, Verdict(reward=float("nan")), Verdict(reward="good")])
def test_what_is_no_verdict_costs_its_own_rollout(tokenizer, monkeypatch, verdict):
    problem = Problem(task="odd", level=1, messages=({"role": "user", "content": "?"},))
    monkeypatch.setattr(OddEpisode, "judged", lambda self, last: verdict)
    with pytest.raises(Dropped, match="odd gave the") as lost:
        asyncio.run(one_with_a_short_time(tokenizer, Odd("nowhere", None), problem))
    assert lost.value.kind == "grader"


async def one_with_a_short_time(tokenizer, task, problem):
    return await Player(Script(tokenizer, "x\n</think>\ny"), tokenizer, Playing(chat=KEEP, seconds=0.3)).play(
        task, problem, 0
    )


def test_prompts_without_room_and_engines_that_refuse_are_dropped(tokenizer):
    task, problem = TASKS["sort"](), problem_of("sort")
    with pytest.raises(Dropped, match="tokens=8 are too few for a prompt of"):
        played(Script(tokenizer, "x"), tokenizer, task, problem, tokens=8)


def test_many_at_once_with_an_engine_are_each_as_it_would_be_alone(tokenizer):
    layers = lay("M*", Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=2, groups=1, head_width=16))
    model = Language(Config(vocab=tokenizer.vocab, width=16, layers=layers)).initialise(1)
    model.lm_head.weight.data *= 30
    tasks = [TASKS[name]() for name in ("sort", "store", "arithmetic")]
    problems = [(task, next(task.problems("train", seed=seed))) for seed in range(4) for task in tasks]

    async def all_of(rows, several):
        service = Service(Engine(model, tokenizer, max_tokens=4096, rows=rows, saved_gb=0.05))
        try:
            player = Player(service, tokenizer, Playing(chat=KEEP, tokens=4096, turn_tokens=24))
            ways = [player.play(task, problem, seed) for seed, (task, problem) in enumerate(problems)]
            return await asyncio.gather(*ways) if several else [await way for way in ways]
        finally:
            await service.close()

    together, alone = (asyncio.run(all_of(*how)) for how in ((6, True), (1, False)))
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]
    assert all(torch.tensor(one.logprobs).isfinite().all() and one.length for one in together)
