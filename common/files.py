"""Two questions both sides ask of files: what is its digest, and was the disk full."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path


def digest_file(path: Path) -> str:
    """sha256 of a file as 64 hex digits, read a piece at a time. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(error: OSError) -> bool:
    """Whether a write failed for want of space or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
