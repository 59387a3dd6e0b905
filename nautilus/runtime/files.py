"""Files and folders that are replaced as a whole: a crash at any moment leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nautilus.runtime.errors import UserError, disk_errors

LARGEST = 1 << 27  # bytes of a file that is read as a whole: a parsed one takes many times that memory
DEEPEST = 64  # levels of a JSON file: whoever walks through one may recurse


def read_text(path: str | Path, cure: str = "copy or download it again") -> str:
    """The text of a file; UserError, with what to do about it, for one that is absent, unreadable or no UTF-8."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would be waited for without end
            raise UserError(f"{path.parent} has no {path.name}{' that is a file' if path.exists() else ''}; {cure}")
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path} has {size:,} bytes, where no such file has more than {LARGEST:,}; {cure}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as bad:
        raise UserError(f"cannot read {path} ({bad}); {cure}") from bad


def read_json(path: str | Path, cure: str = "copy or download it again") -> dict:
    """The object in a JSON file; UserError, with what to do about it, for any file that does not hold one."""
    text = read_text(path, cure)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as bad:
        raise UserError(f"{path} is not valid JSON ({bad}); {cure}") from bad
    if not isinstance(document, dict):
        raise UserError(f"{path} holds {type(document).__name__}, not an object; {cure}")
    if deeper_than(DEEPEST, document):
        raise UserError(f"{path} is nested more than {DEEPEST} levels deep, which no such file is; {cure}")
    return document


def json_lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file of JSON lines with the numbers of their lines, from 1; empty lines are passed over.
    UserError, by file and line, for what is none."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} {'is no file' if path.is_dir() else 'is not there'}; give a file of JSON lines")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as bad:
                raise UserError(f"{path}, line {number}, is no JSON in UTF-8: {bad}") from bad
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}, is no object, but {str(row)[:80]}")
            yield number, row


def deeper_than(levels: int, value: dict | list) -> bool:
    inside: list[dict | list] = [value]
    for _ in range(levels):
        children = (child for each in inside for child in (each.values() if isinstance(each, dict) else each))
        inside = [child for child in children if isinstance(child, dict | list)]
    return bool(inside)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file as a whole: a reader, or a crash at any moment, sees the old content or the new."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            with open(beside, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends well it replaces `path` as a whole.

    The files reach the disk first; then path -> .old, new -> path, and .old is removed. A crash between the two
    renames leaves no `path` but a complete .old, which `repair` puts back. A block that fails changes nothing.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not repair(path):
            raise UserError(f"cannot write {path}: another process is writing it now; wait for it or choose another")
        fresh = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        fresh.mkdir()
        lock = os.open(fresh, os.O_RDONLY)
        try:
            # The lock tells `repair` that this half-written folder has a living owner; the kernel drops it with us.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield fresh
            for place, _, names in os.walk(fresh):
                for name in (*names, "."):
                    to_disk(Path(place, name))
            swap(fresh, path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            os.close(lock)


def swap(fresh: Path, path: Path) -> None:
    try:
        if path.exists():
            path.rename(old_name(path))
        fresh.rename(path)
        to_disk(path.parent)
    finally:
        settle(path)


def settle(path: Path) -> None:
    """At most one of `path` and its .old may stay: the newer complete one."""
    old = old_name(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(path)


def repair(path: str | Path) -> bool:
    """Finish or undo what a killed `atomic_folder(path)` left. False, and nothing done, while one is still at work."""
    path = Path(os.path.realpath(path))
    # Only names that atomic_folder gives: never a folder of somebody else's that happens to look alike.
    leftovers = sorted(path.parent.glob(f".{glob.escape(path.name)}.tmp-*"))
    leftovers = [folder for folder in leftovers if folder.name.rpartition("-")[2].isdigit()]
    if any(is_locked(folder) for folder in leftovers):
        return False
    settle(path)
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def is_locked(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def old_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
