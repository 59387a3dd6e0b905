"""README and docs say what is true: their code runs, their links and files exist, their lists are complete."""

import contextlib
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import nautilus
from nautilus.cli import main
from nautilus.cli.command import COMMANDS

PACKAGE = pathlib.Path(nautilus.__file__).parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

SOURCES = (".py", ".cpp", ".h", ".html", ".js", ".css")


def page_name(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks whose first line says `run`."""
    return [(language, code) for language, run, code in FENCE.findall(page.read_text()) if run]


def prose(page: pathlib.Path) -> str:
    return FENCE.sub("", page.read_text())


# ----- code that runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which `make demo` could have run: a small runs/demo, and the command where the Makefile puts it."""
    here = tmp_path_factory.mktemp("docs")
    (here / "text").mkdir()
    for number in range(20):
        (here / "text" / f"{number}.txt").write_text(f"def part_{number}(path):\n    return {number}\n" * 30)
    small = "steps=2 rows=1 micro=1 length=48 optim.warmup=0 optim.decay=0.5 model.vocab=400 prompts=a answers=false"
    assert main(["demo", f"data={here / 'text'}", f"out={here / 'runs' / 'demo'}", *small.split()]) == 0
    command = here / ".venv" / "bin" / "nautilus"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nautilus "$@"\n')
    command.chmod(0o755)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_name)
def test_code_that_says_it_runs_does(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict = {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page_name(page), "exec"), names)
            continue
        assert language == "console", f"{page_name(page)}: a block in {language!r} cannot be run; use python or console"
        for line in code.splitlines():
            if line.startswith("$ "):
                environment = os.environ | {"PYTHONPATH": str(ROOT)}
                done = subprocess.run(line[2:], shell=True, capture_output=True, text=True, env=environment)
                assert done.returncode == 0, f"{page_name(page)}: {line}\n{done.stderr}"


def test_a_block_that_runs_is_told_from_one_that_does_not(tmp_path):
    (tmp_path / "page.md").write_text("```python run\na = 1\n```\ntext\n```python\nb\n```\n```console run\n$ ls\n```\n")
    assert blocks(tmp_path / "page.md") == [("python", "a = 1\n"), ("console", "$ ls\n")]
    assert "a = 1" not in prose(tmp_path / "page.md") and "text" in prose(tmp_path / "page.md")


def test_the_readme_has_code_that_runs():
    assert {language for language, _ in blocks(ROOT / "README.md")} == {"python", "console"}


# ----- links and files -----------------------------------------------------------------------------------------------


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def named_files(text: str) -> set[str]:
    """The files that a text names in backticks, relative to the root."""
    quoted = " ".join(re.findall(r"`([^`]+)`", text))
    return set(re.findall(r"(?<![\w/.<{])(?:nautilus|tests|docs|benchmarks|records)/[\w/.-]*\w\.\w+", quoted))


def test_every_file_that_the_papers_page_names_exists():
    page = ROOT / "docs" / "papers.md"
    absent = set()
    for line in prose(page).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not cells[1].startswith("not yet"):
            absent |= {name for name in named_files(line) if not (ROOT / name).exists()}
    assert sorted(absent) == []


def commands_of_the_papers() -> list[str]:
    """What the rows' third cells tell to run."""
    found = []
    for line in prose(ROOT / "docs" / "papers.md").splitlines():
        cells = line.replace("`|", "` |").strip("|").split(" | ")
        if line.startswith("|") and len(cells) >= 4:
            found += re.findall(r"`([^`]+)`", cells[-2])
    return found


def fault_of_command(command: str) -> str:
    """Why a command could not be run as it stands; empty if it could."""
    program, *words = shlex.split(command)
    if program == "nautilus":
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            return said.getvalue() if main([*words, "--show"] if "--show" not in words else words) else ""
    absent = []
    for word in words:
        place, _, name = word.partition("::")
        if not re.match(r"(tests|benchmarks)/", word):
            continue
        if not (ROOT / place).exists() or (name and f"\ndef {name}(" not in (ROOT / place).read_text()):
            absent.append(word)
    known = program == "pytest" or (program == "python" and bool(words))
    return f"no {', '.join(absent)}" if absent else "" if known else f"no program {program}"


def test_every_command_of_the_papers_page_can_be_given():
    assert len(commands_of_the_papers()) > 80
    faults = {command: fault for command in commands_of_the_papers() if (fault := fault_of_command(command))}
    assert faults == {}


def test_commands_that_cannot_be_given_are_found_out():
    assert "no command" in fault_of_command("nautilus pretrane")
    assert "no setting" in fault_of_command("nautilus pretrain toy stepps=3")
    assert fault_of_command("pytest tests/test_docs.py tests/test_nothing.py") == "no tests/test_nothing.py"
    assert fault_of_command("pytest tests/test_docs.py::test_nothing") == "no tests/test_docs.py::test_nothing"
    assert fault_of_command("make things") == "no program make"


def test_rows_of_the_papers_page_have_all_cells():
    for line in prose(ROOT / "docs" / "papers.md").splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.sub(r"`[^`]*`", "code", line).strip("|").split("|")]
            assert len(cells) == 4 and all(cells), line


def tour_files() -> set[str]:
    """The files in the first column of the tour's tables, below `nautilus/`."""
    found = set()
    for line in prose(ROOT / "docs" / "tour.md").split("## Every file")[1].split("\n## ")[0].splitlines():
        if line.startswith("| `"):
            found |= {name.removeprefix("nautilus/") for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    return found


def test_the_tour_lists_every_file_of_the_package_and_no_other():
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.suffix in SOURCES}
    files = {name for name in files if not name.endswith("/__init__.py")}
    assert sorted(files - tour_files()) == [], "files without a line in the tour"
    assert sorted(tour_files() - files) == [], "lines of the tour without a file"


def test_the_tour_shows_the_ladder_that_is_tested():
    source = (ROOT / "tests" / "test_ladder.py").read_text()
    tested = re.findall(r'"(\w+)"', source.split("LADDER = [")[1].split("]")[0])
    shown = re.findall(r"^config → .*$", (ROOT / "docs" / "tour.md").read_text(), re.MULTILINE)
    assert [re.findall(r"\w+", line) for line in shown] == [[name for name in tested if name != "__main__"]]


# ----- the command table ---------------------------------------------------------------------------------------------


def test_the_readme_lists_the_commands_as_the_command_does():
    rows = re.findall(r"^\| `nautilus ([\w ]+)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [(name, command.help) for name, command in COMMANDS.items()]
