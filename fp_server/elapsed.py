"""How long the round under way has lasted, kept on disk: its hard limit holds however often the server is started anew."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from common.faults import fault
from common.types import TaskKey

logger = logging.getLogger("fp_server")

FILE = "elapsed.json"
EVERY = 10.0
"""Seconds between notes: so much is lost at most of each time the server was up."""


class Elapsed:
    """The note of a data directory: whole or of before, also after a power cut. Never insisted on: without it the round's last
    event is what is known."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._noted = 0.0
        self._failing = False

    def of(self, key: TaskKey) -> float | None:
        """The seconds noted for this attempt at a round; None where there is no note of it that can be read."""
        try:
            kept = json.loads(self._path.read_text())
            seconds = float(kept["seconds"])
            return seconds if kept["attempt"] == _name(key) and 0 <= seconds < float("inf") else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def due(self, now: float) -> bool:
        """Whether the last note was made at least `EVERY` seconds before `now`."""
        return now - self._noted >= EVERY

    def note(self, key: TaskKey, seconds: float, now: float) -> None:
        """Write it down where that is due. Not for the event loop: it waits for the disk."""
        if not self.due(now):
            return
        self._noted = now
        temporary = self._path.with_name(FILE + ".tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as out:
                json.dump({"attempt": _name(key), "seconds": seconds}, out)
                out.flush()
                os.fsync(out.fileno())
            fault("server.elapsed.written")
            temporary.replace(self._path)
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s: can't be written: %s; until it can, a restart counts the round's time from its last event and the time "
                    "the server was down may count too; free some space or look at the disk", self._path, error.strerror or error,
                )  # fmt: skip
            self._failing = True
        else:
            self._failing = False


def _name(key: TaskKey) -> list[str | int]:
    return [key.run, key.round, key.attempt]
