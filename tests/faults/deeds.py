"""What a fault point asks to have done from outside. A deed says whether it found something to act on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults import proxy

if TYPE_CHECKING:
    from tests.faults.fleet import Fleet

NOTHING = " (found nothing to act on)"
"""After the words of a deed that has not acted."""

PATTERNS = {
    "cache": "alpha/cache/objects/*", "outbox": "alpha/outbox/*.safetensors",
    "partial": "server/partial/*/*", "objects": "server/objects/*/*",
}  # fmt: skip


def act(fleet: Fleet, words: str) -> bool:
    """Do it now; whether there was something to do it to."""
    what, *rest = words.split(":")
    if what in ("kill", "term"):
        return fleet.kill(rest[0], signal.SIGKILL if what == "kill" else signal.SIGTERM)
    if what == "freeze":
        return fleet.freeze(rest[0], float(rest[1]))
    if what == "power":
        return fleet.lose_power(rest[0])
    if what == "jump":
        path = fleet.root / "marks" / rest[0] / "clock"
        path.write_text(str(float(path.read_text() if path.exists() else 0) + float(rest[1])))
        return True
    if what == "mischief":
        (fleet.root / "marks" / rest[0] / "mischief").write_text(rest[1])
        return True
    if what == "flip":
        found = flip(fleet.root, rest[0])
        fleet.flipped += found
        return bool(found)
    if what == "net":
        return proxy.tell(fleet.root / "proxy.sock", " ".join(rest)) > 0
    raise ValueError(words)


def flip(root: Path, where: str) -> list[str]:
    """Turn one bit of a file that is stored: of a device's cache or outbox, or of the server's arrivals or objects; which."""
    for path in sorted(root.glob(PATTERNS[where])):
        if not flippable(root, path):
            continue
        data = bytearray(path.read_bytes())
        if data:
            data[len(data) // 2] ^= 16
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.write(data)
            return [str(path.relative_to(root))]
    return []


def flippable(root: Path, path: Path) -> bool:
    """A ledger can only come from a backup, and what a worker is just writing has no digest yet by which to see the damage."""
    kind = root / "kept" / f"{path.name}.kind"
    return not path.name.endswith(".new.safetensors") and not (kind.exists() and kind.read_text() == "ledger")


class Asked:
    """The questions of processes that wait at a fault point; what can't be done yet is tried again until it can."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._later: list[tuple[Path, str]] = []

    def answer(self) -> None:
        """Do what is asked; a process goes on whether or not its deed has found something."""
        for path in (self._fleet.root / "marks").glob("*/*.asked"):
            done = path.with_suffix(".done")
            if not done.exists() and (words := path.read_text()):  # not caught between its creation and its writing
                self._try(path, words)
                done.touch()
        later, self._later = self._later, []
        for path, words in later:
            self._try(path, words)

    def _try(self, path: Path, words: str) -> None:
        if act(self._fleet, words):
            path.with_suffix(".acted").touch()
        else:
            self._later.append((path, words))


def acted(marks: Path, name: str, number: int, do: str) -> bool:
    """Whether a fault that has happened found something to act on."""
    if not do.startswith("ask:"):
        return True
    if not (marks / name / f"fault-{number}.acted").exists():
        return False
    _, what, *rest = do.split(":")  # the next message takes mischief along with it
    return what != "mischief" or not (marks / rest[0] / "mischief").exists()


def kills(name: str, at: str, do: str) -> bool:
    """Whether a fault ends a process that the fleet has to start again; a worker's end is its daemon's to mend."""
    own = do == "kill" and (not at.startswith("worker"))
    return own or do.split(":")[:2] in (["ask", "kill"], ["ask", "term"], ["ask", "power"])


def ended(pid: int) -> bool:
    """Whether a child has ended and is not waited for yet."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def thaw(frozen: list[tuple[float, int]], alive: set[int]) -> list[tuple[float, int]]:
    """Let those go on whose time has come; the others."""
    now = time.monotonic()
    for at, pid in frozen:
        if now >= at and pid in alive:
            os.kill(pid, signal.SIGCONT)
    return [(at, pid) for at, pid in frozen if now < at]
