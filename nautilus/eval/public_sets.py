"""Published sets of prompts, read from local files in the format of their publishers.

    prompts = read_set("hotpotqa", "hotpot_dev_distractor_v1.json")

| set | file | format as told by |
|--|--|--|
| delegate52 | JSONL | microsoft/delegate52, utils_dataset.py, run_single.py, domains/domain_base.py |
| fineedit | JSON, JSONL, CSV or parquet | card of YimingZeng/FineEdit_bench: the fields; the kind of file not seen |
| repobench | parquet or JSONL | Leolty/repobench, data/utils.py (version 1.1: cropped_code, next_line) |
| swebench_openhands | parquet or JSONL | see `transcripts`; fields as programs of others read them |
| magicoder | JSONL | ise-uiuc/magicoder, generate_data.py (OSS-Instruct: problem, solution) |
| mbpp | JSONL, sanitised JSON | google-research/google-research, mbpp |
| bfcl | JSON, a row a line | ShishirPatil/gorilla, bfcl_eval/data, with possible_answer in it; single turns only |
| spider | JSON | taoyds/spider, README and evaluation_examples; its tables.json must lie beside it |
| hotpotqa | JSON or parquet | hotpotqa/hotpot, README; the parquet, whose context has columns, not seen |
| 2wikimultihopqa | JSON | Alab-NII/2wikimultihop, README |
| musique | JSONL | StonyBrookNLP/musique, raw_data_to_official_format.py |
| infinitebench | JSONL | OpenBMB/InfiniteBench, src/eval_utils.py |
| cnn_dailymail | parquet or CSV | columns as programs of others read them: id, article, highlights |
| govreport | parquet or JSONL | the same: report or document, summary; the nested first release is not read |
| alpaca | JSON | tatsu-lab/stanford_alpaca, README |
| mt_bench | JSONL | lm-sys/FastChat, llm_judge/data/mt_bench; first turns, as second ones need an answer |
| spec_bench | JSONL | hemingkx/Spec-Bench, data/spec_bench/question.jsonl; first turns |
| gsm8k | JSONL | openai/grade-school-math |
| humaneval | JSONL, packed | openai/human-eval |
| swe_agent | JSON | see `transcripts` |

The words around what is asked are ours: publishers word their prompts for models of their time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nautilus.eval.families import Prompt, asked, plain
from nautilus.eval.rows import Row, rows_at, rows_of
from nautilus.eval.transcripts import swe_agent, swebench_openhands
from nautilus.runtime import UserError

CATEGORIES = {"coding": "code", "extraction": "structured", "rag": "multihop", "summarization": "long"}  # Spec-Bench's
TYPES = {"dict": "object", "float": "number", "double": "number", "tuple": "array", "any": "string"}  # BFCL's, to JSON
ANSWERS = "possible_answer"  # folder of BFCL
# Tasks of InfiniteBench whose rows do not say what is asked.
WANTED = {
    "longdialogue_qa_eng": "Which character is $$MASK$$ in this dialogue?",
    "math_calc": "Give the value of this expression after every step.",
}


def delegate52(row: Row) -> Iterator[Prompt]:
    """The edits that lead away from the first state, with its documents and without the distracting ones. Their answer
    is not published: an edit is judged by whether another one undoes it."""
    states = {each.text("state_id"): each for each in inside(row, row.listed("states"), "state")}
    begin = row.inner(row.value("metadata"), "metadata").text("start_state")
    if begin not in states:
        row.refuse(f"its first state {begin!r} is none of its states")
    folder = states[begin].text("solution_folder").rstrip("/") + "/"
    files = row.inner(row.value("files"), "files")
    kept = [name for name in files.fields if name.startswith(folder) and not files.text(name).startswith("base64:")]
    fenced = "\n\n".join(f"```{name.removeprefix(folder)}\n{files.text(name).rstrip()}\n```" for name in kept)
    for edit in inside(states[begin], states[begin].listed("prompts"), "prompt"):
        goal = edit.text("target_state")
        wanted = ", ".join(map(str, states[goal].listed("context"))) if goal in states else "all of them"
        words = f"Here are documents to be edited.\n\n{fenced}\n\n{edit.text('prompt')}\n\n"
        words += f"Answer with the whole edited documents ({wanted}), each as a block like those above."
        yield asked("delegate52", "agentic", f"{row.text('sample_id')}/{goal}", words)


def fineedit(row: Row) -> Iterator[Prompt]:
    words = (
        f"Edit this text.\n\n{row.text('context')}\n\n{row.text('edit_request')}\n\nAnswer with all of the edited text."
    )
    yield asked("fineedit", "agentic", number(row), words, row.text("edit_content"))


def repobench(row: Row) -> Iterator[Prompt]:
    """The next line of a file, after pieces of other files of its repository: text to be continued."""
    path = row.text("file_path")
    mark = "//" if path.endswith(".java") else "#"
    pieces = [f"{mark} Repository: {row.text('repo_name')}"]
    for each in inside(row, row.listed("context"), "piece"):
        pieces.append(f"{mark} Path: {each.text('path')}\n{each.text('snippet')}\n")
    pieces.append(f"{mark} Path: {path}\n{row.text('import_statement')}\n{row.text('cropped_code').rstrip()}\n")
    line = row.text("next_line")
    yield Prompt(id=number(row), family="code", set="repobench", prompt="\n".join(pieces), reference=line)


def magicoder(row: Row) -> Iterator[Prompt]:
    words = f"Write a solution to this problem.\n\n{row.text('problem')}"
    yield asked("magicoder", "code", number(row, "raw_index", "index"), words, row.text("solution"))


def mbpp(row: Row) -> Iterator[Prompt]:
    tests = "\n".join(map(str, row.listed("test_list")))
    words = f"{row.text('text', 'prompt')}\n\nThe code must pass these tests:\n\n{tests}"
    yield asked("mbpp", "code", row.value("task_id"), words, row.text("code").replace("\r\n", "\n"))


def bfcl(row: Row) -> Iterator[Prompt]:
    if row.file.parent.name == ANSWERS:  # met in a folder of all files
        return
    turns, id = row.listed("question"), row.text("id")
    if len(turns) != 1 or not isinstance(turns[0], list) or not turns[0]:
        row.refuse(f"{len(turns)} turns, where only files of single turns are read (simple, multiple, parallel, live)")
    messages = [{"role": m.text("role"), "content": m.text("content")} for m in inside(row, turns[0], "message")]
    tools = [{"type": "function", "function": schema(each.fields)} for each in functions(row)]
    calls = answers_of(row.file.with_name(ANSWERS) / row.file.name).get(id, [])
    reference = "\n".join(plain({"name": name, "arguments": values}) for name, values in calls)
    yield Prompt(id=id, family="structured", set="bfcl", messages=messages, tools=tools, reference=reference)


def functions(row: Row) -> Iterator[Row]:
    found = row.value("function")
    for each in inside(row, found if isinstance(found, list) else [found], "function"):
        each.text("name")
        yield each


def schema(value: Any) -> Any:
    """A function's description with the types of JSON Schema."""
    if isinstance(value, Mapping):
        return {key: TYPES.get(item, item) if key == "type" and isinstance(item, str) else schema(item)
                for key, item in value.items()}  # fmt: skip
    return [schema(item) for item in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=4)
def answers_of(path: Path) -> dict[str, list[tuple[str, dict]]]:
    """By id, calls with their arguments: of all values that are right the first. Empty where no such file is."""
    found: dict[str, list[tuple[str, dict]]] = {}
    for row in rows_of(path) if path.is_file() else ():
        calls = [call for each in inside(row, row.listed("ground_truth"), "call") for call in each.fields.items()]
        found[row.text("id")] = [(name, first_of(row, values)) for name, values in calls]
    return found


def first_of(row: Row, values: Any) -> dict:
    given = row.inner(values, "arguments").fields
    if not all(isinstance(each, list) and each for each in given.values()):
        row.refuse("an argument has no list of values that are right")
    # "" among the values says that the argument may be left out.
    return {name: each[0] for name, each in given.items() if each[0] != ""}


def spider(row: Row) -> Iterator[Prompt]:
    tables, database = tables_of(row.file.with_name("tables.json")), row.text("db_id")
    if database not in tables:
        row.refuse(f"its database {database!r} is not described in {row.file.with_name('tables.json')}")
    words = f"{tables[database]}\n\n{row.text('question')}\n\nAnswer with one query in SQL."
    yield asked("spider", "structured", number(row), words, row.text("query"))


@functools.lru_cache(maxsize=4)
def tables_of(path: Path) -> dict[str, str]:
    """The tables of every database, each as CREATE TABLE."""
    if not path.is_file():
        raise UserError(f"no {path}: questions of Spider need the description of their databases; put it there")
    return {row.text("db_id"): "\n".join(created(row)) for row in rows_of(path)}


def created(row: Row) -> Iterator[str]:
    columns = [*zip(row.listed("column_names_original"), row.listed("column_types"), strict=False)]
    for place, table in enumerate(row.listed("table_names_original")):
        try:
            mine = [f"{name} {kind}" for (owner, name), kind in columns if owner == place]
        except (TypeError, ValueError):
            row.refuse("a column is not a pair of its table's place and its name")
        yield f"CREATE TABLE {table} ({', '.join(mine)});"


def hotpotqa(row: Row, set: str = "hotpotqa") -> Iterator[Prompt]:
    context = row.value("context")
    if isinstance(context, Mapping):  # a parquet file has columns
        there = row.inner(context, "context")
        context = [*zip(there.listed("title"), there.listed("sentences"), strict=False)]
    if not isinstance(context, list):
        row.refuse(f"field 'context' holds a {type(context).__name__}, not a list")
    try:
        paragraphs = [f"{title}: {''.join(sentences).strip()}" for title, sentences in context]
    except (TypeError, ValueError):
        row.refuse("a paragraph is not a pair of its title and its sentences")
    yield question(row, set, row.value("_id", "id"), paragraphs)


def musique(row: Row) -> Iterator[Prompt]:
    there = inside(row, row.listed("paragraphs"), "paragraph")
    paragraphs = [f"{each.text('title')}: {each.text('paragraph_text')}" for each in there]
    yield question(row, "musique", row.value("id"), paragraphs)


def question(row: Row, set: str, id: Any, paragraphs: Sequence[str]) -> Prompt:
    """Over paragraphs; the sets for tests come without answers."""
    words = "\n\n".join(paragraphs) + f"\n\nQuestion: {row.text('question')}"
    answer = row.text("answer") if row.get("answer") is not None else ""
    words += "\n\nSay which sentences tell it, then answer."
    return asked(set, "multihop", id, words, answer)


def infinitebench(row: Row) -> Iterator[Prompt]:
    given = row.listed("options") if row.get("options") else []
    options = [f"{letter}. {each}" for letter, each in zip("ABCD", given, strict=False)]
    task, answer = row.file.name.partition(".")[0], row.value("answer")
    reference = str(answer[0] if isinstance(answer, list) and answer else answer)
    wanted = row.text("input") if row.get("input") else WANTED.get(task, "Summarise this text.")
    parts = [row.text("context", "content"), wanted, *options]
    yield asked("infinitebench", "long", f"{task}/{row.value('id')}", "\n\n".join(parts), reference)


def cnn_dailymail(row: Row) -> Iterator[Prompt]:
    words = f"{row.text('article')}\n\nName the highlights of this article, one on a line."
    yield asked("cnn_dailymail", "long", row.value("id"), words, row.text("highlights"))


def govreport(row: Row) -> Iterator[Prompt]:
    words = f"{row.text('report', 'document')}\n\nSummarise this report."
    yield asked("govreport", "long", number(row, "id"), words, row.text("summary"))


def alpaca(row: Row) -> Iterator[Prompt]:
    more = row.text("input") if row.get("input") is not None else ""
    words = row.text("instruction") + (f"\n\n{more}" if more else "")
    yield asked("alpaca", "open", number(row), words, row.text("output"))


def mt_bench(row: Row) -> Iterator[Prompt]:
    yield first_turn(row, "mt_bench", "open")


def spec_bench(row: Row) -> Iterator[Prompt]:
    yield first_turn(row, "spec_bench", CATEGORIES.get(row.text("category"), "open"))


def first_turn(row: Row, set: str, family: str) -> Prompt:
    turns, known = row.listed("turns"), row.get("reference") or [""]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        row.refuse("field 'turns' is not a list of texts")
    reference = str(known[0] if isinstance(known, list) else known)
    return asked(set, family, row.value("question_id"), turns[0], reference)


def gsm8k(row: Row) -> Iterator[Prompt]:
    yield asked("gsm8k", "open", number(row), row.text("question"), row.text("answer"))


def humaneval(row: Row) -> Iterator[Prompt]:
    prompt = row.text("prompt") or row.refuse("field 'prompt' is empty")
    id, reference = row.text("task_id"), row.text("canonical_solution")
    yield Prompt(id=id, family="code", set="humaneval", prompt=prompt, reference=reference)


def inside(row: Row, values: Sequence[Any], what: str) -> Iterator[Row]:
    for place, value in enumerate(values, start=1):
        yield row.inner(value, f"{what} {place}")


def number(row: Row, *names: str) -> str:
    """The row's own number; in sets without, its file and where it stands there."""
    own = row.get(*names)
    return f"{row.file.name.partition('.')[0]}/{row.place.rpartition(' ')[2]}" if own is None else str(own)


class Published(NamedTuple):
    """How a set is read: the names of its files in a folder, and a row to prompts."""

    files: tuple[str, ...]
    read: Callable[[Row], Iterator[Prompt] | list[Prompt]]


ANY = "*.parquet", "*.jsonl", "*.json", "*.csv", "*.jsonl.gz"
SETS: dict[str, Published] = {
    "delegate52": Published(("*.jsonl",), delegate52),
    "fineedit": Published(ANY, fineedit),
    "repobench": Published(("*.parquet", "*.jsonl"), repobench),
    "swebench_openhands": Published(("*.parquet", "*.jsonl"), swebench_openhands),
    "magicoder": Published(("*.jsonl",), magicoder),
    "mbpp": Published(("*mbpp*.json*",), mbpp),
    "bfcl": Published(("BFCL_*_simple*.json", "BFCL_*_multiple.json", "BFCL_*_parallel*.json"), bfcl),
    "spider": Published(("dev.json", "train*.json"), spider),
    "hotpotqa": Published(("*.json", "*.parquet"), hotpotqa),
    "2wikimultihopqa": Published(("*.json",), functools.partial(hotpotqa, set="2wikimultihopqa")),
    "musique": Published(("musique*.jsonl",), musique),
    "infinitebench": Published(("*.jsonl",), infinitebench),
    "cnn_dailymail": Published(("*.parquet", "*.csv"), cnn_dailymail),
    "govreport": Published(("*.parquet", "*.jsonl"), govreport),
    "alpaca": Published(("alpaca*.json",), alpaca),
    "mt_bench": Published(("question*.jsonl",), mt_bench),
    "spec_bench": Published(("question*.jsonl", "spec_bench*.jsonl"), spec_bench),
    "gsm8k": Published(("*.jsonl",), gsm8k),
    "humaneval": Published(("*.jsonl", "*.jsonl.gz"), humaneval),
    "swe_agent": Published(("*.traj.json", "*.traj"), swe_agent),
}


def read_set(name: str, where: str | Path, longest: int = 0) -> Iterator[Prompt]:
    """The prompts of a set, from a file of it or a folder of them; of those longer than so many characters none (0:
    all). UserError for files that are not what their publishers say, with file and line, and for none at all."""
    if name not in SETS:
        raise UserError(f"no set of prompts is called {name!r}; have {', '.join(SETS)}")
    count = 0
    for row in rows_at(where, SETS[name].files):
        for one in SETS[name].read(row):
            count += 1
            row.whole(f"{one.id}{one.text}{one.reference}")
            if not longest or len(one.text) <= longest:
                yield one
    if not count:
        raise UserError(f"{where} has no prompt of {name}; name a file of the set, as it was published")
