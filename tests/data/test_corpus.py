import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data import embedded
from nautilus.data.corpus import EMBEDDED, Source, choose_held_out, parted, read, sources, survey, within


def put(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def texts(source, skipped=None) -> dict[str, str]:
    return {document.name: document.text for document in read(source, skipped)}


def one(place, **settings) -> Source:
    [source] = sources([str(place)], **settings)
    return source


# ----- reading -----


def test_a_folder_gives_its_text_files_by_relative_name(tmp_path):
    put(
        tmp_path,
        {"b.txt": "b\r\n", "a/z.md": "\ufeffz", "a.rst": "r", ".git/x.txt": "no", "p.png": b"\xff", "e.txt": " \n"},
    )
    assert texts(one(tmp_path)) == {"a.rst": "r", "a/z.md": "z", "b.txt": "b\r\n"}
    assert [d.name for d in read(one(tmp_path))] == ["a.rst", "a/z.md", "b.txt"]


@pytest.mark.timeout(30)
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    put(tmp_path, {"a.txt": "text", "c.txt": "more"})
    os.mkfifo(tmp_path / "b.txt")
    assert texts(one(tmp_path)) == {"a.txt": "text", "c.txt": "more"}
    with pytest.raises(ValueError, match=r"no text at '.*b\.txt': no such file or folder, or a pipe or device"):
        texts(one(tmp_path / "b.txt"))


def test_a_lone_file_is_read_in_pieces_that_join_to_the_whole(tmp_path):
    text = "".join(f"line {i} é\n" + ("\n" if i % 40 == 0 else "") for i in range(20000))
    put(tmp_path, {"book.unusual": text})
    pieces = texts(one(tmp_path / "book.unusual"))
    assert len(pieces) > 9 and "".join(pieces.values()) == text
    assert list(pieces) == sorted(pieces)
    corpus = survey(one(tmp_path / "book.unusual"))
    assert corpus.train and corpus.held_out


def test_jsonl_rows_give_the_named_field(tmp_path):
    rows = [{"question": f"q{i}", "n": i} for i in range(3)]
    lines = "\n\n".join(map(json.dumps, rows))
    put(tmp_path, {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines.encode())})
    assert list(texts(one(f"{tmp_path}#question")).values()) == ["q0", "q1", "q2"] * 2
    assert list(texts(one(f"{tmp_path / 'a.jsonl'}#question"))) == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]


def test_a_folder_of_hugging_face_datasets_gives_the_named_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "split"))
    assert texts(one(tmp_path / "plain")) == {"000000000": "one", "000000001": "two"}
    assert list(texts(Source(name="s", kind="dataset", where=str(tmp_path / "split"), split="test")).values()) == [
        "one",
        "two",
    ]
    with pytest.raises(ValueError, match=r"has the splits \['test'\] but not 'train'"):
        texts(one(tmp_path / "split"))
    with pytest.raises(ValueError, match=r"the fields \['n', 'text'\] but no field 'body'"):
        texts(one(f"{tmp_path / 'plain'}#body"))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install .*\[data\]'"):
        texts(one("hub:some/name"))


# ----- bad input -----


def test_bytes_that_are_no_utf8_are_an_error_that_names_file_and_offset(tmp_path):
    put(tmp_path, {"good.txt": "fine", "bad.txt": b"caf\xe9 au lait"})
    with pytest.raises(ValueError, match=r"bad\.txt: byte 3 \(0xe9\).*undecodable=skip"):
        survey(one(tmp_path))


def test_the_offset_counts_from_the_start_of_the_file(tmp_path):
    lines = b"good line\n" * 9000
    put(tmp_path, {"rows.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n', "long.txt": lines + b"\xff\n"})
    with pytest.raises(ValueError, match=r"rows\.jsonl: byte 24 "):
        survey(one(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=rf"long\.txt: byte {len(lines)} "):
        survey(one(tmp_path / "long.txt"))


def test_undecodable_documents_are_skipped_and_counted_or_replaced(tmp_path):
    put(tmp_path, {"good.txt": "fine", "bad.txt": b"caf\xe9"})
    corpus = survey(one(tmp_path, undecodable="skip"))
    assert len(corpus.skipped) == 1 and "bad.txt" in corpus.skipped[0]
    assert {d.name for part in ("train", "held_out") for d in corpus.documents(part)} == {"good.txt"}
    replaced = one(tmp_path, undecodable="replace")
    assert texts(replaced)["bad.txt"] == "caf\ufffd" and not survey(replaced).skipped


def test_half_a_surrogate_pair_in_json_is_undecodable(tmp_path):
    put(tmp_path, {"a.jsonl": '{"text": "ok"}\n{"text": "\\ud800"}\n'})
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: byte 0 .*not UTF-8"):
        survey(one(tmp_path / "a.jsonl"))
    assert list(texts(one(tmp_path / "a.jsonl", undecodable="skip")).values()) == ["ok"]


def test_an_empty_corpus_says_what_was_looked_at(tmp_path):
    with pytest.raises(ValueError, match="is empty: looked in .* for text in .txt .*found no files"):
        survey(one(tmp_path))
    put(tmp_path, {"image.png": b"\x00", "blank.txt": "\n"})
    with pytest.raises(ValueError, match="found .png, .txt"):
        survey(one(tmp_path))
    put(tmp_path / "all bad", {"bad.txt": b"\xff"})
    with pytest.raises(ValueError, match="all 1 documents were skipped"):
        survey(one(tmp_path / "all bad", undecodable="skip"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 1}', "line 1: field 'text' holds a int"),
        ('{"body": "x"}', r"line 1 has the fields \['body'\] but no field 'text'"),
        ("[1]", "line 1 has a list but no field"),
        ('{"text": "a"}\n{oops', "line 2 is not JSON"),
        ('{"text": "a"}\n' + "[" * 100_000, "line 2 is not JSON"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    ],
)
def test_a_row_that_gives_no_text_is_named(tmp_path, content, message):
    put(tmp_path, {"a.jsonl": content})
    with pytest.raises(ValueError, match=message):
        survey(one(tmp_path / "a.jsonl"))


def test_a_damaged_gzip_file_is_named(tmp_path):
    put(tmp_path, {"a.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 1000)[:40], "b.jsonl.gz": b"no gzip"})
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}\.jsonl\.gz"):
            survey(one(tmp_path / f"{name}.jsonl.gz"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/no/such/place", "no such file or folder; use 'embedded'"),
        ("much*embedded", "'much' before the"),
        ("0*python", "weight=0.0 must be positive"),
    ],
)
def test_a_source_that_cannot_be_is_refused(place, message):
    with pytest.raises(ValueError, match=message):
        sources([place])


def test_settings_that_make_no_sense_are_refused(tmp_path):
    for changes in (dict(undecodable="ignore"), dict(held_out=1.0), dict(max_bytes=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
            sources(["python"], **changes)
    with pytest.raises(ValueError, match="kind='web' is none of"):
        Source(name="x", kind="web")
    with pytest.raises(ValueError, match="share a name"):
        sources(["python", "embedded"])


def test_a_field_stands_behind_the_last_sign_and_folders_may_have_one_too():
    assert parted("a.jsonl#prompt") == ("a.jsonl", "prompt") and parted("a.jsonl") == ("a.jsonl", "")
    assert parted("p#1/a.jsonl#prompt") == ("p#1/a.jsonl", "prompt") and parted("p#1/a.txt") == ("p#1/a.txt", "")


def test_sources_are_written_as_weight_place_and_field(tmp_path):
    put(tmp_path, {"rows.jsonl": "{}", "notes/a.txt": "a"})
    found = sources(["0.5*embedded", f"2*{tmp_path / 'rows.jsonl'}#body", str(tmp_path / "notes"), "hub:org/set:test"])
    assert [(s.name, s.kind, s.weight) for s in found] == [
        ("python", "python", 0.5),
        ("docstrings", "docstrings", 0.5),
        ("reference", "reference", 0.5),
        ("rows.jsonl", "jsonl", 2.0),
        ("notes", "files", None),
        ("org-set", "dataset", None),
    ]
    assert found[3].field == "body" and (found[5].where, found[5].split) == ("org/set", "test")


# ----- held out, limits, fingerprint -----

names = st.frozensets(st.text("abcdef/.", min_size=1, max_size=8), min_size=2, max_size=60)
quick = settings(max_examples=60, deadline=None)


@quick
@given(names=names, share=st.floats(0.001, 0.9))
def test_some_documents_are_held_out_and_some_are_not(names, share):
    held_out = choose_held_out(names, share)
    assert 0 < len(held_out) < len(names) and held_out <= names


@quick
@given(names=names, more=names)
def test_new_documents_never_move_old_ones_to_the_other_part(names, more):
    before, after = choose_held_out(names, 0.4), choose_held_out(names | more, 0.4)
    if len(before) > 1 and len(after) > 1 and len(names - before) > 1:  # else one had to be chosen
        assert after & names == before


def test_the_held_out_share_is_about_what_was_asked():
    held_out = choose_held_out(frozenset(f"file{i}.py" for i in range(4000)), 0.05)
    assert 150 < len(held_out) < 250


@quick
@given(sizes=st.dictionaries(st.text("abc", min_size=1), st.integers(1, 50), max_size=20), limit=st.integers(1, 400))
def test_a_size_limit_is_kept_and_leaves_no_room_for_another_document(sizes, limit):
    kept = within(sizes, limit)
    used = sum(sizes[name] for name in kept)
    assert used <= limit
    assert all(used + size > limit for name, size in sizes.items() if name not in kept)
    assert kept == within(dict(reversed(sizes.items())), limit)


def test_a_limit_below_every_document_is_an_error(tmp_path):
    put(tmp_path, {"a.txt": "x" * 50, "b.txt": "y" * 90})
    with pytest.raises(ValueError, match="max_bytes=10 is below its smallest document, 50 bytes"):
        survey(one(tmp_path, max_bytes=10))
    assert survey(one(tmp_path, max_bytes=60)).train_bytes == 50


def test_the_parts_of_a_corpus_are_all_of_it(tmp_path):
    put(tmp_path, {f"{i}.txt": f"text {i} é" for i in range(50)})
    corpus = survey(one(tmp_path, held_out=0.2))
    parts = {part: {d.name: d.text for d in corpus.documents(part)} for part in ("train", "held_out")}
    assert parts["train"] | parts["held_out"] == texts(one(tmp_path))
    assert not parts["train"].keys() & parts["held_out"].keys()
    assert corpus.train_bytes == sum(len(text.encode()) for text in parts["train"].values())
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in parts["held_out"].values())
    assert survey(one(tmp_path, held_out=0)).held_out == frozenset()


def test_the_fingerprint_follows_names_texts_and_the_split(tmp_path):
    files = {f"{i}.txt": f"text {i}" for i in range(20)}
    first = survey(one(put(tmp_path / "a", files))).fingerprint
    assert survey(one(put(tmp_path / "b", files))).fingerprint == first
    others = [
        survey(one(put(tmp_path / "c", files | {"3.txt": "changed"}))),
        survey(one(put(tmp_path / "d", {f"{i}.md": f"text {i}" for i in range(20)}))),
        survey(one(tmp_path / "a", held_out=0.5)),
        survey(one(tmp_path / "a", max_bytes=100)),
    ]
    assert len({first, *(corpus.fingerprint for corpus in others)}) == 5


# ----- the embedded text -----


def test_the_embedded_text_is_there_and_leaves_out_what_differs_between_machines():
    code = dict(embedded.code())
    assert {"json/decoder.py", "heapq.py", "asyncio/queues.py"} <= code.keys()
    folders = {part for name in code for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "encodings", "site-packages", "pydoc_data"}
    assert not any(name.startswith("_sysconfigdata") for name in code)
    assert 4e6 < sum(map(len, code.values())) < 4e7


def test_docstrings_stand_under_the_names_of_what_they_describe():
    text = '"""About the module."""\nclass A:\n    """An A."""\n    def f(self):\n        """Do\n\n        it."""\n'
    text += 'if True:\n    def g(): "Go."\n'
    prose = embedded.module_prose("pkg/mod.py", text)
    assert (
        prose == "pkg.mod\n\nAbout the module.\n\npkg.mod.A\n\nAn A.\n\npkg.mod.A.f\n\nDo\n\nit.\n\npkg.mod.g\n\nGo.\n"
    )
    assert embedded.module_prose("pkg/__init__.py", '"x"').startswith("pkg\n")
    assert embedded.module_prose("old.py", "print 'x'") == ""


def test_prose_is_held_out_exactly_when_its_code_is(monkeypatch):
    few = embedded.code()[:120]
    monkeypatch.setattr(embedded, "code", lambda: few)
    monkeypatch.setitem(EMBEDDED, "python", embedded.code)
    monkeypatch.setitem(EMBEDDED, "docstrings", embedded.docstrings.__wrapped__)
    code, prose, reference = map(survey, sources(["embedded"]))
    assert prose.held_out == code.held_out & (prose.train | prose.held_out)
    assert len(prose.train) > 60 and len(reference.train) > 50 and prose.held_out and reference.held_out
    assert code.python.endswith(".".join(map(str, sys.version_info[:3])))


def test_the_embedded_text_is_the_same_in_another_process():
    program = "from nautilus.data.corpus import *; print(survey(*sources(['python'])).fingerprint)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert found.stdout.strip() == survey(*sources(["python"])).fingerprint


def test_a_name_that_is_no_utf8_is_spelt_so_that_it_can_be_written(tmp_path):
    put(tmp_path, {"a.txt": "a"})
    (tmp_path / os.fsdecode(b"b\xff.txt")).write_text("b")
    assert texts(one(tmp_path)) == {"a.txt": "a", "b\\xff.txt": "b"}
    assert survey(one(tmp_path / os.fsdecode(b"b\xff.txt"))).train == {"b\\xff.txt:000000"}


def test_a_folder_that_may_not_be_read_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # folders above it may not be entered
    put(tmp_path, {"a.txt": "a", "secret/b.txt": "b"})
    tmp_path.chmod(0o755)
    (tmp_path / "secret").chmod(0)
    us = os.geteuid()
    if us == 0:
        os.seteuid(65534)  # root may read anything
    try:
        with pytest.raises(ValueError, match=r"cannot read all of .*: Permission denied \(.*secret\); change its"):
            texts(Source(name="s", kind="files", where="."))
    finally:
        os.seteuid(us)
        (tmp_path / "secret").chmod(0o755)
