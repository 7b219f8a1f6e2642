"""A case and its result, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """What is done to one federation."""

    name: str
    faults: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Process (server, alpha, beta, export) -> faults for `common.faults`."""
    proxied: bool = False
    trace: bool = False
    must: bool = True
    """Whether every fault has to happen, and has to find something to act on."""
    power: str = ""
    """Which machine's disk is the storage fake's (server, alpha or export); then nothing unsynced outlives the case, either."""
    chance: int | None = None
    """Seed of what survives unsynced; None: nothing does."""
    eventful: bool = False
    """The federation in which more than usual happens by itself (`ground.Ground.liven`)."""
    refuse: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Device -> tasks it fails at, for a reference run in which nothing else goes wrong (`disturb`)."""


@dataclass
class Result:
    """What has become of it."""

    name: str
    outcome: str
    why: str
    seconds: float
    happened: list[str]
    """The faults that have happened; one that found nothing to act on says so."""
    restarts: int
    found: dict[str, Any]
    sources: str = ""
    """Digest of the sources it was played with (`sources.py`)."""
    commit: str = ""
