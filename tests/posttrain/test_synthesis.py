"""Texts to rows, by models that say what they are told to: what is kept, what leaves and why, what is asked again."""

import json
import re

import pytest

from nautilus.data.conversations import conversations_in
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.eval import synthesis as report
from nautilus.posttrain import profile
from nautilus.posttrain.synthesis import Made, Synthesis, listed, synthesise
from nautilus.posttrain.synthetic import KINDS, Bounds
from nautilus.runtime import Run, UserError
from nautilus.serve.job import Lost
from nautilus.serve.request import Piece
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS

PLAIN = train_tokenizer([], vocab=SMALLEST)
TOKENIZER = Tokenizer(PLAIN.core, bos="<s>", eos="<|im_end|>", template=template_text("spaced"))
TOWNS = {"Ada": "Bern", "Ben": "Oslo", "Cleo": "Riga"}
TEXTS = {name: f"A note. In 1{number}00 {name} lived in {TOWNS[name]}." for number, name in enumerate(TOWNS)}


def as_row(text):
    return json.dumps({"text": text}) + "\n"


ROWS = "".join(map(as_row, TEXTS.values()))


class Told:
    """Answers what `say` makes of a prompt; None: the engine is lost, "…" at the end: cut off."""

    def __init__(self, say):
        self.say, self.prompts = say, []

    def submit(self, job):
        prompt = TOKENIZER.decode(job.tokens, skip_special=False)
        self.prompts.append(prompt)
        said = self.say(prompt)

        async def pieces():
            if said is None:
                raise Lost("gone")
            stream = TOKENIZER.stream(skip_special=True)
            found = [Piece(text=stream.push(token), token=token, logprob=-0.5) for token in TOKENIZER.encode(said)]
            ended = "length" if said.endswith("…") else "stop"
            yield [*found, Piece(text=stream.close(), token=TOKENIZER.eos, logprob=0.0, finish_reason=ended)]

        return pieces()

    async def close(self):
        pass


def writes(prompt: str) -> str:
    """What it is asked for, and the right answer to what it is asked then."""
    year, who, town = re.search(r"In (\d+) (\w+) lived in (\w+)\.", prompt).groups()
    if "Say the text" in prompt:
        return f"It says: in {year} the home of {who} was {town}."
    if "Answer: the letter" in prompt:
        return f"Question: Which town was the home of {who}?\nA) {town}\nB) Graz\nC) Lyon\nD) Wien\nAnswer: A"
    if "Write a question" in prompt:
        return f"Question: Where was the home of {who}?\nAnswer: {town}"
    letter = re.search(rf"^([A-D])\) {town}$", prompt, re.MULTILINE)
    return f"\\boxed{{{letter[1] if letter else town}}}"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A way to make rows, with what the writer and the verifier say; `made.writer` has what it was asked last."""
    monkeypatch.setattr(profile, "engine_of", lambda model, *given: model)
    monkeypatch.setattr(profile, "Turns", lambda engine, **more: engine)
    monkeypatch.setattr("nautilus.posttrain.written.fingerprint", lambda model: "told")
    few = {name: TASKS[name] for name in ("sort", "choice")}
    monkeypatch.setattr("nautilus.posttrain.contamination.TASKS", few)

    def make(say=writes, check=writes, texts=ROWS, **settings) -> Made:
        (tmp_path / "texts.jsonl").write_text(texts)
        make.writer, make.verifier, make.run = Told(say), Told(check), Run(tmp_path / "run")
        how = {"kinds": ("question", "choice"), "held_out": 1, "tokens": 2000, "turn_tokens": 400, **settings}
        asked_for = Synthesis(texts=(str(tmp_path / "texts.jsonl"),), **how)
        return synthesise(make.run, asked_for, (make.writer, TOKENIZER), (make.verifier, TOKENIZER))

    return make


def rows(run, name):
    return [json.loads(line) for line in (run.folder / f"{name}.jsonl").read_text().splitlines()]


def counts(tally):
    return {step: {why: number for why, (number, _) in by.items()} for step, by in tally.dropped.items()}


def test_texts_become_conversations_and_rows(made):
    found = made(kinds=tuple(KINDS))
    assert [len(found.kept(kind)) for kind in KINDS] == [3, 3, 3] and listed(*found.left.values()) == ""
    assert len(made.writer.prompts) == 9 and len(made.verifier.prompts) == 3 * 3 + 3 * 3
    assert all(text in "".join(made.verifier.prompts) for text in TEXTS.values())
    assert len({prompt for prompt in made.verifier.prompts if "B)" in prompt}) == 9, "in another order each time"
    assert len([*conversations_in(made.run.folder / "conversations.jsonl")]) == 9
    assert {row["kind"] for row in rows(made.run, "conversations")} == {*KINDS}
    for kind in ("exact", "mcqa"):
        task = asked(f"{kind}@{made.run.folder / kind}.jsonl").task
        assert len(task.rows) == 3 and all(one.worked and one.truth["expected_answer"] for one in task.rows)
    assert {row["expected_answer"] for row in rows(made.run, "exact")} == {*TOWNS.values()}


def test_a_rerun_asks_for_nothing_that_is_there(made):
    first = made()
    lines = (made.run.state / "answers.jsonl").read_text().splitlines()
    assert made().items == first.items and not made.writer.prompts and not made.verifier.prompts
    (made.run.state / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines[:4]))
    assert made().items == first.items and len(made.writer.prompts) == 2 and not made.verifier.prompts


def test_without_their_text_questions_are_verified_with_it(made):
    found = made(given=False)
    assert len(found.items) == 6 and all("lived in" in prompt for prompt in made.verifier.prompts)
    assert not any("lived in" in row["messages"][0]["content"] for row in rows(made.run, "conversations"))


@pytest.mark.parametrize("right, agree, kept", [(2, 2, 3), (2, 3, 0), (1, 2, 0), (1, 1, 3), (3, 3, 3)])
def test_questions_stay_if_enough_answers_agree(made, right, agree, kept):
    times = dict[str, int]()

    def some(prompt):
        times[prompt] = times.get(prompt, 0) + 1
        return writes(prompt) if times[prompt] <= right else "\\boxed{Rom}"

    found = made(check=some, kinds=("question",), agree=agree)
    assert len(found.items) == kept
    assert counts(found.left["question"]) == ({} if kept else {"unverified": {f"{right} of 3 agree": 3}})


def test_a_verifier_that_goes_by_the_place_of_an_option_verifies_nothing(made):
    found = made(check=lambda prompt: "\\boxed{A}", kinds=("choice",), times=24, agree=7)
    assert found.items == [] and counts(found.left["choice"]) == {"unverified": {"6 of 24 agree": 3}}


def test_with_times_0_nobody_is_asked(made):
    assert len(made(times=0).items) == 6 and not made.verifier.prompts


# ----- what leaves ----------------------------------------------------------------------------------------------------


def test_what_leaves_is_counted_by_step_and_reason(made):
    def poor(prompt):
        if "Ada" in prompt:
            return None if "the letter" in prompt else "I think so."
        if "Ben" in prompt:
            return f"{writes(prompt)}…" if "the letter" in prompt else "Question: Oslo or Bern?\nAnswer: Oslo"
        return writes(prompt)

    found = made(say=poor, check=lambda prompt: None if "B)" in prompt else writes(prompt))
    assert [one.answer for one in found.items] == ["Riga"]
    question, choice = found.left.values()
    assert counts(question) == {"unreadable": {"no Question": 1}, "unsound": {"answer in the question": 1}}
    lost = {"by the engine": 1, "by the verifier's engine": 1}
    assert counts(choice) == {"lost": lost, "unreadable": {"cut off": 1}}
    assert listed(question, choice).startswith("; 2 unreadable (1 no Question, 1 cut off); 2 lost (1 by the engine")
    for kind, tally in found.left.items():
        assert tally.documents == 3 == len(found.kept(kind)) + sum(tally.total(step)[0] for step in tally.dropped)


def test_what_is_asked_twice_stays_once(made):
    same = "Question: Is it so?\nAnswer: yes"
    found = made(say=lambda _: same, check=lambda _: "\\boxed{Yes}", each=2, kinds=("question",))
    assert len(found.items) == 1 and counts(found.left["question"]) == {"again": {"asked before": 5}}


def exam_of(folder, question):
    row = {"responses_create_params": {"input": question}, "expected_answer": "Oslo"}
    (folder / "exam.jsonl").write_text(json.dumps(row) + "\n")
    return f"exact@{folder / 'exam.jsonl'}"


def test_problems_that_tasks_hold_back_are_dropped_and_their_task_is_named(made, tmp_path):
    name = exam_of(tmp_path, "Where was the home of  BEN")
    found = made(kinds=("question",), against=(name,))
    assert counts(found.left["question"]) == {"contaminated": {name: 1}}
    assert {one.answer for one in found.items} == {"Bern", "Riga"}
    assert not any("Ben" in prompt for prompt in made.verifier.prompts), "nobody answers what is dropped anyway"


def test_runs_of_words_are_looked_for_in_all_that_a_row_shows(made, tmp_path):
    name = exam_of(tmp_path, f"Read this. {TEXTS['Cleo']} Who lived there?")
    settings = {"kinds": ("question",), "against": (name,)}
    assert {one.answer for one in made(**settings, words=7).items} == {"Bern", "Oslo"}
    assert {one.answer for one in made(**settings, words=7, given=False).items} == {"Bern", "Oslo", "Riga"}
    assert len(made(**settings, words=13).items) == 3


def test_a_procedural_task_is_hit_too(made):
    held = next(TASKS["choice"]().problems("test", level=1)).messages[-1]["content"]
    found = made(say=lambda prompt: f"Question: {held}\nAnswer: many", kinds=("question",))
    assert found.items == [] and counts(found.left["question"])["contaminated"].keys() == {"choice"}


@pytest.mark.parametrize(
    "line, why",
    [
        *((line, "no text in the row") for line in ("no json", '{"text": 5}', '{"body": "x"}', "[1]")),
        ('{"text": "\\ud800"}', "not UTF-8"), (as_row("long " * 500), "too long"),
        (as_row(TEXTS["Ada"]), "the same text again"),
        (as_row("".join(map(chr, range(0xE000, 0xF900)))), "no template can write it"),
    ],
)  # fmt: skip
def test_a_poisoned_text_costs_only_itself(made, line, why):
    found = made(texts=f"{ROWS}{line}\n\n")
    assert len(found.items) == 6 and found.texts.documents == 4 and counts(found.texts) == {"left out": {why: 1}}


def test_without_a_text_an_error_says_what_is_wrong(made):
    with pytest.raises(UserError, match="none of 2 texts at .* has the fields \\['body'\\] but no field 'text'"):
        made(texts='{"body": "x"}\n{"body": "y"}\n')
    with pytest.raises(UserError, match="1 left out \\(1 too long\\); name .* longer conversation than tokens=2000"):
        made(texts=as_row("long " * 500))
    assert len(made(documents=2).items) == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kinds": ("poem",)}, "kinds=poem was asked for; name some of rephrase, question, choice"),
        ({"kinds": ()}, "kinds= was asked for"), ({"kinds": ("choice", "choice")}, "each once"),
        ({"agree": 4}, "agree=4 of times=3"), ({"agree": 0}, "agree=0 of times=3"), ({"times": 25}, "have 24 orders"),
        ({"each": 0}, "each=0 must be at least 1"), ({"words": 0}, "words=0"), ({"temperature": -1.0}, "not be neg"),
        ({"turn_tokens": 4096}, "turn_tokens=4096 of an answer leave no room for a text in tokens=4096"),
    ],
)  # fmt: skip
def test_settings_that_clash_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Synthesis(**settings)
    assert Synthesis(times=0, agree=9).times == 0


def test_the_report_has_every_number_and_examples(made, capsys):
    poor = lambda prompt: "<b>no</b>" if "Ada" in prompt else writes(prompt)
    found = made(say=poor, kinds=tuple(KINDS), rephrased=Bounds(facts=0, shortest=0))
    report.show(made.run, found, title="rows", facts={"model": "m"})
    shown = capsys.readouterr().out
    assert "no Question" in shown and str(made.run.report) in shown
    page, plain = made.run.report.read_text(), json.loads((made.run.folder / "results.json").read_text())
    assert "&lt;b&gt;no&lt;/b&gt;" in page and "<b>" not in page and "Where was the home of Ben?" in page
    assert plain["steps"]["question"] == {"kept": 2, "unreadable": 1} and plain["steps"]["rephrase"]["kept"] == 3
    assert {"kind": "question", "step": "unreadable", "why": "no Question", "rows": "1"} in plain["rows"]
    assert made.run.picture.read_bytes().startswith(b"\x89PNG")
