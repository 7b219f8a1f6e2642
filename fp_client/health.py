"""Does a device's daemon run, and is its session alive? The daemon writes it down; whoever asks reads it.

A file, because that costs neither side anything: `python -m fp_client.health` is a container's health check, runs again and
again within the memory the container was given for its task, and imports next to nothing. Times are the machine's monotonic
clock, so no step of the wall clock makes a daemon look dead or alive.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from common.errors import FedPrunerError, UnreachableError
from common.faults import fault

log = logging.getLogger(__name__)

FILE = "health.json"
BEAT = 15.0
"""Seconds between two signs of life when nothing changes; a change is written within one."""
SILENCE = 60.0
"""A daemon that has written nothing for so many seconds hangs or is gone."""
PATIENCE = 120.0
"""Seconds without a session after which a device counts as cut off: a server's restart takes less."""


@dataclass(frozen=True)
class Link:
    """The session as it stands: whose it is, since when (monotonic seconds), or why there is none."""

    device: str = ""
    """The name the server knows this device by; empty: no session is open."""
    since: float = 0.0
    reason: str = ""

    def opened(self, device: str) -> Link:
        """A session was opened."""
        return Link(device, monotonic())

    def lost(self, reason: str) -> Link:
        """It ended, or another try failed: the time without one is counted from the first of them."""
        return Link("", monotonic() if self.device else self.since, reason)


async def tell(directory: Path, server: str, link: Callable[[], Link]) -> None:
    """Write a sign of life at every change and every `BEAT` seconds, until cancelled; then the file goes."""
    path, told, when, failed = directory / FILE, None, 0.0, False
    try:
        while True:
            now = link()
            if now != told or monotonic() - when >= BEAT:
                try:
                    _write(path, {"server": server, "at": monotonic(), **asdict(now)})
                    told, when, failed = now, monotonic(), False
                except OSError as error:  # not worth the daemon; who asks finds an old sign and says so
                    if not failed:
                        log.warning("%s: can't be written: %s", path, error.strerror)
                    failed = True
            await asyncio.sleep(1.0)
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    fault("device.health.written")
    temporary.replace(path)


def check(directory: Path, patience: float = PATIENCE, now: float | None = None) -> str:
    """What the daemon says of itself, in one line. Raises UnreachableError when it is gone, hangs, or has been without a
    session for longer than `patience` seconds."""
    path, now = directory / FILE, monotonic() if now is None else now
    try:
        said = json.loads(path.read_text())
        server, at, link = str(said["server"]), float(said["at"]), Link(said["device"], float(said["since"]), said["reason"])
    except FileNotFoundError:
        raise UnreachableError(f"{directory}: no daemon runs here; start it with `fp-client run --dir {directory}`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UnreachableError(f"{path}: damaged; the daemon writes a new one within {BEAT:.0f} s") from None
    if not 0 <= now - at <= SILENCE:  # from before the machine's last start, it may lie ahead
        age = f"{now - at:.0f} s old" if now >= at else "from before this machine's last start"
        raise UnreachableError(
            f"{directory}: the daemon's last sign of life is {age}: it was killed, it hangs, or its disk is full"
        )
    lasted = now - link.since
    if link.device:
        return f"connected to {server} as {link.device!r} for {lasted:.0f} s"
    if lasted > patience:
        raise UnreachableError(f"no session with {server} for {lasted:.0f} s: {link.reason}")
    return f"no session with {server} yet, for {lasted:.0f} s of at most {patience:.0f}: {link.reason}"


def main() -> int:
    """For a container: 0 when all is well, 1 when not, with a line that says why."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("FP_CLIENT_DIR", "."))
    try:
        print(check(directory))  # noqa: T201
    except FedPrunerError as error:
        print(f"unhealthy: {error}")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
