"""What both sides ask of files: what is its digest, was the disk full, will it be there after a loss of power."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path


def digest_file(path: Path) -> str:
    """sha256 of a file as 64 hex digits, read a piece at a time. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(error: OSError) -> bool:
    """Whether a write failed for want of space or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_directory(path: Path) -> None:
    """Make what was created, renamed or removed in `path` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """`path` and its parents where they are missing; its own entry is durable when this returns, also when somebody made the
    directory before and was killed. Raises OSError."""
    if not path.parent.is_dir():
        make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)
