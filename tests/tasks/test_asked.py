"""Tasks as a command line names them."""

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import Reply
from nautilus.tasks.asked import asked


def test_a_task_of_ones_own_is_the_class_in_a_file_as_the_docs_have_it(tmp_path):
    docs = (Path(__file__).parents[2] / "docs" / "posttraining.md").read_text()
    (code,) = re.findall(r"```python\n(.*?class Even.*?)```", docs, re.DOTALL)
    (path := tmp_path / "mine.py").write_text(code)
    one = asked(f"task@{path}#Even:2-3*0.5")
    assert [*one.levels] == [2, 3] and one.share == 0.5 and asked(f"task@{path}").task.name == "even"
    for problem in islice(one.task.problems("train", level=2), 20):
        assert one.task.grade(problem, Reply(content=problem.worked[0]["content"])).reward == 1
        assert one.task.grade(problem, Reply(content="maybe")).reward == 0
    packed = pytest.importorskip("cloudpickle").dumps(one.task)
    told = "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"
    assert subprocess.run([sys.executable, "-c", told], input=packed, stdout=subprocess.PIPE).stdout == b"even\n"
    for text, words in (
        ("import none_such", "ModuleNotFoundError: No module named 'none_such'"), ("x = 1", "no class that is a Task"),
        (code + code.replace("Even", "Odd"), "there is Even, Odd"), ("class", "SyntaxError"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            asked(f"task@{path}")
    with pytest.raises(UserError, match="could not be read: FileNotFoundError"):
        asked(f"task@{tmp_path / 'none.py'}")
