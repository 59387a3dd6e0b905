import math

import pytest

from nautilus.eval.made import prompts
from nautilus.eval.structure import coded, copied


def test_copied_is_the_share_of_words_in_runs_of_the_prompt():
    assert copied("a b c d e", "a b c d e") == 1 and copied("a b c d e", "e d c b a") == 0
    assert copied("one two three four five", "so one two three four") == 4 / 5
    assert copied("one two three, four", "one two three four") == 0
    assert math.isnan(copied("a b c d", " \n"))


@pytest.mark.parametrize("text, share", [
    ('{"name": "Ann",\n"age": 7}', 1), ("def add(a, b):\n    return a + b", 1), ("SELECT name FROM singer", 1),
    ("At dawn she finds it, and so on.\nWhy not? He said no.", 0), ("It is late.\nx = 1", 3 / 12),
])  # fmt: skip
def test_coded_is_the_share_of_characters_in_lines_of_code(text, share):
    assert coded(text) == pytest.approx(share)


def test_families_differ_as_they_should():
    """Edited files stand in their prompts, stories do not; programs are code, facts in a row are not."""
    mean = lambda family, of: sum(map(of, prompts(family, 8))) / 8
    answered = lambda one: copied(one.prompt, one.reference)
    assert mean("agentic", answered) > 0.75 and mean("open", answered) < 0.1
    assert mean("code", lambda one: coded(one.prompt)) > 0.5 and mean("multihop", lambda one: coded(one.prompt)) < 0.1
    assert math.isnan(coded(""))
