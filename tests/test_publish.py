"""`nautilus publish`, with the hub's client replaced at its boundary."""

import types

import huggingface_hub
import pytest

from nautilus.cli import main
from nautilus.config import to_dict
from nautilus.data import embedded
from nautilus.data.tokenizer import train_tokenizer
from nautilus.model.language import Language
from nautilus.presets import preset


@pytest.fixture(scope="module")
def trained():
    config = preset("toy")
    return Language(config).initialise(0), train_tokenizer(
        [text for _, text in embedded.code()[:3]], vocab=config.vocab
    )


@pytest.fixture
def folder(trained, tmp_path):
    model, tokenizer = trained
    model.save(tmp_path / "model", precision="bf16", tokenizer=tokenizer)
    (tmp_path / "model" / ".secret").write_text("a token")
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "note").write_text("a note")
    (tmp_path / "model" / "a[b].txt").write_text("a name that looks like a pattern")
    return tmp_path / "model"


class Hub:
    """What the client is asked to do; an upload fails as often as `failures` says."""

    def __init__(self):
        self.calls, self.failures = [], 0

    def create_repo(self, repo, **how):
        self.calls.append(("create", repo, how))

    def upload_folder(self, **how):
        self.calls.append(("upload", how.pop("repo_id"), how))
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the line was cut")
        return types.SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return found


def sent(hub, folder) -> set[str]:
    """The files that the patterns of the last upload match, by the client's own matching."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    patterns = hub.calls[-1][2]["allow_patterns"]
    return set(huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=patterns))


def test_a_whole_folder_is_sent_without_its_hidden_files(hub, folder, capsys):
    assert main(["publish", str(folder), "repo=me/toy"]) == 0
    assert "published: https://hub/commit/1" in capsys.readouterr().out
    assert hub.calls[0] == ("create", "me/toy", {"private": True, "exist_ok": True})
    files = sent(hub, folder)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "a[b].txt"} <= files
    assert not any(name.startswith(".") for name in files)


def test_a_dry_run_shows_what_would_be_sent_and_asks_nobody(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["publish", str(folder), "repo=me/toy", "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "nothing was sent" in shown and ".secret" not in shown
    assert hub.calls == []


def test_without_a_token_nothing_is_sent(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["publish", str(folder), "repo=me/toy"]) == 2
    assert "hf auth login" in capsys.readouterr().err and hub.calls == []


def test_a_cut_line_says_that_the_same_command_goes_on(hub, folder, capsys):
    hub.failures = 1
    assert main(["publish", str(folder), "repo=me/toy"]) == 2
    message = capsys.readouterr().err
    assert "could not be reached" in message and "the line was cut" in message and "not sent twice" in message
    assert main(["publish", str(folder), "repo=me/toy"]) == 0
    assert [call[0] for call in hub.calls] == ["create", "upload"] * 2


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (lambda folder: (folder / "README.md").unlink(), "needs a card"),
        (lambda folder: (folder / "README.md").write_text("# Model"), "block of ---"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: cut(folder / "model.safetensors"), "no complete safetensors file"),
    ],
)
def test_a_folder_that_others_could_not_open_is_refused(hub, folder, capsys, harm, complaint):
    harm(folder)
    assert main(["publish", str(folder), "repo=me/toy"]) == 2
    assert complaint in capsys.readouterr().err and hub.calls == []


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_config_of_other_sizes_than_the_tensors_is_refused(hub, folder, capsys, trained):
    text = (folder / "config.json").read_text()
    width = to_dict(trained[0].config)["width"]
    (folder / "config.json").write_text(text.replace(f'"hidden_size": {width}', f'"hidden_size": {2 * width}'))
    assert main(["publish", str(folder), "repo=me/toy"]) == 2
    assert hub.calls == []


@pytest.mark.parametrize("words", [["repo=me/toy"], ["nowhere", "repo=me/toy"], ["{folder}", "repo=toy"], ["{folder}"]])
def test_names_that_cannot_be_are_refused(hub, folder, words, capsys):
    assert main(["publish", *(word.format(folder=folder) for word in words)]) == 2
    assert "nautilus:" in capsys.readouterr().err and hub.calls == []
