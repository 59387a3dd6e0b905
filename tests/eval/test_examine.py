import pytest

from nautilus.eval.examine import complete_card
from nautilus.runtime import Run


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/home/somebody/texts", "texts"),
        ("0.5*/home/somebody/texts#field", "0.5*texts#field"),
        ("~/texts", "texts"),
        ("C:\\Users\\somebody\\texts", "texts"),
        ("texts/web", "texts/web"),
        ("hub:owner/name", "hub:owner/name"),
    ],
)
def test_a_card_names_no_folders_of_the_machine(tmp_path, place, said):
    run = Run.create(tmp_path / "run", {"out": "/home/somebody/run", "from_": place, "data": [place], "steps": 3})
    run.model.mkdir()
    (run.model / "README.md").write_text("# Model card\n")
    complete_card(run, None)
    card = (run.model / "README.md").read_text()
    assert f"| from | {said} |" in card and f"| data.0 | {said} |" in card and "| steps | 3 |" in card
    assert "somebody" not in card
