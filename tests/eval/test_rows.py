"""Files that are not what they should be are told with their name and line."""

import pytest

from nautilus.eval.public_sets import read_set
from nautilus.runtime import UserError


@pytest.mark.parametrize("text, what", [
    ('[{"question": "a"},\n {"question": }]', r"a\.json line 2 is not JSON"),
    ("[1, 2]", r"a\.json entry 1 holds a int"),
    ("[" * 100_000, r"a\.json is not JSON"),
    ("[]", r"a\.json has no prompt of gsm8k"),
])  # fmt: skip
def test_a_damaged_json_file(tmp_path, text, what):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=what):
        [*read_set("gsm8k", tmp_path / "a.json")]


@pytest.mark.parametrize("text, what", [
    ('id,article,highlights\n1,"a\nb",c\n2,b\n', "line 4 has another number of fields"),
    ("id,article,highlights\n1,a,b,c\n", "line 2 has another number of fields"),
    ('id,article,highlights\n1,"a"x,b\n', "line 2 is not CSV"),
])  # fmt: skip
def test_a_damaged_csv_file(tmp_path, text, what):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=what):
        [*read_set("cnn_dailymail", tmp_path / "a.csv")]


def test_other_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff", "answer": "a"}')
    with pytest.raises(UserError, match=r"a\.jsonl: byte 14 .* is not UTF-8"):
        [*read_set("gsm8k", tmp_path / "a.jsonl")]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet after row 0"):
        [*read_set("govreport", tmp_path / "a.parquet")]
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"a\.txt is none of \.jsonl"):
        [*read_set("gsm8k", tmp_path / "a.txt")]
    with pytest.raises(UserError, match=r"has no file named alpaca\*\.json"):
        [*read_set("alpaca", tmp_path)]
    with pytest.raises(UserError, match=r"no set of prompts is called 'gsm9k'"):
        [*read_set("gsm9k", tmp_path)]
