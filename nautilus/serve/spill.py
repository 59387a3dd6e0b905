"""Saved states as files: one for each, written beside and renamed, believed only where its seal and checksum are right.

A file is in safetensors format: the tokens (int32), the recurrent states and the contents of the pages. Its metadata:

| key | what it says |
|---|---|
| `model`, `numerics` | whose bits these are; both must be those of the reader |
| `space` | the namespace as a keyed BLAKE2b digest, never its name |
| `length`, `pages`, `seconds` | tokens, pages, and seconds of prefill that it saves |
| `data` | SHA-256 of the states and pages |
| `seal` | keyed BLAKE2b of all the rest: of the above, of names, types and shapes, of the tokens |

The key lies in the folder, readable by its owner only, so nobody else can make a file that is believed. The seal is
checked when the folder is read at the start, for which only headers and tokens are read; `data` before any of it is
used. Nothing is forced to the disk: after a loss of power some files fail their checks, and are deleted like all bad
ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from nautilus.model.shards import entries, opened, read_tensors, write_file
from nautilus.runtime import UserError

log = logging.getLogger("nautilus.serve")
NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
KEY, PARTIAL = "key", "partial"
HEADER_MOST = 1 << 20  # bytes of a header: one of 108 layers has some 30 KB
TOKENS_MOST = 1 << 24
HEADER_ROOM = 1 << 12  # bytes by which a file may be larger than its tensors, roughly; for the size cap
# What the library, torch and parsers say to a header that was not written here, and the system to a file.
UNREADABLE = (OSError, UserError, RuntimeError, TypeError, ValueError, OverflowError, KeyError)


class BadFile(Exception):
    """A file that must not be believed; the message says why."""


class Header(NamedTuple):
    """What a file says of itself, under its seal."""

    name: str
    space: str
    tokens_T: np.ndarray
    pages: int
    seconds: float
    bytes: int  # of the states, once in memory


class Folder:
    """The files of one server.

    folder: made if it is not there; a plain folder of this user that nobody else may enter, used by one process at a
        time. UserError for any other.
    model, numerics: a hash of the weights, and whatever else the bits of a state depend on: the version of the kernels,
        the formats of states and of keys and values, their layout.
    limit: bytes that all files together may take. Whoever writes makes room first, with `remove`.

    `sizes` are those of the files by name, `refused` how many were deleted because they could not be believed. `broken`
    is set, with one warning, once a file could not be written; none is written from then on.
    """

    def __init__(self, folder: str | Path, *, model: str, numerics: str, limit: int):
        self.path, self.model, self.numerics, self.limit = Path(folder), model, numerics, limit
        self.broken, self.refused, self.sizes = False, 0, dict[str, int]()
        self.lock = private_folder(self.path)
        try:
            self.partial = self.path / PARTIAL
            if self.partial.is_symlink():
                self.partial.unlink()
            self.partial.mkdir(mode=0o700, exist_ok=True)
            for leftover in self.partial.iterdir():
                leftover.unlink()
            self.key = private_key(self.path / KEY)
        except OSError as bad:
            self.close()
            raise UserError(f"states cannot be kept in {folder} ({bad}); choose a folder you may write to") from bad

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self.lock)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def index(self) -> Iterator[Header]:
        """What is there, the longest unused first. Bad files are deleted, and the log says why."""
        # A folder cannot be deleted as bad files are, and is none of this one's.
        found = [entry for entry in os.scandir(self.path) if not entry.is_dir(follow_symlinks=False)]
        files = [(entry.stat(follow_symlinks=False), entry.name) for entry in found]
        for info, name in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if NAME.fullmatch(name):
                self.sizes[name] = info.st_size
                try:
                    yield self.header(name)
                except BadFile as bad:
                    self.refuse(name, bad)

    def refuse(self, name: str, why: BadFile) -> None:
        log.warning("%s is deleted from the saved states: %s", name, why)
        self.refused += 1
        self.remove(name)

    def remove(self, name: str) -> None:
        self.sizes.pop(name, None)
        with self.quietly(), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / name)

    def touch(self, name: str) -> None:
        """It was used just now."""
        with contextlib.suppress(OSError):
            os.utime(self.path / name, follow_symlinks=False)

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Inside, an error of the disk, or no memory for what is to be written, ends all writing, with one warning."""
        try:
            yield
        except (OSError, SafetensorError, MemoryError, RuntimeError) as bad:  # the latter is torch's for no memory
            if not self.broken:
                log.warning("no more states are written to %s (%s); serving goes on without", self.path, bad)
            self.broken = True

    # ----- writing ---------------------------------------------------------------------------------------------------

    def write(
        self, space: str, tokens_T: np.ndarray, *, seconds: float, state: Sequence[Tensor], pages: Sequence[Tensor],
        count: int,
    ) -> str | None:  # fmt: skip
        """The name of the file in which it now is, or None if that was not possible. `pages` holds `count` pages."""
        data = named("state", state) | named("page", pages)
        metadata = {
            "model": self.model, "numerics": self.numerics, "space": space, "length": str(len(tokens_T)),
            "pages": str(count), "seconds": repr(float(seconds)), "data": checksum(data),
        }  # fmt: skip
        metadata["seal"] = self.seal(metadata, data, tokens_T)
        name = self.name(space, tokens_T)
        beside = self.partial / name
        with self.quietly():
            try:
                write_file(beside, {"tokens": torch.from_numpy(tokens_T), **data}, metadata)
                os.chmod(beside, 0o600)
                size = beside.stat().st_size
                os.replace(beside, self.path / name)
                self.sizes[name] = size
                return name
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink(missing_ok=True)
        return None

    def name(self, space: str, tokens_T: np.ndarray) -> str:
        return f"{self.digest('name', space.encode(), tokens_T.tobytes())}.safetensors"

    def seal(self, metadata: dict[str, str], data: dict[str, Tensor], tokens_T: np.ndarray) -> str:
        layout = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in data.items()}
        said = {key: value for key, value in metadata.items() if key != "seal"}
        return self.digest("seal", json.dumps([said, layout], sort_keys=True).encode(), tokens_T.tobytes())

    def digest(self, purpose: str, *parts: bytes) -> str:
        return keyed_digest(self.key, purpose, *parts)

    # ----- reading ---------------------------------------------------------------------------------------------------

    def header(self, name: str) -> Header:
        """What a file holds. BadFile, with the reason, where it is not what this folder would have written."""
        with self.trusted(name) as (header, _, _):
            return header

    def read(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The states and the contents of the pages; BadFile for anything that is not as it was written.

        The second are in the file's own memory: use them at once.
        """
        with self.trusted(name) as (_, metadata, tensors):
            # Those that will stay are copied before they are checked: the file's memory may be read from disk anew.
            state = {part: tensor.clone() for part, tensor in tensors.items() if part.startswith("state")}
            if not hmac.compare_digest(checksum(tensors | state), metadata["data"]):
                raise BadFile("the checksum of its data is another")
            return list(state.values()), [tensor for part, tensor in tensors.items() if part not in state]

    @contextlib.contextmanager
    def trusted(self, name: str) -> Iterator[tuple[Header, dict[str, str], dict[str, Tensor]]]:
        """What is under the seal of a file, its metadata, and all else in it, which is not."""
        file = self.path / name
        try:
            plain_header(file)
            with opened(file) as shard:
                metadata = shard.metadata() or {}
            # Not by the library: its `get_tensor` (0.8.0) loses 28 bytes at every call, which adds up in a server.
            tensors = dict(sorted(read_tensors(dict(entries(file)), soon=lambda _: False)))
            yield self.checked(name, metadata, tensors), metadata, tensors
        except UNREADABLE as bad:
            raise BadFile(str(bad)) from bad

    def checked(self, name: str, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Header:
        tokens = tensors.pop("tokens", None)
        if tokens is None or tokens.dtype != torch.int32 or tokens.dim() != 1 or not 0 < len(tokens) <= TOKENS_MOST:
            raise BadFile("it has no list of tokens, or one too long")
        tokens_T = tokens.numpy().copy()
        seal = self.seal(metadata, tensors, tokens_T)
        if not hmac.compare_digest(seal.encode(), metadata.get("seal", "").encode()):
            raise BadFile("its seal is another: it was changed, or written with another key")
        for what, mine in (("model", self.model), ("numerics", self.numerics)):
            if metadata[what] != mine:
                raise BadFile(f"its {what} is {metadata[what][:80]!r}, here it is {mine!r}")
        if self.name(metadata["space"], tokens_T) != name:
            raise BadFile("its name belongs to other tokens")
        size = sum(tensor.nbytes for part, tensor in tensors.items() if part.startswith("state"))
        return Header(name, metadata["space"], tokens_T, int(metadata["pages"]), float(metadata["seconds"]), size)


def keyed_digest(key: bytes, purpose: str, *parts: bytes) -> str:
    digest = hashlib.blake2b(key=key, digest_size=16, person=purpose.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def file_bytes(tokens: int, *tensors: Tensor) -> int:
    """About how large a file of these is."""
    return HEADER_ROOM + 4 * tokens + sum(tensor.nbytes for tensor in tensors)


def named(kind: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors as a file may hold them: on the CPU, contiguous, and the only one in their memory."""
    whole = (tensor.detach().cpu().contiguous() for tensor in tensors)
    alone = (one if one.untyped_storage().nbytes() == one.nbytes else one.clone() for one in whole)
    return {f"{kind}.{number:05d}": tensor for number, tensor in enumerate(alone)}


def checksum(data: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(data.items()):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_header(file: Path) -> None:
    """BadFile for what is no plain file of this user (a link is not followed), and for a header too large to parse."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise BadFile("it is no plain file of this user")
        length = int.from_bytes(os.read(handle, 8), "little")
        if length > HEADER_MOST:
            raise BadFile(f"its header has {length:,} bytes, where none has more than {HEADER_MOST:,}")
    finally:
        os.close(handle)


def private_folder(path: Path) -> int:
    """A handle that locks the folder for this process, made if need be. UserError for one that others may enter."""
    what = f"states were to be kept in {path}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as bad:
        raise UserError(f"{what}, but {bad}; choose a plain folder, no link, that you may write to") from bad
    info, reason = os.fstat(handle), ""
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        reason = (
            f"which has mode {stat.S_IMODE(info.st_mode):o} and belongs to user {info.st_uid}: others could read"
            f" prompts there; make it your own (chmod 700) or choose another folder"
        )
    else:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as bad:
            reason = (
                f"which another process uses ({bad.strerror}); give each server a folder of its own, on a local disk"
            )
    if reason:
        os.close(handle)
        raise UserError(f"{what}, {reason}")
    return handle


def private_key(file: Path) -> bytes:
    """The folder's key; made anew where there is none, after which nothing in the folder is believed."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as opened_key:
            key = opened_key.read(33)
        if len(key) == 32:
            return key
        log.warning("%s holds no key; it is made anew", file)
    except FileNotFoundError:
        pass
    except OSError as bad:
        log.warning("%s cannot be read (%s); it is made anew", file, bad)
    file.unlink(missing_ok=True)
    key = os.urandom(32)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as fresh:
        fresh.write(key)
    return key
