"""How long the round under way has lasted, kept on disk: its hard limit holds however often the server is started anew."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from common.types import TaskKey

FILE = "elapsed.json"
EVERY = 10.0
"""Seconds between notes: so much is lost at most of each time the server was up."""


class Elapsed:
    """The note of a data directory. Not synced and never insisted on: without it the round's last event is what is known."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._noted = 0.0

    def of(self, key: TaskKey) -> float | None:
        """The seconds noted for this attempt at a round; None where there is no note of it that can be read."""
        try:
            kept = json.loads(self._path.read_text())
            seconds = float(kept["seconds"])
            return seconds if kept["attempt"] == _name(key) and 0 <= seconds < float("inf") else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, key: TaskKey, seconds: float, now: float) -> None:
        """Write it down, unless that was done less than `EVERY` seconds before `now`."""
        if now - self._noted < EVERY:
            return
        self._noted = now
        temporary = self._path.with_name(FILE + ".tmp")
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as out:
                json.dump({"attempt": _name(key), "seconds": seconds}, out)
            temporary.replace(self._path)


def _name(key: TaskKey) -> list[str | int]:
    return [key.run, key.round, key.attempt]
