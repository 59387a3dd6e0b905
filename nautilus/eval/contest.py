"""Arms side by side: every prompt is answered by each of them in turn, greedily, in another order each time.

The plain answers are taken down first: they say what is right, and from them those know the future who are to know it.
For each repeat what the arms have seen begins anew, or they would copy from their own answers to the same prompts.
Timed is decoding, from the second token on: the first one comes of reading the prompt, and takes a plain step with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nautilus.data.tokenizer import Tokenizer
from nautilus.eval import arms
from nautilus.eval.arms import Arm, Rule
from nautilus.eval.families import Prompt
from nautilus.eval.speculation import ORACLE, PLAIN, Answered, Cycle
from nautilus.eval.structure import coded, copied
from nautilus.model.eagle import Eagle
from nautilus.model.language import Language
from nautilus.posttrain.depths import depths
from nautilus.posttrain.drafter import drafter_of
from nautilus.posttrain.own_text import Answer, Manner, answers
from nautilus.posttrain.policies import Prices, by_truth, followed, plans
from nautilus.posttrain.traces import Trace, write_traces
from nautilus.runtime import Progress, Run, UserError, read_metrics
from nautilus.serve import Engine, Sampling
from nautilus.serve.draft.choice import Choice
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.policy import Judge
from nautilus.serve.draft.predictor import Predictor
from nautilus.serve.draft.proposal import DEEPEST
from nautilus.serve.draft.settings import Drafts

MTP_DEPTHS = 1, 2, 3, 4
ALL_KNOWING = "all-knowing"  # plans with all that will come true; the oracle knows that of copied drafts alone


@dataclass(frozen=True, kw_only=True)
class Means:
    """What there is to speculate with. most: tokens that are tried at once; depth: of a block, where a rule does not
    look at what they cost; predictor, paper: of how much of a copied draft comes true, ours and that of the paper."""

    most: int = 16
    depth: int = 3
    eagle: Eagle | None = None
    predictor: Predictor | None = None
    paper: Predictor | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An engine, and how it speculates, from new; None: not at all."""

    engine: Engine
    arm: Callable[[], Arm] | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The plain answer to a question, and the ways through it of those who know, by their arm."""

    answer: Answer
    plans: Mapping[str, Sequence[Choice]]
    copied: float
    coded: float


class Contest:
    """One model's. longest: tokens of a prompt with its answer. engines: by the block that drafts, "" without one."""

    def __init__(self, target: str, model: Language, tokenizer: Tokenizer, means: Means, longest: int):
        self.target, self.model, self.tokenizer, self.means = target, model, tokenizer, means
        drafts = {"": Drafts(most=means.most, mtp=False)}
        if model.config.mtp:
            drafts["mtp"] = Drafts(most=means.most)
        if means.eagle is not None:
            drafts["eagle"] = Drafts(most=means.most, eagle=means.eagle)
        engine = partial(Engine, model, tokenizer, max_tokens=longest, rows=1)
        self.plain, self.engines = engine(), {name: engine(drafts=one) for name, one in drafts.items()}
        self.longest, self.spelling = longest, Spelling(tokenizer)

    @property
    def main(self) -> str:
        """The block that rules fall back on where it is not said which: the model's own one, before a head."""
        return [*self.engines, ""][1]

    def contestants(self) -> dict[str, Contestant]:
        """By the name of their arm."""
        means, found = self.means, {PLAIN: Contestant(engine=self.plain)}

        def add(name: str, source: str, rule: Rule | None = None, predictor: Predictor | None = None) -> None:
            engine = self.engines[source]
            judge = Judge(predictor=predictor, spelling=self.spelling) if predictor else None
            assert engine.speculation
            base = engine.speculation
            found[name] = Contestant(engine=engine, arm=lambda: Arm(base, rule, judge=judge))

        add("prompt look-up", "", arms.look_up)
        add("all copied drafts", "", arms.copies)
        blocks = [source for source in self.engines if source]
        for source in blocks:
            for depth in MTP_DEPTHS if source == "mtp" else (means.depth,):
                add(f"{source} {depth}", source, arms.block(depth))
        add("by score", self.main, arms.by_score(means.depth))
        for source in blocks or [""]:
            if means.paper:
                add(named("paper", source), source, arms.by_paper(means.paper, means.depth), means.paper)
            if means.predictor:
                add(named("ours", source), source, predictor=means.predictor)
        add("ours, untrained", self.main)
        add(ALL_KNOWING, self.main, arms.planned)
        add(ORACLE, self.main, arms.planned)
        return found

    # ----- what is right ----------------------------------------------------------------------------------------------

    def references(self, run: Run, questions: Sequence[Question], tokens: int) -> list[tuple[Question, Reference]]:
        """Of those whose answers are long enough to be timed; UserError where none is."""
        prompts = [question.tokens for question in questions]
        found = answers(run.state / "plain.jsonl", self.plain, prompts, Manner(temperature=0, tokens=tokens))
        pairs = [pair for pair in zip(questions, found, strict=True) if len(pair[1].tokens) >= self.means.most + 3]
        if not pairs:
            raise UserError(
                f"none of {len(questions)} plain answers is longer than a draft of {self.means.most} tokens, so there "
                "is nothing to time; ask for longer ones, or give other prompts"
            )
        traces = [*self.traces(pairs, tokens)]
        write_traces(run.folder / "traces.jsonl", traces)
        prices, most = self.prices(), self.means.most
        known = {
            ORACLE: followed(traces, by_truth(prices, DEEPEST), self.spelling, most=most),
            ALL_KNOWING: plans(traces, prices, self.spelling, most=most, depth=DEEPEST),
        }
        found = []
        for number, (question, answer) in enumerate(pairs):
            ways = {name: each[number] for name, each in known.items()}
            found.append((question, Reference(answer=answer, plans=ways, **self.structure(question, answer))))
        return found

    def traces(self, pairs: Sequence[tuple[Question, Answer]], tokens: int) -> Iterator[Trace]:
        drafter = drafter_of(self.model, None if self.main == "mtp" else self.means.eagle)
        for question, answer in pairs:
            limit, right = len(question.tokens) + tokens, depths(drafter, answer, DEEPEST) if drafter else ()
            named = {"tenant": question.prompt.set, "group": question.prompt.family}
            yield Trace(prompt=answer.prompt, answer=answer.tokens, limit=limit, depths=right, **named)

    def prices(self) -> Prices:
        base = self.engines[self.main].speculation
        assert base
        return Prices.of(base.costs, model=(base.drafting.of(DEEPEST) or 0.0) / DEEPEST)

    def structure(self, question: Question, answer: Answer) -> dict[str, float]:
        words = self.tokenizer.decode(answer.tokens)
        return {"copied": copied(question.prompt.text, words), "coded": coded(question.prompt.text)}

    # ----- the contest ------------------------------------------------------------------------------------------------

    def hold(self, run: Run, questions: Sequence[Question], *, tokens: int, repeats: int) -> list[Answered]:
        """All answers, those that the run has already included."""
        known = self.references(run, questions, tokens)
        path, contestants = run.state / "answers.jsonl", self.contestants()
        rows = read_metrics(path)
        steps = [*turns(len(known), [*contestants], repeats)]
        made: dict[str, Arm | None] = {}
        with Progress(path, len(steps), len(rows), shown=("tokens_per_s",), unit="answer") as progress:
            for step, (begins, number, name) in enumerate(steps):
                one = contestants[name]
                if begins:
                    made[name] = one.arm() if one.arm else None
                if step < len(rows):
                    remember(made[name], *known[number])
                    continue
                found = self.answered(name, one.engine, made[name], *known[number], tokens)
                rows.append({"step": step, "tokens_per_s": found.rate, **found.row()})
                progress(rows[-1])
        return [Answered.of_row(row) for row in rows]

    def answered(
        self, name: str, engine: Engine, arm: Arm | None, question: Question, known: Reference, most: int
    ) -> Answered:
        prompt, sampling = question.prompt, Sampling(temperature=0, max_tokens=most)
        request = engine.request(question.tokens, sampling, tenant=prompt.set)
        if arm:
            arm.answer, arm.plan = [*known.answer.tokens], [*known.plans.get(name, ())]
        engine.speculation = None
        engine.submit(request)
        while not request.pieces:
            engine.step()
        engine.speculation, before = arm, len(request.tokens)
        if arm:
            arm.begin()
        begin = time.perf_counter()
        while not request.finished:
            engine.step()
        seconds = time.perf_counter() - begin
        request.raise_error()
        tokens = len(request.tokens) - before
        told = {} if arm is None else {"drafts": arm.drafts(), "spent": arm.spent(seconds)}
        return Answered(
            target=self.target, family=prompt.family, set=prompt.set, prompt=prompt.id, arm=name,
            tokens=tokens, seconds=seconds, cycles=arm.cycles if arm else [Cycle(PLAIN, 1, 0)] * tokens,
            same=request.tokens[request.prompt :] == [*known.answer.tokens], copied=known.copied, coded=known.coded,
            **told,
        )  # fmt: skip


def named(name: str, source: str) -> str:
    return f"{name}, {source}" if source else name


def remember(arm: Arm | None, question: Question, known: Reference) -> None:
    """As if it had answered just now."""
    if arm:
        arm.copies.finish(None, question.prompt.set, known.answer.tokens)


def turns(questions: int, names: Sequence[str], repeats: int) -> Iterator[tuple[bool, int, str]]:
    """Whether an arm begins anew, the number of a question, the arm."""
    for repeat in range(repeats):
        for number in range(questions):
            turn = (number + repeat) % len(names)
            yield from ((number == 0, number, name) for name in (*names[turn:], *names[:turn]))
