"""Problems of others, and who judges their answers."""

import json
import shutil

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import Call, GraderBroken, Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS
from nautilus.tasks.rows import KINDS, Rows, problem_of, row_of, rows_in


def row(**truth) -> dict:
    return {"responses_create_params": {"input": [{"role": "user", "content": "?"}]}, **truth}


def verdict(kind: str, said: str | Reply, **truth):
    task = Rows(kind, [row(**truth)])
    problem = next(task.problems(task.rows[0].split))
    return task.grade(problem, said if isinstance(said, Reply) else Reply(content=said))


@pytest.mark.parametrize(
    "said, truth, right",
    [
        ("so \\boxed{1,234}", "1234", 1), ("\\boxed{\\frac{1}{2}}", "0.5", 1), ("\\boxed{\\frac12}", "1/2", 1),
        ("\\boxed{50\\%}", "0.5", 1), ("\\boxed{3} no, \\boxed{4}", "3", 0), ("it is 18", "5 + 13 = 18\n#### 18", 1),
        ("\\boxed{-\\frac{3}{4}}", "-0.75", 1), ("\\boxed{x+1}", "x+1", 1), ("\\boxed{$12$}", "12", 1), ("", "3", 0),
        ("\\boxed{1e3}", "1000", 0), ("\\boxed{1/0}", "3", 0), ("\\boxed{" + "9" * 5000 + "}", "3", 0),
        ("\\boxed{\\frac{1}{0}}", "2", 0),
    ],
)  # fmt: skip
def test_math(said, truth, right):
    assert verdict("math", said, expected_answer=truth).reward == right


def test_mathematics_beyond_numbers():
    pytest.importorskip("math_verify")
    assert verdict("math", "\\boxed{(x+1)^2}", expected_answer="x^2+2x+1").reward == 1
    assert verdict("math", "\\boxed{(x+1)^2}", expected_answer="x^2+1").reward == 0


@pytest.mark.parametrize(
    "said, right", [("\\boxed{B}", 1), ("\\boxed{A} or \\boxed{ B }", 1), ("B", 0), ("\\boxed{BC}", 0)]
)
def test_choices_stand_in_a_box(said, right):
    assert verdict("mcqa", said, expected_answer="B").reward == right


def test_schemas():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for given in (schema, json.dumps(schema)):
        assert [verdict("schema", said, schema=given).reward for said in ('{"n": 1}', '{"n": "1"}', "n: 1")] == [
            1,
            0,
            0,
        ]
    with pytest.raises(GraderBroken, match="the problem's schema is none"):
        verdict("schema", "{}", schema={"type": "nonsense"})


def test_calls_are_the_same_in_any_order():
    wanted = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": '{"y": [2]}'}]
    calls = [Call(name="b", arguments={"y": [2]}), Call(name="a", arguments={"x": 1})]
    assert verdict("call", Reply(calls=tuple(calls)), expected_calls=wanted).reward == 1
    assert verdict("call", Reply(calls=tuple(calls[:1])), expected_calls=wanted).reward == 0
    assert verdict("call", Reply(calls=(*calls, calls[0])), expected_calls=wanted).reward == 0


@pytest.mark.parametrize(
    "name, given, followed, not_followed",
    [
        ("keywords:existence", {"keywords": ["sun", "moon"]}, "The Sun, the moon", "sunny moon"),
        ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "sunny", "the sun"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a a a", "a"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "a a"),
        ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "at least"}, "Eye", "me"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 2, "relation": "less than"}, "One.", "One. Two! Three.",
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "but"}, "One.\n\nBut two.", "But one.\n\nTwo.",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yes.\nP.S. no", "Yes, p.s. no"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one"),
        ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "so *this* one", "so this"),
        (
            "detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
            "Section 1\nx\nSection 2\ny", "Section 1",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a}"),
        ("detectable_format:title", {}, "<<A song>>\nla", "<A song>"),
        ("combination:two_responses", {}, "one ****** two", "one ****** one"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
        ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "The end. So."),
        ("startend:quotation", {}, '"so"', '"'),
        ("change_case:english_capital", {}, "LOUD 1", "Loud"),
        ("change_case:english_lowercase", {}, "soft", "Soft"),
        (
            "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "ONE two",
            "ONE TWO",
        ),
        ("punctuation:no_comma", {}, "so", "so, so"),
    ],
)  # fmt: skip
def test_instructions(name, given, followed, not_followed):
    truth = {"instruction_id_list": [name], "kwargs": [{**given, "unused": None}]}
    assert [verdict("instruct", said, **truth).reward for said in (followed, not_followed, " ")] == [1, 0, 0]


def test_all_instructions_count_and_each_is_told():
    truth = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {}]}
    found = verdict("instruct", "So", **truth)
    assert found.reward == 0 and found.parts == {"punctuation:no_comma": 1, "change_case:english_lowercase": 0}


@pytest.mark.parametrize(
    "kind, truth",
    [
        ("math", {}), ("mcqa", {}), ("code", {"verifier_metadata": None}),
        ("code", {"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": []}}}),
        ("instruct", {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}),
        ("instruct", {"instruction_id_list": ["keywords:existence"], "kwargs": [{"word": 1}]}),
        ("instruct", {"instruction_id_list": ["keywords:existence"], "kwargs": []}),
        (
            "instruct",
            {
                "instruction_id_list": ["keywords:frequency"],
                "kwargs": [{"keyword": "a", "frequency": 1, "relation": "nearly"}],
            },
        ),
        ("call", {"expected_calls": [{"name": "a"}]}), ("schema", {}),
    ],
)  # fmt: skip
def test_a_poisoned_row_costs_its_own_answers_and_is_no_zero(kind, truth):
    with pytest.raises(GraderBroken):
        verdict(kind, "\\boxed{A} 3", **truth)


def test_rows_are_read_as_they_are_and_written_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row(expected_answer=str(number), extra={"a": number}) for number in range(3)]
    path.write_text("".join(json.dumps(one) + "\n\n" for one in rows))
    problems = [problem_of(one, "math") for one in rows_in(path)]
    assert [one.truth["expected_answer"] for one in problems] == ["0", "1", "2"]
    for name in TASKS:
        problem = next(TASKS[name]().problems("train"))
        again = json.loads(json.dumps(row_of(problem)))
        assert again["agent_ref"]["name"] == name and problem_of(again, name).id == problem.id
    path.write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match="line 2, is no object"):
        [*rows_in(path)]
    path.write_text("{}\n{\n")
    with pytest.raises(ValueError, match="line 2, is no JSON"):
        [*rows_in(path)]
    with pytest.raises(ValueError, match="no messages"):
        problem_of({"input": 1}, "math")
    with pytest.raises(ValueError, match="'maths'.*math, mcqa"):
        Rows("maths", rows)
    with pytest.raises(ValueError, match="has no rows"):
        Rows("math", [])


# ----- programs -------------------------------------------------------------------------------------------------------

needs_jail = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
TESTS = {"verifier_metadata": {"unit_tests": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}}}


@needs_jail
@pytest.mark.parametrize(
    "program, right, why",
    [
        ("print(sum(map(int, input().split())))", 1, "all of 2"), ("print(3)", 0, "test 2 gave another"),
        ("raise KeyError('so')", 0, "test 1 ended with 1: KeyError: 'so'"), ("syntax error here", 0, "SyntaxError"),
    ],
)  # fmt: skip
def test_programs_are_run_on_hidden_tests(program, right, why):
    found = verdict("code", f"Sure:\n```python\n{program}\n```", **TESTS)
    assert found.reward == right and why in found.why


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(GraderBroken, match="needs the program bwrap; install the package bubblewrap"):
        verdict("code", "print(3)", **TESTS)


def test_every_kind_is_told_of():
    from nautilus.tasks import rows

    assert all(f"| `{kind}` |" in rows.__doc__ for kind in KINDS)


@pytest.mark.parametrize(
    "bad, why",
    [
        ({"worked": 5}, "worked answer must be a list"), ({"worked": "abc"}, "worked answer must be a list"),
        ({"responses_create_params": {"input": "?", "tools": 5}}, "tools must be a list"),
        ({"responses_create_params": {"input": "\ud800"}}, "surrogates not allowed"),
        ({"responses_create_params": {}}, "no messages"),
    ],
)  # fmt: skip
def test_what_is_no_row_is_named_by_file_and_line(tmp_path, bad, why):
    good = row(expected_answer="1")
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, **bad}) + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl, line 2: .*{why}"):
        asked(f"math@{tmp_path / 'rows.jsonl'}")
    people = {"response_1": "a", "response_2": "b", "score_1": 1, "score_2": 2, "ranking": 4}
    for messages, fault in (
        ([{"content": "?"}], "'role'"),
        ([5], "TypeError"),
        ([{"role": "user", "content": "\ud800"}], "surr"),
    ):
        lines = [{**people, "messages": [{"role": "user", "content": "?"}]}, {**people, "messages": messages}]
        (tmp_path / "judged.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        with pytest.raises(UserError, match=f"judged.jsonl, line 2: .*{fault}"):
            asked(f"judge@{tmp_path / 'judged.jsonl'}")
    for place, what in ((tmp_path, "is no file"), (tmp_path / "x", "is not there")):
        with pytest.raises(UserError, match=f"the rows of math .* {what}"):
            asked(f"math@{place}")
