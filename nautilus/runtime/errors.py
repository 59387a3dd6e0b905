"""Errors meant for people, and a full or refusing disk turned into one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_REFUSES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A mistake a person can mend. The message says what was asked, which values clash, and what to do."""


def installing(extra: str) -> str:
    """The command that installs an extra for this copy. By its bare name, `nautilus`, an index has another project."""
    root, here = Path(__file__).resolve().parents[2], Path.cwd()
    short = lambda path: path.relative_to(here) if path.is_relative_to(here) else path
    python = short(Path(sys.prefix, "bin", "python")) if os.name == "posix" else sys.executable
    if not (root / "constraints.txt").is_file():
        return f"install the extra {extra!r} from where this nautilus came"
    constraints = short(root / "constraints.txt")
    return f"{python} -m pip install --no-build-isolation -c {constraints} -e '{short(root)}[{extra}]'"


def disk_full(path: Path) -> UserError:
    """The error for a full disk; also for writers that report one in a way of their own."""
    free = shutil.disk_usage(first_existing(path)).free
    return UserError(
        f"cannot write {path}: the disk is full ({free / 1e6:,.0f} MB free); free some space or choose another"
        f" folder, then start again. What was saved before is untouched."
    )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, a full or refusing disk becomes a UserError about `path`; any other error passes through."""
    try:
        yield
    except OSError as bad:
        if bad.errno in DISK_FULL:
            raise disk_full(path) from bad
        if bad.errno == errno.EFBIG:
            raise UserError(
                f"cannot write {path}: a file of it would be larger than this file system or `ulimit -f` allows; raise"
                f" that limit or choose another folder, then start again. What was saved before is untouched."
            ) from bad
        if bad.errno in DISK_REFUSES:
            raise UserError(
                f"cannot write {path}: {bad.strerror} ({bad.filename or first_existing(path)});"
                f" choose a folder you may write to, or change its permissions."
            ) from bad
        raise


def first_existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
