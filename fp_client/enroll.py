"""A device joins: `common.transport.enroll` gets its certificate, and client.toml remembers the server."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    """Put `server` into client.toml, keeping whatever else its owner wrote; make a commented file when there is none."""
    line = f"server = {json.dumps(server)}"
    if not path.exists():
        path.write_text(EXAMPLE.format(server=json.dumps(server)))
        return
    text = path.read_text()
    head, bracket, rest = re.match(r"(?s)(.*?)((?:^\s*\[)|\Z)(.*)", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    if re.search(r"(?m)^\s*server\s*=", head):
        head = re.sub(r"(?m)^\s*server\s*=.*$", lambda _: line, head, count=1)
    else:
        head = f"{line}\n{head}"
    if head + bracket + rest != text:  # what says so already may be read-only, as a container's is
        path.write_text(head + bracket + rest)
