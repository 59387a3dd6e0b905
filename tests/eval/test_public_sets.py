"""Every set is read from a few rows in its public format, and a damaged file is named with the line that is wrong."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from nautilus.eval.families import FAMILIES, Prompt
from nautilus.eval.public_sets import read_set
from nautilus.runtime import UserError

EDIT = {
    "sample_id": "accounting1", "sample_type": "accounting", "sample_name": "A ledger",
    "metadata": {"start_state": "basic_state", "ok_to_redistribute": "yes"},
    "states": [
        {"state_id": "basic_state", "solution_folder": "basic_state/", "context": ["a.ledger"],
         "prompts": [{"target_state": "split", "prompt": "Split it by year."},
                     {"target_state": "euro", "prompt": "€"}]},
        {"state_id": "split", "context": ["2016.ledger", "2017.ledger"],
         "prompts": [{"target_state": "basic_state", "prompt": "Merge them."}]},
        {"state_id": "euro", "context": ["a.ledger"], "prompts": []},
    ],
    "files": {"basic_state/a.ledger": "2016/06/01 Shop\n    9.40", "distractor_context/b.md": "Else.",
              "basic_state/c.png": "base64:AAAA"},
}  # fmt: skip
COMPLETION = {
    "repo_name": "a/b", "file_path": "src/main.py", "import_statement": "from util import add", "level": "2k",
    "context": [{"identifier": "add", "path": "src/util.py", "snippet": "def add(a, b):\n    return a + b"}],
    "cropped_code": "def twice(a):\n", "all_code": "", "next_line": "    return add(a, a)", "gold_snippet_index": 0,
}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
TRACE = [
    {"role": "system", "content": "You repair code.", "tool_calls": None},
    {"role": "user", "content": "Mend it.", "tool_calls": None},
    {"role": "assistant", "content": "I look around.", "tool_calls": [CALL]},
    {"role": "tool", "content": "a.py b.py", "tool_calls": None},
    {"role": "assistant", "content": "There are a.py and b.py.", "tool_calls": []},
]
MBPP = {"text": "Add two.", "code": "def add(a, b):\r\n  return a + b", "task_id": 2, "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3"], "challenge_test_list": []}  # fmt: skip
SANE = {"source_file": "x.ipynb", "task_id": 3, "prompt": "Negate.", "code": "def neg(a): return -a",
        "test_imports": [], "test_list": ["assert neg(1) == -1"]}  # fmt: skip
FUNCTION = {"name": "area", "description": "Of a triangle.", "parameters": {"type": "dict", "required": ["base"],
            "properties": {"base": {"type": "float"}, "unit": {"type": "string"}}}}  # fmt: skip
TOOLS = {"id": "simple_python_0", "question": [[{"role": "user", "content": "An area?"}]], "function": [FUNCTION]}
RIGHT = {"id": "simple_python_0", "ground_truth": [{"area": {"base": [10, 10.0], "unit": ["", "m"]}}]}
HOPS = {
    "_id": "5a8b", "answer": "Paris", "question": "Where was the author of A born?", "type": "bridge", "level": "hard",
    "supporting_facts": [["A", 0], ["B", 1]], "context": [["A", ["A is by B.", " It is old."]], ["B", ["B wrote."]]],
}  # fmt: skip
PARAGRAPHS = {
    "id": "2hop__1_2", "question": "Who?", "answer": "Ann", "answer_aliases": [], "answerable": True,
    "question_decomposition": [], "paragraphs": [
        {"idx": 0, "title": "T", "paragraph_text": "It was Ann.", "is_supporting": True},
        {"idx": 1, "title": "U", "paragraph_text": "Else.", "is_supporting": False},
    ],
}  # fmt: skip
SCHEMA = {
    "db_id": "concert_singer", "table_names_original": ["singer", "song"], "table_names": ["singer", "song"],
    "column_names_original": [[-1, "*"], [0, "Id"], [0, "Name"], [1, "Title"]], "primary_keys": [1],
    "column_names": [[-1, "*"], [0, "id"], [0, "name"], [1, "title"]], "foreign_keys": [],
    "column_types": ["text", "number", "text", "text"],
}  # fmt: skip
QUERY = {"db_id": "concert_singer", "query": "SELECT count(*) FROM singer", "question": "How many?", "sql": {}}
BOOK = {"id": 0, "context": "A long book.", "input": "Who?", "answer": ["Ann", "A"], "options": ["Ann", "Bob"]}
MTBENCH = {"question_id": 101, "category": "reasoning", "turns": ["First?", "Second?"], "reference": ["Yes.", "No."]}
CODE = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n",
        "test": "def check(f): pass"}  # fmt: skip
WRITTEN = {"lang": "python", "raw_index": 5533, "index": 14, "seed": "def", "problem": "Do.", "solution": "Done."}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows]), path)
    return path


def whole(path, value):
    path.write_text(json.dumps(value, indent=1))
    return path


def one(name, path) -> Prompt:
    prompts = [*read_set(name, path)]
    assert len(prompts) == 1 and prompts[0].set == name and prompts[0].family in FAMILIES
    return prompts[0]


def test_delegate52_gives_every_edit_of_the_first_state_with_its_documents(tmp_path):
    first, second = read_set("delegate52", lines(tmp_path / "delegate52.jsonl", EDIT))
    assert (first.id, second.id) == ("accounting1/split", "accounting1/euro") and first.family == "agentic"
    words = first.messages[0]["content"]
    assert "```a.ledger\n2016/06/01 Shop\n    9.40\n```" in words and "Split it by year." in words
    assert "2016.ledger, 2017.ledger" in words and "Else" not in words and "base64" not in words


@pytest.mark.parametrize("write, name", [(lines, "a.jsonl"), (table, "a.parquet")])
def test_fineedit_asks_for_the_edited_text(tmp_path, write, name):
    row = {"context": "One.", "edit_request": "Say two.", "edit_content": "Two.", "diff": "", "g_score": 9}
    found = one("fineedit", write(tmp_path / name, row))
    assert found.reference == "Two." and "One.\n\nSay two." in found.text


def test_repobench_is_text_to_be_continued_by_one_line(tmp_path):
    found = one("repobench", table(tmp_path / "cross_file_first-00000.parquet", COMPLETION))
    assert found.prompt.endswith("# Path: src/main.py\nfrom util import add\ndef twice(a):\n")
    assert "# Path: src/util.py\ndef add(a, b):\n" in found.prompt and found.reference == "    return add(a, a)"
    java = one("repobench", lines(tmp_path / "a.jsonl", COMPLETION | {"file_path": "Main.java"}))
    assert java.prompt.startswith("// Repository: a/b\n// Path: src/util.py")


def test_code_sets(tmp_path):
    found = one("magicoder", lines(tmp_path / "m.jsonl", WRITTEN))
    assert (found.id, found.reference) == ("5533", "Done.") and found.text.endswith("Do.\n\nAssistant:\n")
    found = one("mbpp", lines(tmp_path / "mbpp.jsonl", MBPP))
    assert "assert add(1, 2) == 3" in found.text and found.reference == "def add(a, b):\n  return a + b"
    assert "Negate." in one("mbpp", whole(tmp_path / "sanitized-mbpp.json", [SANE])).text
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(CODE).encode()))
    found = one("humaneval", packed)
    assert (found.prompt, found.text, found.reference) == ("def f():\n", "def f():\n", "    return 1\n")


def test_bfcl_has_tools_in_json_schema_and_the_first_right_call(tmp_path):
    (tmp_path / "possible_answer").mkdir()
    lines(tmp_path / "possible_answer" / "BFCL_v4_simple_python.json", RIGHT, RIGHT | {"id": "another"})
    path = lines(tmp_path / "BFCL_v4_simple_python.json", TOOLS, TOOLS | {"id": "simple_python_9"})
    first, second = read_set("bfcl", path)
    assert [*read_set("bfcl", tmp_path)] == [first, second]
    assert first.reference == '{"name": "area", "arguments": {"base": 10}}' and second.reference == ""
    parameters = first.tools[0]["function"]["parameters"]
    assert parameters["type"] == "object" and parameters["properties"]["base"]["type"] == "number"
    turns = TOOLS | {"question": TOOLS["question"] * 2}
    with pytest.raises(UserError, match=r"line 1: 2 turns, where only files of single turns"):
        one("bfcl", lines(tmp_path / "BFCL_v4_multi_turn_base.json", turns))


def test_spider_shows_the_tables_of_the_database(tmp_path):
    path = whole(tmp_path / "dev.json", [QUERY])
    with pytest.raises(UserError, match=r"no .*tables\.json"):
        one("spider", path)
    whole(tmp_path / "tables.json", [SCHEMA])
    found = one("spider", tmp_path)
    assert "CREATE TABLE singer (Id number, Name text);\nCREATE TABLE song (Title text);" in found.text
    assert found.reference == "SELECT count(*) FROM singer" and found.family == "structured" and found.id == "dev/1"
    whole(path, [QUERY, QUERY | {"db_id": "nowhere"}])
    with pytest.raises(UserError, match=r"dev\.json entry 2: its database 'nowhere' is not described"):
        [*read_set("spider", path)]


def test_multihop_sets(tmp_path):
    for name in ("hotpotqa", "2wikimultihopqa"):
        found = one(name, whole(tmp_path / f"{name}.json", [HOPS]))
        assert "A: A is by B. It is old.\n\nB: B wrote.\n\nQuestion: Where" in found.text
        assert (found.id, found.reference) == ("5a8b", "Paris")
    columns = {"title": ["A", "B"], "sentences": [["A is by B.", " It is old."], ["B wrote."]]}
    row = {"id": "5a8b", "question": HOPS["question"], "answer": "Paris", "context": columns}
    assert (
        one("hotpotqa", table(tmp_path / "v.parquet", row)).messages
        == one("hotpotqa", whole(tmp_path / "hotpotqa.json", [HOPS])).messages
    )
    found = one("musique", lines(tmp_path / "musique_ans_v1.0_dev.jsonl", PARAGRAPHS))
    assert "T: It was Ann.\n\nU: Else." in found.text and found.reference == "Ann"
    hidden = {key: value for key, value in HOPS.items() if key != "answer"}
    assert one("hotpotqa", whole(tmp_path / "test.json", [hidden])).reference == ""


def test_long_sets(tmp_path):
    found = one("infinitebench", lines(tmp_path / "longbook_choice_eng.jsonl", BOOK))
    assert found.id == "longbook_choice_eng/0" and "A long book.\n\nWho?\n\nA. Ann\n\nB. Bob" in found.text
    assert found.reference == "Ann"
    blank = one("infinitebench", lines(tmp_path / "longdialogue_qa_eng.jsonl", BOOK | {"input": "", "options": []}))
    assert "A long book.\n\nWhich character is $$MASK$$" in blank.text
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "article", "highlights"], ["f00", 'It "was",\nso.', "Was."]])
    found = one("cnn_dailymail", tmp_path / "test.csv")
    assert (found.id, found.reference) == ("f00", "Was.") and 'It "was",\nso.' in found.text
    row = {"id": "f00", "article": 'It "was",\nso.', "highlights": "Was."}
    assert one("cnn_dailymail", table(tmp_path / "test.parquet", row)) == found
    for field in ("report", "document"):
        found = one("govreport", lines(tmp_path / "g.jsonl", {field: "Long.", "summary": "Short."}))
        assert found.reference == "Short." and found.family == "long" and found.id == "g/1"


def test_open_sets(tmp_path):
    rows = [
        {"instruction": "Sum.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    first, second = read_set("alpaca", whole(tmp_path / "alpaca_data.json", rows))
    assert first.messages[0]["content"] == "Sum.\n\n1 2" and second.messages[0]["content"] == "Sing."
    found = one("mt_bench", lines(tmp_path / "question.jsonl", MTBENCH))
    assert (found.id, found.messages[0]["content"], found.reference) == ("101", "First?", "Yes.")
    found = one("spec_bench", lines(tmp_path / "question.jsonl", MTBENCH | {"category": "rag"}))
    assert found.family == "multihop"
    found = one("gsm8k", lines(tmp_path / "test.jsonl", {"question": "1+1?", "answer": "2\n#### 2"}))
    assert found.reference.endswith("#### 2") and found.id == "test/1"


GOOD = {
    "delegate52": EDIT, "fineedit": {"context": "a", "edit_request": "b", "edit_content": "c"}, "repobench": COMPLETION,
    "swebench_openhands": {"instance_id": "i", "messages": TRACE}, "magicoder": WRITTEN, "mbpp": MBPP, "bfcl": TOOLS,
    "musique": PARAGRAPHS, "infinitebench": BOOK, "govreport": {"report": "a", "summary": "b"}, "mt_bench": MTBENCH,
    "spec_bench": MTBENCH, "gsm8k": {"question": "a", "answer": "b"}, "humaneval": CODE,
    "alpaca": {"instruction": "a", "input": "", "output": "c"}, "hotpotqa": HOPS, "2wikimultihopqa": HOPS,
    "swe_agent": {"history": TRACE}, "cnn_dailymail": {"id": "1", "article": "a", "highlights": "b"},
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_damaged_row_is_named_with_its_file_and_line(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    assert [*read_set(name, lines(path, GOOD[name]))]
    path.write_text(json.dumps(GOOD[name]) + "\n" + json.dumps(GOOD[name])[:-2])
    with pytest.raises(UserError, match=r"rows\.jsonl line 2 is not JSON"):
        [*read_set(name, path)]
    lost = 0
    for field in GOOD[name]:
        for value in (None, 7, [7], {"a": 7}, "\ud800", ""):
            lines(path, GOOD[name], GOOD[name] | {field: value})
            try:
                for one in read_set(name, path):
                    f"{one.id}{one.text}{one.reference}".encode()
            except UserError as bad:
                assert f"{path} line 2" in str(bad)
                lost += 1
    assert lost >= 4
