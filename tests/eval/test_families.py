import json
from typing import Any

import pytest

from nautilus.eval.families import FAMILIES, PAPER, Prompt, chosen
from nautilus.eval.public_sets import SETS, read_set


def test_all_sixteen_sets_of_the_paper_can_be_read():
    assert len(PAPER) == 16 and set(PAPER) <= set(SETS) and set(PAPER.values()) == set(FAMILIES)


def test_long_prompts_are_left_out_and_the_chosen_ones_do_not_depend_on_the_others(tmp_path):
    rows = [{"question": "why " * n, "answer": "a"} for n in range(1, 41)]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    every = [*read_set("gsm8k", path)]
    short = [*read_set("gsm8k", path, longest=100)]
    assert len(short) == 20 and short == every[:20] and [*read_set("gsm8k", path, longest=1)] == []
    few = chosen(every, 5)
    assert few == chosen(reversed(every), 5) != chosen(every, 5, seed=1) and few == chosen(every, 10)[:5]
    assert set(one.id for one in few) <= set(one.id for one in chosen(every[:39], 6)) | {every[39].id}


def test_a_prompt_is_a_text_or_a_chat():
    base: dict[str, Any] = {"id": "1", "family": "open", "set": "s"}
    wrong: list[dict[str, Any]] = [
        {},
        {"prompt": "a", "messages": ({"role": "user", "content": "a"},)},
        {"prompt": "a", "family": "x"},
    ]
    for more in wrong:
        with pytest.raises(ValueError, match="is no family, or not one of prompt and messages"):
            Prompt(**(base | more))
