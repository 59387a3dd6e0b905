"""The real clients of lm-eval, on tasks from files of the test, find what the model itself says."""

import dataclasses
import importlib.util
import json
import math

import pytest
import torch

import nautilus
from nautilus.cli import main
from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.eval.loss import document_nats
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling, split_answer

torch.set_num_threads(1)
here = importlib.util.find_spec("lm_eval") is not None
with_library = pytest.mark.skipif(not here, reason="the extra `eval` is not installed")

COUNTING = [f"{n} comes before {n + 1}, and after {n - 1}." for n in range(1, 60)]
ROWS = [{"question": f"What comes before {n}?", "right": n % 3} for n in range(5, 11)]
for row in ROWS:
    n = int(row["question"].split()[-1][:-1])
    row["choices"] = [f"{n - 1} is what comes", f"{n + 7}", "nothing at all, for 5 is first"]
    row["text"] = f"{n} comes before {n + 1}."
CHOICE = """
task: our_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
task: our_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}} Answer:"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n", "7"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: our_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of random weights in a folder, and three tasks in another."""
    here = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer(COUNTING * 4, vocab=SMALLEST + 60)
    config = dataclasses.replace(shrink(preset("toy")), vocab=tokenizer.vocab, eos=(tokenizer.eos,), positions=512)
    model = Language(config).initialise(5)
    model.head_weight.data *= 12
    model.save(here / "model", precision="fp32", tokenizer=tokenizer)
    (here / "tasks").mkdir()
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("rolling", ROLLING)):
        (here / "tasks" / f"{name}.yaml").write_text(text.replace("FILE", str(here / "rows.jsonl")))
    return here


def evaluate(place, out, *words):
    return main(["eval", str(place / "model"), "suite=lm-eval", f"include={place / 'tasks'}", f"out={out}", *words])


def results(out):
    return {(cell["task"], cell["column"]): cell for cell in json.loads((out / "results.json").read_text())["cells"]}


def cost(model, tokens, after):
    """The log-prob of the tokens from place `after` on, by held-out loss."""
    return -float(document_nats(model, [tokens[1:]], start=tokens[0])[0][after - 1 :].sum())


def expected_choices(model, tokenizer):
    """(share right by log-prob, share right by log-prob over characters), as lm-eval defines them."""
    right = [0, 0]
    for row in ROWS:
        context = tokenizer.encode(f"{row['question']} Answer:")
        whole = [tokenizer.encode(f"{row['question']} Answer: {choice}") for choice in row["choices"]]
        assert all(one[: len(context)] == context for one in whole)
        costs = [cost(model, one, len(context)) for one in whole]
        normed = [cost / len(choice) for cost, choice in zip(costs, row["choices"], strict=True)]
        right[0] += costs.index(max(costs)) == row["right"]
        right[1] += normed.index(max(normed)) == row["right"]
    return [count / len(ROWS) for count in right]


@with_library
@pytest.mark.slow
def test_the_clients_find_what_the_model_says(place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "out", "tasks=our_choice,our_answer,our_text") == 0
    found, (model, tokenizer) = results(tmp_path / "out"), nautilus.load(place / "model")
    plain, normed = expected_choices(model, tokenizer)
    assert found["our_choice", "acc"]["score"] == pytest.approx(plain)
    assert found["our_choice", "acc_norm"]["score"] == pytest.approx(normed)
    assert found["our_choice", "acc"]["count"] == len(ROWS)
    begin = tokenizer.core.token_to_id("<s>")  # what lm-eval puts before a text
    nats = [-cost(model, [begin, *tokenizer.encode(row["text"])], 1) for row in ROWS]
    size = sum(len(row["text"].encode()) for row in ROWS)
    assert found["our_text", "bits_per_byte"]["score"] == pytest.approx(sum(nats) / size / math.log(2), abs=1e-6)
    samples = answers_of(Engine(model, tokenizer), [tokenizer.encode(f"{r['question']} Answer:") for r in ROWS])
    share = sum(answer == row["text"] for answer, row in zip(samples, ROWS, strict=True)) / len(ROWS)
    assert found["our_answer", "exact_match"]["score"] == share
    assert "our_choice" in capsys.readouterr().out and (tmp_path / "out" / "report.png").is_file()


def answers_of(engine, prompts):
    how = Sampling(temperature=0, max_tokens=12, stop=("\n", "7"))
    return [completion.text for completion in engine.generate(prompts, how)]


@with_library
@pytest.mark.slow
def test_each_log_prob_is_that_of_held_out_loss_and_answers_are_not_asked_for_twice(place, tmp_path, monkeypatch):
    from nautilus.eval import harness

    model, tokenizer = nautilus.load(place / "model")
    asked = harness.Asked(tasks=["our_choice", "our_answer"], include=place / "tasks")
    engine, kept = Engine(model, tokenizer), tmp_path / "answers"
    manager = harness.known_tasks(asked)
    found = harness.harness(engine, place / "model", asked, manager, kept)
    for sample in found["samples"]["our_choice"]:
        row = ROWS[sample["doc_id"]]
        for choice, ((told, greedy),) in zip(row["choices"], sample["resps"], strict=True):
            context, whole = (tokenizer.encode(f"{row['question']} Answer:{more}") for more in ("", f" {choice}"))
            assert told == pytest.approx(cost(model, whole, len(context)), abs=1e-4)
            logits_TV = model(torch.tensor([whole]))[0][0]
            assert greedy == (logits_TV[len(context) - 1 : -1].argmax(-1).tolist() == whole[len(context) :])
    for sample, answer in zip(
        sorted(found["samples"]["our_answer"], key=lambda one: one["doc_id"]),
        answers_of(engine, [tokenizer.encode(f"{row['question']} Answer:") for row in ROWS]),
        strict=True,
    ):
        assert sample["resps"] == [[answer]]
    monkeypatch.setattr(engine, "step", lambda: pytest.fail("an answer was asked for twice"))
    again = harness.harness(engine, place / "model", asked, manager, kept)
    assert again["results"] == found["results"]


@with_library
@pytest.mark.slow
@pytest.mark.parametrize("thinking", [0, 4])
def test_a_chat_is_asked_through_the_template(place, tmp_path, thinking):
    from nautilus.eval import harness

    model, tokenizer = nautilus.load(place / "model")
    asked = harness.Asked(tasks=["our_answer"], include=place / "tasks", chat=True, thinking=thinking, limit=3)
    manager = harness.known_tasks(asked)
    found = harness.harness(Engine(model, tokenizer), place / "model", asked, manager, tmp_path / "answers")
    prompts = [
        chat_tokens(
            tokenizer, [{"role": "user", "content": f"{row['question']} Answer:"}],
            settings=ChatSettings(enable_thinking=thinking > 0),
        )
        for row in ROWS[:3]
    ]  # fmt: skip
    how = Sampling(temperature=0, max_tokens=12, stop=("\n", "7"), thinking_budget=thinking if thinking else None)
    engine = Engine(model, tokenizer)
    want = [split_answer(one.text, inside=thinking > 0).content or "" for one in engine.generate(prompts, how)]
    got = [one["resps"][0][0] for one in sorted(found["samples"]["our_answer"], key=lambda one: one["doc_id"])]
    assert got == want


@with_library
@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        ("tasks=our_choise", "no task 'our_choise'; did you mean 'our_choice'"),
        ("", "without tasks; give names"),
        ("tasks=our_choice include=/nowhere", "that is no folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_read(place, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(nautilus, "load", lambda _: pytest.fail("the model was read"))
    assert evaluate(place, tmp_path / "out", *words.split()) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@with_library
@pytest.mark.slow
def test_a_task_of_log_probs_is_refused_in_a_chat(place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "out", "tasks=our_choice", "chat=true") == 2
    assert "chat=true was asked for with a task that scores log-probs" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    from nautilus.eval import harness

    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else here)
    with pytest.raises(UserError, match=r"suite=lm-eval was asked for, .*'lm_eval'; .*eval"):
        harness.lm_eval()
