"""Rows to learn from out of plain texts: a model writes them, a model verifies them, and no task's problem is in them.

    texts → asked of each: the kinds of `synthetic.py` → read → sound → new → held back by no task → verified → rows

Whatever leaves on the way is counted by step and reason in a tally of its kind. Answers are kept as they come; the same
command again goes on with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nautilus.config import setting, to_dict
from nautilus.data.chat import chat_tokens
from nautilus.data.corpus import Document, read, sources
from nautilus.data.tally import Tally
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.contamination import HeldBack, held_back, kept_out, words_of
from nautilus.posttrain.rollout import Playing
from nautilus.posttrain.synthetic import (
    JUDGED,
    KINDS,
    ORDERS,
    Bounds,
    Item,
    Writing,
    asking_of,
    checks,
    conversation_of,
    fault,
    row_problem,
)
from nautilus.posttrain.written import recorded
from nautilus.runtime import Run, UserError, continue_or_create, write_atomic
from nautilus.runtime.progress import screen
from nautilus.serve.prefixes import fingerprint
from nautilus.tasks.rows import Rows, row_of

LEAST = {"each": 1, "documents": 0, "times": 0, "held_out": 1, "words": 1, "tokens": 2, "turn_tokens": 1, "together": 1}
LEAST |= {"seed": 0}
Teller = tuple[Language, Tokenizer]


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    model: str = setting("", "run, checkpoint folder or hub id: who writes")
    texts: tuple[str, ...] = setting(
        (), "where texts come from: a file or folder, JSONL as place[#field], hub:owner/name"
    )
    template: str = setting("", "how the writer's chats are written: a file, or nemotron (as the model says)")
    out: Path = setting(Path("runs/synthesis"), "the run's folder; gone on with if it is there")
    kinds: tuple[str, ...] = setting(tuple(KINDS), f"what is made of each text: {', '.join(KINDS)}")
    each: int = setting(1, "answers of each kind to each text")
    documents: int = setting(0, "most texts, the first ones; 0: all")
    given: bool = setting(True, "a question comes with its text; else it teaches what the text says")
    verifier: str = setting("", "the model that answers the questions, with their text; none: the one that writes")
    times: int = setting(3, "answers of it to each question, options in other orders each time; 0: none is verified")
    agree: int = setting(2, "of these that must be what was written")
    rephrased: Bounds = Bounds()
    against: tuple[str, ...] = setting((), "tasks to be kept out beside all procedural ones, such as mcqa@exam.jsonl")
    held_out: int = setting(256, "problems of each level of a task that are kept out; of files all")
    words: int = setting(13, "words in a row that no row may share with such a problem")
    tokens: int = setting(4096, "most tokens of a text with what is asked and answered; longer texts are left out")
    turn_tokens: int = setting(1024, "most tokens of an answer")
    thinking: bool = setting(False, "the models are asked to think first")
    temperature: float = setting(1.0, "of all answers")
    together: int = setting(64, "most answers that are written together")
    seed: int = setting(0, "of the answers and of the orders of options")

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        strange = [kind for kind in self.kinds if kind not in KINDS]
        if strange or len({*self.kinds}) < len(self.kinds) or not self.kinds:
            raise UserError(f"kinds={','.join(self.kinds)} was asked for; name some of {', '.join(KINDS)}, each once")
        if self.times and not 1 <= self.agree <= self.times:
            raise UserError(
                f"agree={self.agree} of times={self.times} answers were asked for; give 1 to {self.times}, or times=0"
            )
        if self.times > len(ORDERS):
            raise UserError(
                f"times={self.times} was asked for; four options have {len(ORDERS)} orders: give at most that"
            )
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if self.turn_tokens >= self.tokens:
            raise UserError(
                f"turn_tokens={self.turn_tokens} of an answer leave no room for a text in tokens={self.tokens}; lower"
                " the one or raise the other"
            )

    @property
    def playing(self) -> Playing:
        return Playing(
            tokens=self.tokens, turn_tokens=self.turn_tokens, temperature=self.temperature, thinking=self.thinking
        )


@dataclass(frozen=True, kw_only=True)
class Made:
    """items: what is kept; left: of each kind, the answers asked for and what left on the way; texts: the same of the
    texts, before anything was asked."""

    items: Sequence[Item]
    left: Mapping[str, Tally]
    texts: Tally = field(default_factory=Tally)

    def kept(self, kind: str) -> list[Item]:
        return [one for one in self.items if one.kind == kind]


def open_synthesis(settings: Synthesis, *tellers: Teller) -> Run:
    for model, tokenizer in tellers:
        if tokenizer.template is None:
            raise UserError(
                "a model without a chat template cannot be asked for anything; take one that was trained on chats, or"
                " give the writer one with template="
            )
        if settings.tokens > model.config.positions:
            raise UserError(
                f"tokens={settings.tokens} were asked for, a model has positions={model.config.positions}; lower tokens"
            )
    return continue_or_create(settings.out, {**to_dict(settings), "weights": fingerprint(tellers[0][0])})


def synthesise(run: Run, settings: Synthesis, writer: Teller, verifier: Teller) -> Made:
    """All of it, ending with conversations.jsonl and a file of rows for each task that judges some."""
    tasks = kept_out(settings.against)  # a mistake in a name is told before anything is written
    documents, texts = usable(settings, writer[1])
    left = {kind: Tally() for kind in settings.kinds}
    items = new(sound(read_items(run, settings, writer, documents, left), settings, left), left)
    if items:
        screen().print("comparing with what tasks hold back", highlight=False)  # their problems take a while to draw
        held = HeldBack(held_back(tasks, settings.held_out), settings.words)
        items = untold(items, held, left, given=settings.given)
    if settings.times:
        items = verified(run, settings, verifier, items, left)
    write_rows(run, settings, items)
    return Made(items=items, left=left, texts=texts)


def usable(settings: Synthesis, tokenizer: Tokenizer) -> tuple[list[Document], Tally]:
    """Texts that can be asked about, and those that cannot; UserError where there are none."""
    tally, found, skipped, broken = Tally(), dict[str, Document](), list[str](), list[str]()
    for source in sources(settings.texts, undecodable="skip"):
        for document in read(source, skipped, broken):
            if settings.documents and len(found) == settings.documents:
                break
            tally.see(document.text)
            why = "the same text again" if document.text in found else unaskable(settings, tokenizer, document.text)
            if why:
                tally.drop("left out", why, document.name, document.text)
            else:
                found[document.text] = document
    for why, places in (("not UTF-8", skipped), ("no text in the row", broken)):
        for place in places:
            tally.see("")
            tally.drop("left out", why, place, "")
    if not found:
        first = "".join(f"; {place}" for place in (*broken, *skipped)[:1])
        raise UserError(
            f"none of {tally.documents} texts at {', '.join(settings.texts)} can be used{listed(tally)}{first}; name"
            f" other places, or a longer conversation than tokens={settings.tokens}"
        )
    return [*found.values()], tally


def unaskable(settings: Synthesis, tokenizer: Tokenizer, text: str) -> str:
    try:
        prompts = [chat_tokens(tokenizer, asking_of(kind, text, "").messages) for kind in settings.kinds]
    except UserError:
        return "no template can write it"
    return "too long" if max(map(len, prompts)) + settings.turn_tokens > settings.tokens else ""


# ----- step by step: each gives the items that go on -----------------------------------------------------------------


def read_items(
    run: Run, settings: Synthesis, writer: Teller, documents: Sequence[Document], left: Mapping[str, Tally]
) -> list[Item]:
    tasks = [Writing(kind, documents) for kind in settings.kinds]
    asked = [(task, one, time) for task in tasks for one in task.asked for time in range(settings.each)]
    rows = recorded(
        run.state / "answers.jsonl", *writer, asked, settings.playing, together=settings.together, seed=settings.seed
    )
    items = []
    for (task, problem, _), row in zip(asked, rows, strict=True):
        tally, source = left[task.name], problem.truth["source"]
        said = "" if row["reward"] is None else row["messages"][-1]["content"]
        tally.see(said)
        if row["reward"] is None:
            tally.drop("lost", "by the engine", source, "")
        elif row["reward"] < 1:
            tally.drop("unreadable", row["why"], source, said)
        else:
            items.append(KINDS[task.name].read(said, problem.truth))
    return items


def sound(items: Sequence[Item], settings: Synthesis, left: Mapping[str, Tally]) -> list[Item]:
    found = [(item, fault(item, settings.rephrased, given=settings.given)) for item in items]
    for item, why in found:
        if why:
            drop(left, item, "unsound", why)
    return [item for item, why in found if not why]


def new(items: Sequence[Item], left: Mapping[str, Tally]) -> list[Item]:
    """The first of those that say the same."""
    found = dict[tuple[str, ...], Item]()
    for item in items:
        first = found.setdefault((item.kind, *words_of(item.question or item.answer)), item)
        if first is not item:
            drop(left, item, "again", "asked before" if item.question else "said before")
    return [*found.values()]


def untold(items: Sequence[Item], held: HeldBack, left: Mapping[str, Tally], *, given: bool) -> list[Item]:
    kept = []
    for item in items:
        shown = [item.text] if given or not item.question else []  # as far as the row will have it
        if hit := held.hit(item.question, item.answer, *item.options, *shown):
            drop(left, item, "contaminated", hit[0], hit[1])
        else:
            kept.append(item)
    return kept


def verified(
    run: Run, settings: Synthesis, verifier: Teller, items: Sequence[Item], left: Mapping[str, Tally]
) -> list[Item]:
    """Those whose question is answered as it was written, often enough; rephrasings go on."""
    asked = [(item, checks(item, settings.times, settings.seed)) for item in items if item.question]
    tasks = {name: [row_of(one) for _, some in asked for one in some if one.task == name] for name in JUDGED.values()}
    judges = {name: Rows(name, rows) for name, rows in tasks.items() if rows}
    questions = [(judges[one.task], one, time) for _, some in asked for time, one in enumerate(some)]
    rows = iter(recorded(
        run.state / "checks.jsonl", *verifier, questions, settings.playing, together=settings.together,
        seed=settings.seed + 1,
    ))  # fmt: skip
    refused = set[int]()
    for item, some in asked:
        rewards = [next(rows)["reward"] for _ in some]
        if rewards.count(None) == len(rewards):
            drop(left, item, "lost", "by the verifier's engine")
        elif (right := rewards.count(1.0)) < settings.agree:
            drop(left, item, "unverified", f"{right} of {settings.times} agree")
        else:
            continue
        refused.add(id(item))
    return [item for item in items if id(item) not in refused]


def drop(left: Mapping[str, Tally], item: Item, step: str, why: str, shown: str = "") -> None:
    said = f"{item.question}\n{item.answer}".strip()
    left[item.kind].drop(step, why, item.source, said, shown=shown or said)


# ----- what is left --------------------------------------------------------------------------------------------------


def write_rows(run: Run, settings: Synthesis, items: Sequence[Item]) -> None:
    how = {"given": settings.given, "seed": settings.seed}
    files = {"conversations": [conversation_of(item, **how) for item in items]}
    for kind, task in JUDGED.items():
        files[task] = [row_of(row_problem(item, **how)) for item in items if item.kind == kind]
    for name, rows in files.items():
        if rows:
            write_atomic(run.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def listed(*tallies: Tally) -> str:
    """; 8 unreadable (5 no Question, 3 cut off); 1 contaminated (1 sort): the most frequent first."""
    counts = dict[str, dict[str, int]]()
    for tally in tallies:
        for step, reasons in tally.dropped.items():
            for why, (count, _) in reasons.items():
                known = counts.setdefault(step, {})
                known[why] = known.get(why, 0) + count
    told = ""
    for step, reasons in sorted(counts.items(), key=lambda each: -sum(each[1].values())):
        parts = ", ".join(f"{count} {why}" for why, count in sorted(reasons.items(), key=lambda each: -each[1]))
        told += f"; {sum(reasons.values())} {step} ({parts})"
    return told
