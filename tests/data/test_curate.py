"""Curation: planted faults are found, cuts of the input and of the work change nothing."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import types

import pytest

from nautilus.data import curate as module
from nautilus.data.card import curated_card
from nautilus.data.curate import Plan, curate, marker
from nautilus.data.pieces import plan, read_piece
from nautilus.data.tally import Tally, together
from nautilus.runtime import Run, UserError

pytest.importorskip("datatrove")
from nautilus.data import screen  # noqa: E402

COMMON = "the of and to in that it was for on are as with they at be this from have by".split()


def pages(count: int, seed: int = 0) -> list[str]:
    """Prose that passes every filter, each page unlike the others."""
    rng = random.Random(seed)
    rare = ["".join(rng.choices("aeioulnrst", k=rng.randint(4, 9))) for _ in range(4000)]
    found = []
    for _ in range(count):
        lines = [" ".join(rng.choices(rare, k=7) + rng.choices(COMMON, k=5)) for _ in range(12)]
        found.append("\n".join(line.capitalize() + "." for line in lines))
    return found


def write_jsonl(path, texts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def curated(run: Run) -> list[str]:
    found = []
    for path in sorted((run.folder / "text").iterdir()):
        found += [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]
    return found


@pytest.fixture
def here(monkeypatch):
    """Tasks in this process, in order: no start of workers to wait for."""

    class Done:
        def __init__(self, value):
            self.result = lambda: value

    class Pool:
        def __init__(self, job, workers):
            module.HELD["job"] = job

        def __enter__(self):
            return lambda function, *words: Done(function(*words))

        def __exit__(self, *error):
            module.HELD.clear()

    monkeypatch.setattr(module, "pool", Pool)
    monkeypatch.setattr(module, "as_completed", list)
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_planted_faults_are_all_found_and_nothing_else(here, tmp_path):
    good, secret = pages(120), pages(3, seed=9)
    near = [good[7].replace("the", "a", 1), good[8] + "\nOne more line that is short."]
    stolen = good[50] + "\n" + " ".join(secret[0].split()[20:36])
    code = good[51] + "\n" + secret[1].replace("\n", " ")[100:151].replace(" ", "  ").upper()
    faults = {
        "exact duplicate": [good[3], good[100]],
        "near duplicate": near,
        "contaminated": [stolen, code],
        "quality": [" ".join(word for word in pages(1, seed=5)[0].lower().split() if word.strip(".") not in COMMON)],
        "repetition": ["\n".join(["the same line of the text that was there and is to be with"] * 20)],
        "c4": [good[60] + "\nif (x) { lorem }"],
    }
    write_jsonl(tmp_path / "in" / "a.jsonl", good[:80] + faults["c4"] + faults["near duplicate"])
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", good[80:] + faults["exact duplicate"] + faults["repetition"])
    write_jsonl(tmp_path / "in" / "c.jsonl", faults["contaminated"] + faults["quality"])
    write_jsonl(tmp_path / "sets" / "exam.jsonl", [*secret, "hi"])
    run = Run.create(tmp_path / "out", {})
    asked = Plan(data=(str(tmp_path / "in"),), against=(str(tmp_path / "sets"),), task_bytes=20_000)
    result = curate(run, asked)
    assert {stage: result.dropped.total(stage)[0] for stage in result.dropped.dropped} == {
        stage: len(texts) for stage, texts in faults.items()
    }
    reasons = result.dropped.dropped["contaminated"]
    assert set(reasons) == {"1-sets, 13 words", "1-sets, 50 bytes"}
    left = curated(run)
    # Of a pair that is nearly the same one stays, and either may.
    unsure = set(good[7:9]) | set(near)
    assert set(left) - unsure == set(good) - unsure and len(left) == 120
    assert result.before.documents == 130 - 1 == result.after.documents + sum(map(len, faults.values()))
    assert result.before.bytes == result.after.bytes + result.before.edited_bytes + sum(
        result.dropped.total(stage)[1] for stage in faults
    )
    assert result.sets is not None and result.sets.total("too short to be found")[0] == 1
    card = curated_card(result, {"filters": asked.filters})
    assert "| contaminated | 1-sets, 13 words | 1 |" in card and "120 documents" in card
    assert not (run.state / "kept").exists()


def test_the_text_does_not_depend_on_how_the_input_is_cut(here, tmp_path):
    texts = pages(60)
    write_jsonl(tmp_path / "in.jsonl", [*texts, *texts[:20]])
    left = []
    for size in (9000, 1 << 24):
        run = Run.create(tmp_path / f"out-{size}", {})
        curate(run, Plan(data=(str(tmp_path / "in.jsonl"),), task_bytes=size))
        left.append(sorted(curated(run)))
    assert left == [sorted(texts)] * 2


def test_numbers_are_words_like_others_to_the_search_for_copies(here, tmp_path):
    rng = random.Random(1)
    texts = [" ".join(str(rng.randrange(100_000, 1_000_000)) for _ in range(200)) for _ in range(5)]
    write_jsonl(tmp_path / "in.jsonl", [*texts, texts[0] + " 7"])
    run = Run.create(tmp_path / "out", {})
    curate(run, Plan(data=(str(tmp_path / "in.jsonl"),), filters=()))
    left = curated(run)
    assert len(left) == 5 and set(texts[1:]) <= set(left)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_every_row_is_in_exactly_one_piece(tmp_path, size):
    texts = ["a", "", "ä" * 30, "longer than most", "\u2028line", "z"]
    write_jsonl(tmp_path / "rows.jsonl", texts)
    tasks, _ = plan([str(tmp_path / "rows.jsonl")], size)
    found = [raw for task in tasks for piece in task for raw in read_piece(piece, "error")]
    assert [raw.text for raw in found] == texts and len({raw.name for raw in found}) == len(texts)


def test_all_kinds_of_files_are_read_and_others_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_jsonl(tmp_path / "in" / "a.jsonl.gz", ["one"])
    parquet.write_table(pyarrow.table({"text": ["two", "three"]}), tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "c.txt").write_text("four")
    (tmp_path / "in" / "d.html").write_text("<p>five")
    (tmp_path / "in" / "e.png").write_bytes(b"\x89PNG")
    (tmp_path / "in" / "f.txt").write_bytes(b"\xff")
    tasks, skipped = plan([str(tmp_path / "in")], 1)
    found = [raw for task in tasks for piece in task for raw in read_piece(piece, "skip")]
    assert [raw.text for raw in found] == ["one", "two", "three", "four", "<p>five", None]
    assert [raw.html for raw in found] == [False] * 4 + [True, False]
    assert [os.path.basename(name) for name in skipped] == ["e.png"]
    with pytest.raises(UserError, match="but not 'body'"):
        tasks, _ = plan([str(tmp_path / "in" / "b.parquet") + "#body"], 1)
        list(read_piece(tasks[0][0], "skip"))


def test_libraries_that_are_not_here_are_named_with_their_extra(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("<p>Text.</p>")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "trafilatura" else object())
    with pytest.raises(UserError, match=r"'trafilatura'; .*pip install .*\[html\]'"):
        curate(Run.create(tmp_path / "out", {}), Plan(data=(str(tmp_path / "page.html"),)))
    with pytest.raises(UserError, match="nothing to curate"):
        curate(Run.create(tmp_path / "none", {}), Plan())
    with pytest.raises(UserError, match="filters has spam"):
        Plan(filters=("spam",))


def test_pages_are_extracted_with_a_limit_of_time_and_faults_are_counted(here, tmp_path, monkeypatch):
    good = pages(3)
    (tmp_path / "in").mkdir()
    for number, text in enumerate(good):
        (tmp_path / "in" / f"{number}.html").write_text(f"<p>{text}</p>")
    for name in ("slow", "broken", "none"):
        (tmp_path / "in" / f"{name}.html").write_text(name)

    def extract(page):
        if page == "slow":
            time.sleep(5)
        if page == "broken":
            raise ValueError(page)
        return page.removeprefix("<p>").removesuffix("</p>") if page != "none" else None

    monkeypatch.setattr(module, "need", lambda asked: None)
    monkeypatch.setattr(screen, "extractor", lambda: extract)
    monkeypatch.setattr(screen, "SECONDS", 0.2)
    run = Run.create(tmp_path / "out", {})
    result = curate(run, Plan(data=(str(tmp_path / "in"),)))
    assert sorted(curated(run)) == sorted(good)
    assert {reason: count for reason, (count, _) in result.dropped.dropped["extraction"].items()} == {
        "took over 0.2 s": 1,
        "failed: ValueError": 1,
        "no text found": 1,
    }


def test_real_pages_lose_their_tags(here, tmp_path):
    pytest.importorskip("trafilatura")
    body = "".join(f"<p>{line}</p>" for line in pages(1)[0].split("\n"))
    (tmp_path / "a.html").write_text(f"<html><nav>Home</nav><article>{body}</article></html>")
    run = Run.create(tmp_path / "out", {})
    curate(run, Plan(data=(str(tmp_path / "a.html"),)))
    assert curated(run) == pages(1)


def test_languages_are_told_apart_by_the_identifier(here, tmp_path, monkeypatch):
    good = pages(2)
    write_jsonl(tmp_path / "in.jsonl", good)
    kinds = {good[0]: "en", good[1]: "de"}
    fake = types.SimpleNamespace(classify=lambda text: (kinds[text], 0.0))
    monkeypatch.setitem(sys.modules, "py3langid", fake)
    monkeypatch.setattr(module, "need", lambda asked: None)
    run = Run.create(tmp_path / "out", {})
    result = curate(run, Plan(data=(str(tmp_path / "in.jsonl"),), languages=("de",)))
    assert curated(run) == good[1:] and result.dropped.dropped["language"] == {"en": [1, len(good[0])]}


def test_the_real_identifier_knows_common_languages():
    pytest.importorskip("py3langid")
    language = screen.identifier()
    assert language("This is a sentence about the weather of last week.") == "en"
    assert language("Das ist ein Satz über das Wetter der letzten Woche.") == "de"


def test_text_that_changed_under_a_curation_is_refused(here, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", pages(3))
    run = Run.create(tmp_path / "out", {})
    curate(run, Plan(data=(str(tmp_path / "in.jsonl"),)))
    write_jsonl(tmp_path / "in.jsonl", pages(4))
    with pytest.raises(UserError, match="text has changed"):
        curate(run, Plan(data=(str(tmp_path / "in.jsonl"),)))


def test_signatures_in_parts_are_those_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "SHINGLES", 5)
    whole = screen.MinhashDedupSignature(str(tmp_path), screen.MINHASH, language=screen.WORDS)
    parts = screen.Signatures(str(tmp_path), screen.MINHASH, language=screen.WORDS)
    shingles = whole.get_shingles(pages(1)[0])
    assert len(shingles) > 100 and parts.get_signature(shingles) == whole.get_signature(shingles)


def test_words_and_sentences():
    assert screen.WORDS.word_tokenize("It's 3.5 -- no, naïve!") == [
        "It's",
        "3",
        ".",
        "5",
        "--",
        "no",
        ",",
        "naïve",
        "!",
    ]
    assert screen.WORDS.sent_tokenize("One. Two?! “Three.” four") == ["One.", "Two?!", "“Three.”", "four"]


def test_tallies_add_up():
    one, two = Tally(documents=1, bytes=2), Tally()
    two.drop("c4", "x", "name", "text")
    one.drop("c4", "x", "first", "é", shown="shown")
    whole = together([one, two])
    assert whole.dropped == {"c4": {"x": [2, 6]}} and whole.total("c4") == (2, 6)
    assert whole.examples == {"c4": {"x": [["first", "shown"], ["name", "text"]]}}
    assert one.dropped == {"c4": {"x": [1, 2]}}


# ----- killed --------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from nautilus.data.curate import Plan, curate
from nautilus.runtime import Run
if __name__ == "__main__":
    where = sys.argv[2]
    run = Run.open(where) if Run(where).config.exists() else Run.create(where, {})
    curate(run, Plan(data=(sys.argv[1],), task_bytes=20000, workers=1))
"""


def workers_of(pid: int) -> list[int]:
    """The processes below this one, by /proc."""
    below = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                below += [int(entry), *workers_of(int(entry))]
    return below


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_curation_that_is_killed_again_and_again_gives_the_same_bytes(tmp_path):
    texts = pages(150)
    write_jsonl(tmp_path / "in.jsonl", [*texts, *texts[::9], *(text + "\nMore of the same." for text in texts[::7])])
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "in.jsonl")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([*words, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    total = len(list((whole.state / "done").iterdir()))
    kills = 0
    for stop in (1, total // 4, total // 2, total - 3, None):
        process = subprocess.Popen([*words, str(broken.folder)], env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and (stop is None or not has_markers(broken, stop)):
            time.sleep(0.002)
        if stop is not None and process.poll() is None:
            below = workers_of(process.pid)
            process.send_signal(signal.SIGKILL)
            kills += 1
            deadline = time.monotonic() + 20
            while any(alive(pid) for pid in below) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not any(alive(pid) for pid in below), "a worker outlived its parent"
        process.communicate()
    assert kills >= 3 and process.returncode == 0
    names = sorted(path.name for path in (whole.folder / "text").iterdir())
    assert names and names == sorted(path.name for path in (broken.folder / "text").iterdir())
    for name in names:
        assert (whole.folder / "text" / name).read_bytes() == (broken.folder / "text" / name).read_bytes()
    assert (whole.folder / "curation.json").read_bytes() == (broken.folder / "curation.json").read_bytes()


def has_markers(run: Run, count: int) -> bool:
    folder = marker(run, "screen", 0).parent
    return folder.is_dir() and sum(path.suffix == ".json" for path in folder.iterdir()) >= count


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
