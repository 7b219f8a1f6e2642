"""A device joins: `common.transport.enroll` gets its certificate, and client.toml remembers the server."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path

from common.files import sync_directory
from common.transport import enroll, wire
from common.transport.enroll import Joined, Say
from fp_client.config import EXAMPLE, FILE


async def join(
    text: str, directory: Path, backoff: wire.Backoff | None = None, say: Say = lambda _: None, again: bool = False
) -> Joined:
    """Enroll with a device's token and fill `directory`: ca.pem, device.key (0600), client.toml, device.pem.

    Raises what `common.transport.enroll.join` does.
    """
    return await enroll.join(
        text, directory, "device", lambda server: write_server(directory / FILE, server), backoff, say, again
    )


def write_server(path: Path, server: str) -> None:
    """Put `server` into client.toml, keeping whatever else its owner wrote; make a commented file when there is none.

    Raises OSError.
    """
    line = f"server = {json.dumps(server)}"
    if not path.exists():
        _replace(path, EXAMPLE.format(server=json.dumps(server)))
        return
    text = path.read_text(encoding="utf-8")
    head, bracket, rest = re.match(r"(?s)(.*?)((?:^\s*\[)|\Z)(.*)", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    if re.search(r"(?m)^\s*server\s*=", head):
        head = re.sub(r"(?m)^\s*server\s*=.*$", lambda _: line, head, count=1)
    else:
        head = f"{line}\n{head}"
    if head + bracket + rest != text:  # what says so already may be read-only, as a container's is
        try:
            _replace(path, head + bracket + rest)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _overwrite(path, (head + bracket + rest).encode())  # mounted by itself, as into a container: can't be replaced


def _overwrite(path: Path, text: bytes) -> None:
    """Write a file in place, durably; where that fails what it held is put back, but not after a kill. Raises OSError."""
    with path.open("r+b", buffering=0) as file:
        old = file.read()
        try:
            _fill(file, text)
        except BaseException:
            _fill(file, old)
            raise


def _fill(file: io.FileIO, text: bytes) -> None:
    file.seek(0)
    left = memoryview(text)
    while left:
        left = left[file.write(left) or 0 :]
    file.truncate()
    os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Write a file durably and in one step: whatever happens, the old one or the new one is there. Raises OSError."""
    path = path.resolve()  # where it is a link, the file it names
    old = path.exists()
    if old:
        with path.open("r+b"):
            pass  # one that must not be written is not replaced either
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a crash may have left one
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if old else 0o666)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            if old:
                with contextlib.suppress(PermissionError):
                    os.chown(temporary, path.stat().st_uid, path.stat().st_gid)
                shutil.copystat(path, temporary)
                os.utime(temporary)
            os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
