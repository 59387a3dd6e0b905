"""Saved states as files: all come back after a restart, and no file is believed in which a bit is another."""

import errno
import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nautilus.runtime import UserError
from nautilus.serve import spill
from nautilus.serve.saved import DISK_SECONDS_PER_MIB, Saved
from nautilus.serve.spill import KEY, PARTIAL, BadFile, Folder
from tests.serve.disagreements import disagreements
from tests.serve.shelf import Pool, compute

torch.set_num_threads(1)
LIMIT = 1 << 20
PROMPT = [5, 3, 5, 1, 2]


class House:
    """A server that may be started again; whatever it held in memory is lost then."""

    def __init__(self, place):
        self.place, self.saved = place, None

    def start(self, *, pages=64, budget=1 << 20, limit=LIMIT, model="m", numerics="1", everywhere=False):
        self.stop()
        folder = Folder(self.place, model=model, numerics=numerics, limit=limit)
        self.saved = Saved(Pool(pages), budget=budget, folder=folder, everywhere=everywhere)
        return self.saved

    def stop(self):
        if self.saved is not None:
            self.saved.folder.close()
        self.saved = None

    @property
    def files(self):
        return sorted(self.place.glob("*.safetensors"))

    def with_one_file(self, tokens=PROMPT):
        saved = self.start()
        compute(saved, "alice", tokens)
        assert saved.spill() and not saved.spill()
        (file,) = self.files
        return file


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path / "states")
    yield house
    house.stop()


def finds(saved, tokens=PROMPT, space="alice"):
    """How many of these tokens need not be computed; what follows them is kept, as an engine does."""
    return compute(saved, space, [*tokens, 0], marks=[len(tokens)]).length


def is_sound(saved):
    assert disagreements(saved, saved.pool.counted()) == []
    folder = saved.folder
    if folder.path.is_dir():
        there = {entry.name: entry.stat().st_size for entry in folder.path.glob("*.safetensors")}
        assert folder.sizes == there and not list(folder.partial.iterdir())


# ----- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_restart_finds_all(house, everywhere):
    prompts = [[first, *range(first + 3)] for first in range(7)]
    saved = house.start(everywhere=everywhere)
    for tokens in prompts:
        compute(saved, "alice", tokens)
    compute(saved, "bob", prompts[2])
    while saved.spill():
        pass
    assert saved.counts.spilled == len(house.files) == 8
    saved = house.start(everywhere=everywhere)
    assert len(saved.tree) == 8 and saved.counts.bytes == 0 and saved.pool.free() == 64
    for tokens in prompts:  # `compute` checks every number that comes back
        assert finds(saved, tokens) == len(tokens)
    assert finds(saved, prompts[3], "bob") == 0 and finds(saved, prompts[2], "bob") == len(prompts[2])
    assert saved.counts.restored == 8 and saved.folder.refused == 0
    is_sound(saved)


def test_what_memory_has_no_room_for_comes_back_from_its_file(house):
    saved = house.start(pages=6, budget=60)
    for first in range(6):
        compute(saved, "", [first] * 4)
        is_sound(saved)
    assert saved.counts.evictions >= 4 and len(house.files) >= 4
    for first in range(6):
        assert compute(saved, "", [first] * 5).length == 4
        is_sound(saved)
    assert saved.counts.restored >= 4


def test_what_is_computed_again_anyway_is_not_read(house):
    house.with_one_file()
    saved = house.start()
    compute(saved, "alice", PROMPT, most=0)
    assert saved.counts.restored == 0 and len(house.files) == 1
    assert finds(saved) == len(PROMPT) and saved.counts.restored == 0
    is_sound(saved)


def test_a_long_file_is_not_read_for_a_short_part_of_it(house):
    house.with_one_file(list(range(30)))
    saved = house.start(everywhere=True)
    assert compute(saved, "alice", [0, 1, 99]).length == 0 and saved.counts.restored == 0
    assert compute(saved, "alice", [*range(20), 99]).length == 20 and saved.counts.restored == 1
    is_sound(saved)


def test_what_saves_less_than_a_disk_takes_is_not_written(house):
    saved = house.start()
    compute(saved, "", PROMPT, seconds=1e-9)
    assert not saved.spill() and not house.files
    saved.make_room(64)
    assert len(saved.tree) == 0


def test_a_file_that_adds_little_to_what_is_in_memory_is_not_read(house):
    house.with_one_file()
    saved = house.start()
    (entry,) = saved.entries()
    reading = DISK_SECONDS_PER_MIB * saved.folder.bytes / (1 << 20)
    compute(saved, "alice", PROMPT[:4], seconds=(entry.seconds - reading / 2) / 4)
    assert finds(saved) == 4 and saved.counts.restored == 0
    assert len(house.files) == 1 and finds(saved) == 5  # computed meanwhile
    is_sound(saved)


def test_without_room_for_it_a_file_stays_and_a_shorter_entry_serves(house):
    house.with_one_file(list(range(40)))
    saved = house.start(pages=12)
    compute(saved, "alice", [0, 1, 2])
    found = compute(saved, "alice", [*range(19), 99])
    assert found.length == 3 and len(house.files) == 1
    assert saved.find("alice", range(41), 40).length == 3
    (lock,) = (entry for entry in saved.entries() if entry.locks)
    saved.unlock(lock)
    is_sound(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_numbers_of_any_type_come_back(house, dtype):
    saved = house.start()
    whole = torch.arange(12).to(dtype).view(3, 4)
    state = [whole[1], whole.T, torch.empty(0, dtype=dtype), whole[1, :2], whole[0, 0]]  # views and empty ones too
    assert saved.keep("", [1, 2], [], state, 1.0) and saved.spill()
    found = house.start().find("", [1, 2, 3], 2)
    for got, want in zip(found.entry.state, state, strict=True):
        assert got.dtype == want.dtype and torch.equal(got.float(), want.float())


# ----- what is not believed ------------------------------------------------------------------------------------------


def regions(file):
    """Where in the file each tensor lies, by name; its header too."""
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    places = {name: [length + at for at in entry["data_offsets"]] for name, entry in header.items() if name[0] != "_"}
    return places | {"header": [0, length]}


def refused(folder, name, read):
    try:
        getattr(folder, read)(name)
    except BadFile:
        return True
    return False


def test_a_flip_of_any_bit_is_refused(house):
    file = house.with_one_file()
    folder, data, where = house.saved.folder, file.read_bytes(), regions(file)
    assert set(where) == {"header", "tokens", "page.00000", "page.00001", "state.00000", "state.00001"}
    assert max(end for _, end in where.values()) == len(data)
    early = {at for name in ("header", "tokens") for at in range(*where[name])}  # what is read at the start
    with open(file, "r+b", buffering=0) as open_file:
        for at, byte in enumerate(data):
            os.pwrite(open_file.fileno(), bytes([byte ^ 1 << at % 8]), at)
            assert refused(folder, file.name, "header" if at in early else "read"), f"byte {at}"
            os.pwrite(open_file.fileno(), bytes([byte]), at)
    folder.read(file.name)


def test_a_file_cut_anywhere_or_longer_is_refused(house):
    file = house.with_one_file()
    folder, data = house.saved.folder, file.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        file.write_bytes(data[:length])
        assert refused(folder, file.name, "header"), f"{length} bytes"
    file.write_bytes(data + b"\0")
    assert refused(folder, file.name, "header")


def hostile(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


I32 = {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}
HUGE = {"dtype": "I32", "shape": [0, 1 << 61, 1 << 61], "data_offsets": [0, 0]}
CONTENTS = {
    "no bytes": b"",
    "text": b"these are no tensors at all\n" * 9,
    "a header longer than the file": (1 << 63).to_bytes(8, "little") + b"{}",
    "a header that is no JSON": hostile(b"{" * 4000),
    "nothing": hostile({}),
    "no metadata": hostile({"tokens": I32}, bytes(4)),
    "metadata that are numbers": hostile({"__metadata__": {"seal": 3}, "tokens": I32}, bytes(4)),
    "an empty seal": hostile({"__metadata__": {"seal": "", "model": "m"}, "tokens": I32}, bytes(4)),
    "a seal beyond ASCII": hostile({"__metadata__": {"seal": "\u00e9"}, "tokens": I32}, bytes(4)),
    "tokens of another type": hostile({"tokens": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "one token without an axis": hostile({"tokens": {"dtype": "I32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "no tokens": hostile({"tokens": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}),
    "axes without end": hostile({"tokens": I32, "state.00000": HUGE}, bytes(4)),
    "a type that nobody knows": hostile({"tokens": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "offsets beyond the end": hostile({"tokens": {"dtype": "I32", "shape": [9], "data_offsets": [0, 36]}}, bytes(4)),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_what_was_not_written_here_is_deleted_at_the_start(house, caplog, content):
    file = house.with_one_file()
    file.write_bytes(content)
    saved = house.start()
    assert not house.files and len(saved.tree) == 0 and saved.folder.refused == 1
    assert f"{file.name} is deleted from the saved states" in caplog.text
    assert finds(saved) == 0 and finds(saved) == len(PROMPT)  # and serving goes on
    assert saved.spill() and not saved.folder.broken
    is_sound(saved)


def test_a_header_longer_than_any_is_not_parsed(house, caplog):
    file = house.with_one_file()
    file.write_bytes(hostile(b"{}".ljust(1 << 21)))
    house.start()
    assert not house.files and "its header has 2,097,152 bytes" in caplog.text


def test_tokens_without_end_are_not_copied(house, caplog, monkeypatch):
    house.with_one_file()
    monkeypatch.setattr(spill, "TOKENS_MOST", len(PROMPT) - 1)
    assert len(house.start().tree) == 0 and "or one too long" in caplog.text


def otherwise_sealed(file, place, **changes):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), place, metadata=metadata | changes)


@pytest.mark.parametrize("what", ["model", "numerics", "space", "length", "seconds", "pages", "data", "seal"])
def test_a_header_that_was_changed_is_refused(house, what):
    file = house.with_one_file()
    otherwise_sealed(file, file.with_name("other"), **{what: "9"})
    os.replace(file.with_name("other"), file)
    saved = house.start()
    assert not house.files and len(saved.tree) == 0


def test_a_copy_of_the_same_file_would_be_believed(house):
    """So that the test above fails where it should."""
    file = house.with_one_file()
    otherwise_sealed(file, file.with_name("other"))
    os.replace(file.with_name("other"), file)
    assert finds(house.start()) == len(PROMPT)


@pytest.mark.parametrize(
    "start, reason",
    [({"model": "n"}, "its model is 'm', here it is 'n'"), ({"numerics": "2"}, "its numerics is '1', here it is '2'")],
)
def test_states_of_another_model_or_of_other_numerics_are_deleted(house, caplog, start, reason):
    house.with_one_file()
    saved = house.start(**start)
    assert not house.files and len(saved.tree) == 0 and reason in caplog.text


def test_a_file_under_another_name_is_refused(house, caplog):
    file = house.with_one_file()
    shutil.copy(file, file.with_name(f"{'0' * 32}.safetensors"))
    saved = house.start()
    assert house.files == [file] and len(saved.tree) == 1 and "its name belongs to other tokens" in caplog.text


def test_without_its_key_a_folder_is_not_believed(house, caplog):
    file = house.with_one_file()
    (file.parent / KEY).write_bytes(b"short")
    saved = house.start()
    assert not house.files and len(saved.tree) == 0 and "holds no key" in caplog.text
    assert finds(saved) == 0
    while saved.spill():
        pass
    assert finds(house.start()) == len(PROMPT)


@pytest.mark.parametrize("harm", ["flip", "cut", "zero", "gone", "link"])
def test_a_file_that_goes_bad_while_serving_is_never_restored(house, caplog, tmp_path, harm):
    compute_twice = lambda saved: (finds(saved), finds(saved))
    file = house.with_one_file()
    saved = house.start()
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[regions(file)["state.00000"][0]] ^= 4
        file.write_bytes(data)
    elif harm in ("cut", "zero"):
        file.write_bytes(data[: len(data) - 5 if harm == "cut" else 0])
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.unlink()
    assert compute_twice(saved) == (0, len(PROMPT)) and saved.folder.refused == 1 and not house.files
    assert f"{file.name} is deleted" in caplog.text and saved.counts.restored == 0
    assert harm != "link" or (tmp_path / "elsewhere").read_bytes() == data
    is_sound(saved)


def test_pages_of_another_layout_are_not_written_into_these(house):
    house.with_one_file()
    saved = house.start()
    saved.pool.contents[1] = saved.pool.contents[1].long()
    assert saved.find("alice", [*PROMPT, 0], 5).entry is None and not house.files
    assert disagreements(saved, saved.pool.counted()) == []


# ----- who may read and write ----------------------------------------------------------------------------------------


def test_only_the_owner_may_read_and_no_name_is_told(house):
    before = os.umask(0)
    try:
        house.with_one_file()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [house.place, *house.place.rglob("*")]}
    (file,) = house.files
    assert modes == {"states": 0o700, PARTIAL: 0o700, KEY: 0o600, file.name: 0o600}
    assert all(b"alice" not in path.read_bytes() for path in house.place.iterdir() if path.is_file())


def test_links_are_not_followed(house, tmp_path):
    file = house.with_one_file()
    for at, target in ((file, "states"), (house.place / KEY, "keys")):
        elsewhere = tmp_path / target.upper()
        os.replace(at, elsewhere)
        at.symlink_to(elsewhere)
        kept = elsewhere.read_bytes()
        saved = house.start()
        assert len(saved.tree) == 0 and elsewhere.read_bytes() == kept and not at.is_symlink()
    (house.place / PARTIAL).rmdir()
    (house.place / PARTIAL).symlink_to(tmp_path)
    house.start()
    assert not (house.place / PARTIAL).is_symlink() and (tmp_path / "KEYS").exists()
    house.stop()
    (tmp_path / "link").symlink_to(house.place)
    with pytest.raises(UserError, match="choose a plain folder, no link"):
        Folder(tmp_path / "link", model="m", numerics="1", limit=LIMIT)


def test_a_pipe_is_not_waited_for(house):
    file = house.with_one_file()
    file.unlink()
    os.mkfifo(file)
    assert len(house.start().tree) == 0 and not house.files


def test_a_folder_with_the_name_of_a_file_stays_and_ends_no_writing(house):
    house.with_one_file()
    (house.place / f"{'a' * 32}.safetensors").mkdir()
    saved = house.start()
    assert len(saved.tree) == 1 and not saved.folder.broken


def test_what_is_not_ours_stays(house):
    house.with_one_file()
    (house.place / "notes.txt").write_text("mine")
    (house.place / PARTIAL / "leftover").write_text("half of a file")
    saved = house.start()
    assert len(saved.tree) == 1 and (house.place / "notes.txt").exists()
    is_sound(saved)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_may_enter_is_refused(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(UserError, match=f"mode {mode:o}.*chmod 700"):
        Folder(tmp_path / "open", model="m", numerics="1", limit=LIMIT)
    assert not list((tmp_path / "open").iterdir())


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose a plain folder"):
            Folder(place, model="m", numerics="1", limit=LIMIT)


def test_one_folder_serves_one_process(house):
    house.with_one_file()
    with pytest.raises(UserError, match="give each server a folder of its own"):
        Folder(house.place, model="m", numerics="1", limit=LIMIT)
    house.stop()
    Folder(house.place, model="m", numerics="1", limit=LIMIT).close()


# ----- the disk ------------------------------------------------------------------------------------------------------


def serves_on(house, caplog):
    """After writing has failed: one warning, nothing half-written, and memory alone from then on."""
    saved = house.saved
    for first in range(3):
        compute(saved, "", [first] * 4)
        assert not saved.spill()
    assert saved.folder.broken and caplog.text.count("no more states are written") == 1
    assert finds(saved, [2] * 4, "") == 4
    assert saved.make_room(64) and len(saved.tree) == len(house.files)
    is_sound(saved)


def test_a_full_disk_ends_spilling_and_nothing_else(house, caplog, monkeypatch):
    saved = house.start()
    compute(saved, "alice", PROMPT)

    def full(file, tensors, metadata):
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(spill, "write_file", full)
    assert not saved.spill()
    serves_on(house, caplog)
    assert not house.files


def test_what_was_written_before_a_disk_was_full_still_serves(house, monkeypatch):
    house.with_one_file()
    saved = house.start()
    monkeypatch.setattr(spill, "write_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    compute(saved, "", [7] * 4)
    assert not saved.spill() and saved.folder.broken
    assert finds(saved) == len(PROMPT)


def test_a_real_refusal_of_the_system_is_a_full_disk_too(house, caplog):
    saved = house.start()
    compute(saved, "alice", PROMPT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
        assert not saved.spill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    serves_on(house, caplog)


def test_a_lost_folder_ends_spilling_and_nothing_else(house, caplog):
    house.with_one_file()
    saved = house.start()
    shutil.rmtree(house.place)
    assert finds(saved) == 0 and saved.folder.refused == 1
    assert not saved.spill()
    serves_on(house, caplog)


def test_of_a_full_folder_the_oldest_files_go(house):
    saved = house.start()
    for first in range(4):
        compute(saved, "", [first] * 4)
        assert saved.spill()
    size = house.files[0].stat().st_size
    compute(saved, "", [1] * 5, most=4)  # is used again
    while saved.spill():
        pass
    saved = house.start(limit=3 * size + size // 2)
    assert len(house.files) == 3  # by a lower limit too: of 0 2 3 1 and the longer 1 the first two have gone
    assert [finds(saved, [first] * 4, "") for first in (0, 2)] == [0, 0]
    assert [finds(saved, [first] * 4, "") for first in (3, 1)] == [4, 4]
    is_sound(saved)


def test_a_file_larger_than_the_folder_may_be_is_not_written(house):
    saved = house.start(limit=spill.HEADER_ROOM)
    compute(saved, "", PROMPT)
    assert not saved.spill() and not house.files and not saved.folder.broken


def test_an_older_state_does_not_push_a_newer_one_out(house):
    saved = house.start()
    compute(saved, "", [1] * 4)
    old = next(saved.entries())
    compute(saved, "", [2] * 4)
    saved.folder.limit = spill.HEADER_ROOM + 200
    assert saved.write(next(entry for entry in saved.entries() if entry is not old))
    assert not saved.write(old)
    assert len(house.files) == 1


WRITER = """
import sys
from nautilus.serve.saved import DISK_SECONDS_PER_MIB, Saved
from nautilus.serve.spill import Folder
from tests.serve.shelf import Pool, compute
saved = Saved(Pool(4096), budget=1 << 30, folder=Folder(sys.argv[1], model="m", numerics="1", limit=1 << 30))
for first in range(400):
    compute(saved, "alice", [first] * 4)
print("begins", flush=True)
while saved.spill():
    pass
"""


@pytest.mark.slow
def test_a_server_killed_while_it_writes_leaves_a_folder_that_opens(house):
    command = [sys.executable, "-c", WRITER, str(house.place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stdout.readline() == "begins\n"
        while not house.files:
            time.sleep(0.001)
        running.kill()
    saved = house.start()
    assert saved.folder.refused == 0 and 0 < len(saved.tree) < 400
    for tokens in [entry.place.tokens().tolist() for entry in saved.entries()][:20]:
        assert finds(saved, tokens) == 4
    is_sound(saved)


def test_what_is_logged_names_no_tenant_and_no_token(house, caplog):
    caplog.set_level(logging.DEBUG)
    file = house.with_one_file()
    file.write_bytes(b"")
    house.start()
    assert "alice" not in caplog.text and str(PROMPT) not in caplog.text
