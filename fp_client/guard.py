"""Holds a server to the owner's policy, to its own word, and to a pace; also over restarts of the daemon."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import PolicyError
from common.faults import fault
from common.files import make_directory
from common.types import Assignment, Part, PlanReport, ProbeTask, RunSpec, TaskKey
from fp_client import sanity
from fp_client.policy import FILE, Policy
from fp_client.rpc_objects import Sent

log = logging.getLogger(__name__)

HOURS = 24
RUNS = 64
"""Runs whose latest round is remembered."""


class Guard:
    """Every request of a server passes here before anything is done for it. `path`: what is remembered of earlier ones."""

    def __init__(self, policy: Policy, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.policy, self._path, self._clock = policy, path, clock
        self._hours: dict[int, int] = {}
        """Hour since the epoch -> tasks and plans begun in it."""
        self._rounds: dict[str, int] = {}
        """Run -> the latest round asked for, 0-based; the oldest run goes first."""
        self._sent: dict[tuple[str, int], Sent] = {}
        """(run, round) -> what was sent, in whatever attempts; of as many rounds as runs are remembered."""
        self._recall()

    def plan(self, spec: RunSpec) -> None:
        """May this device say what it can hold for such a run? Raises PolicyError, ProtocolError."""
        self.policy.check_plan(spec)
        sanity.check_run(spec)
        self._count()

    def probe(self, spec: RunSpec, task: ProbeTask, report: PlanReport | None) -> None:
        """May this be measured? Raises PolicyError, ProtocolError."""
        self.policy.check_plan(spec)  # again: the owner may have changed it since the run was planned
        self.policy.check_probe(spec, task)
        sanity.check_probe(spec, task, report)
        self._begin(task.key)

    def assignment(self, spec: RunSpec, task: Assignment, report: PlanReport | None) -> None:
        """May this be trained? Raises PolicyError, ProtocolError."""
        self.policy.check_plan(spec)
        self.policy.check_assignment(task)
        sanity.check_assignment(spec, task, report)
        self._begin(task.key)

    def sent(self, key: TaskKey) -> Sent:
        """The account of a round's uploads, to be counted on; a restart of the daemon begins it anew."""
        account = self._sent.setdefault((key.run, key.round), Sent())
        while len(self._sent) > RUNS:
            del self._sent[next(iter(self._sent))]
        return account

    def another(self, spec: RunSpec, task: Assignment) -> None:
        """May another update of the round be trained, with layers as large as in the one before it?

        Raises PolicyError: hours before the push would, which asks again, to the byte. Components differ in size: left to it.
        """
        account = self.sent(task.key)
        if account.units and spec.part is Part.LAYER:
            self.policy.check_upload(account.bytes + account.size * len(task.units) // account.units)

    def _begin(self, key: TaskKey) -> None:
        latest = self._rounds.get(key.run, key.round)
        if latest - key.round > self.policy.max_rounds_back:
            raise PolicyError(
                f"{FILE}: max_rounds_back: the server asks for round {key.round + 1} after round {latest + 1}, "
                f"this device allows {self.policy.max_rounds_back} back"
            )
        if key.round < latest:
            log.warning("run %s: the server has gone back from round %d to %d", key.run, latest + 1, key.round + 1)
        self._rounds.pop(key.run, None)  # to the end: the run that was heard of longest ago goes first
        self._rounds[key.run] = max(latest, key.round)
        while len(self._rounds) > RUNS:
            del self._rounds[next(iter(self._rounds))]
        self._count()

    def _count(self) -> None:
        hour = int(self._clock() // 3600)
        self._hours = {h: count for h, count in self._hours.items() if hour - HOURS < h <= hour}
        begun = sum(self._hours.values())
        if begun >= self.policy.max_tasks_a_day:
            raise PolicyError(
                f"{FILE}: max_tasks_a_day: the server has asked for {begun} plans, probes and trainings in {HOURS} hours, "
                f"this device allows {self.policy.max_tasks_a_day}"
            )
        self._hours[hour] = self._hours.get(hour, 0) + 1
        self._keep()

    def _keep(self) -> None:
        """Not synced: a count may be lost with the machine's power, not with the daemon."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            make_directory(self._path.parent)
            temporary.write_text(json.dumps({"hours": self._hours, "rounds": self._rounds}))
            fault("device.guard.written")
            temporary.replace(self._path)
        except OSError as error:
            log.warning("%s: can't be written, a restart would count anew: %s", self._path, error.strerror)

    def _recall(self) -> None:
        try:
            kept = json.loads(self._path.read_text())
            self._hours = {int(hour): int(count) for hour, count in kept["hours"].items()}
            self._rounds = {str(run): int(number) for run, number in kept["rounds"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: can't be read, counting begins anew: %s", self._path, error)
