"""All runs of one log: the one under way, and the ended ones, folded when somebody asks for them."""

from __future__ import annotations

import asyncio

from common.errors import NotFound
from fp_server import folding
from fp_server.log import EventLog
from fp_server.rounds import RunMachine
from fp_server.roundstate import Entry

KEPT = 16
"""Ended runs whose folded state is kept for whoever asks."""


class Archive:
    """The runs by name."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.active: RunMachine | None = None
        self.names: list[str] = []
        """All runs', oldest first."""
        self._ended: dict[str, RunMachine] = {}

    def fold(self, run: str) -> RunMachine:
        """A run's state from its events. Raises NotFound, DamagedError."""
        return folding.fold(self.log, run)

    def past(self, run: str, index: int, count: int) -> list[Entry]:
        """At most `count` ended rounds of a run from the 0-based `index` on, read from the log. For a thread of its own."""
        return folding.past(self.log, run, index, count)

    def run(self, name: str) -> RunMachine:
        """A run by name, or the newest for an empty one. Raises NotFound."""
        name, there = self._named(name)
        return self._keep(self.fold(name)) if there is None else there

    async def look_up(self, name: str) -> RunMachine:
        """`run`, with the log read in a thread of its own where memory doesn't have it: nobody waits for the loop meanwhile."""
        name, there = self._named(name)
        return self._keep(await asyncio.to_thread(self.fold, name)) if there is None else there

    def _named(self, name: str) -> tuple[str, RunMachine | None]:
        """The name in full, and the run where memory has it. Raises NotFound for an empty name where there is no run."""
        if not name and not self.names:
            raise NotFound("no run has been started yet (`fp-server start RUN.toml`)")
        name = name or (self.active.name if self.active is not None else self.names[-1])
        return name, self.active if self.active is not None and self.active.name == name else self._ended.get(name)

    def _keep(self, machine: RunMachine) -> RunMachine:
        """An ended run never changes; a watched one is asked for twice a second."""
        if machine.ended is not None:
            while len(self._ended) >= KEPT:
                del self._ended[next(iter(self._ended))]
            self._ended[machine.name] = machine
        return machine
