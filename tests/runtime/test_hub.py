"""What happens when a model is asked for that is no folder here. No test reaches the hub."""

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from nautilus.runtime import UserError, hub, hub_folder


class Hub:
    """Stands in for the hub: `answer` to the first question, `files` to a download; notes what was asked."""

    def __init__(self, answer=None, files="/copy"):
        self.answer, self.files, self.asked = answer, files, []

    def model_info(self, name, *, timeout):
        self.asked.append((name, timeout))
        if self.answer:
            raise self.answer

    def snapshot_download(self, name, *, allow_patterns, local_files_only):
        self.asked.append((name, allow_patterns, local_files_only))
        if isinstance(self.files, Exception):
            raise self.files
        return self.files


@pytest.fixture
def stands_in(monkeypatch):
    def put(found):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
        return found

    return put


def test_the_hub_is_asked_once_and_briefly_before_files_are_fetched(stands_in):
    found = stands_in(Hub())
    assert str(hub_folder("owner/name", ["*.json"])) == "/copy"
    assert found.asked == [("owner/name", hub.PATIENCE), ("owner/name", ["*.json"], False)]
    assert hub.PATIENCE <= 5


def test_without_the_hub_an_earlier_copy_serves(stands_in):
    found = stands_in(Hub(answer=ConnectionError("no route")))
    assert str(hub_folder("owner/name", ["*.json"])) == "/copy" and found.asked[-1][-1] is True


@pytest.mark.parametrize(
    "answer,message",
    [
        (ConnectionError("no route\nand a long tail"), r"could not be reached \(ConnectionError: no route\)"),
        (TimeoutError(), r"could not be reached \(TimeoutError: \)"),
        (HFValidationError("no such name"), r"refused it \(HFValidationError: no such name\)"),
    ],
)
def test_with_neither_the_message_says_both(stands_in, answer, message):
    stands_in(Hub(answer=answer, files=LocalEntryNotFoundError("not in the cache")))
    with pytest.raises(UserError, match=f"no folder 'no/such' here, and the hub {message}; check the name") as caught:
        hub_folder("no/such", ["*.json"])
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off_is_one_message(stands_in):
    stands_in(Hub(files=OSError("connection lost")))
    with pytest.raises(UserError, match=r"the hub could not be reached \(OSError: connection lost\)"):
        hub_folder("owner/name", ["*.json"])


@pytest.mark.timeout(30)
def test_a_hub_that_takes_the_call_and_says_nothing_is_given_up(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(hub, "PATIENCE", 0.2)
        begin = time.monotonic()
        with pytest.raises(UserError, match="no folder 'no/such' here, and the hub could not be reached .*Timeout"):
            hub_folder("no/such", ["*.json"])
        assert time.monotonic() - begin < 4


def test_what_looks_like_a_path_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no folder 'runs/dmeo', though 'runs' is there; check the name"):
        hub_folder("runs/dmeo", ["*.json"])
    with pytest.raises(UserError, match="neither a folder nor the id of a hub repository"):
        hub_folder("/no/such/folder", ["*.json"])
