"""A run as a sans-IO state machine: `handle(happening, now) -> list[Command]`.

It knows nothing of sockets, disks, threads or clocks. Its state is the fold of the run's events plus what
is not kept (who is connected, who made progress when). Whatever it decides that can't be derived again
from the log is asked for as a `Record` command, and takes effect when that event is handed back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.errors import TooLate
from common.types import TaskKey
from fp_server import events as e
from fp_server.commands import (
    Aggregate,
    Choose,
    Command,
    Connected,
    Disconnected,
    NotReceived,
    PlanConfirmed,
    ProgressSeen,
    Recovered,
    Revoked,
    SendCancel,
    SendEnded,
    SendPlanRequest,
    Stimulus,
    Tick,
)
from fp_server.decisions import after_close, decide
from fp_server.progress import begin_anew, count
from fp_server.roundstate import Member, Round, Stage
from fp_server.runstate import RunState


class RunMachine(RunState):
    """One run. `handle` is the only thing that changes it."""

    # -- what happens ----------------------------------------------------------------------------

    def handle(self, happening: e.Event | Stimulus, now: float) -> list[Command]:
        """Take in one event or stimulus at time `now` (seconds); returns what must be done, in order."""
        out: list[Command] = []
        if isinstance(happening, e.Event):
            self.told_at = now
        match happening:
            case e.PlanReceived():
                self.plans[happening.device] = happening
                self.stale.discard(happening.device)
            case PlanConfirmed():
                self.stale.discard(happening.device)
            case e.RoundOpened():
                self._on_opened(happening, now, out)
            case e.ProbeReceived():
                self._on_probe(happening, now, out)
            case e.Assigned():
                if (member := self._member(happening.device, happening.key)) and member.stage is Stage.CHOOSING:
                    member.assigned, member.stage, member.progress_at = happening, Stage.TRAINING, now
                    member.reached.clear()
                    if member.probe is not None:  # the matrix has served; a long run must not keep them all
                        member.probe = replace(member.probe, similarity=np.empty((0, 0), np.float32))
                    self._send_task(happening.device, out)
            case e.UpdateAccepted():
                if (member := self._member(happening.device, happening.key)) and not member.settled:
                    member.accepted, member.stage = happening, Stage.DONE
                    self._ask(happening.device, out)
            case e.DeviceDropped():
                member = self._member(happening.device, happening.key)
                if member and (not member.settled or (member.stage is Stage.DONE and happening.revoked)):
                    member.accepted, member.dropped, member.stage = None, happening, Stage.DROPPED
                    self._cancel(happening.device, happening.key, happening.message, out)
                    self._ask(happening.device, out)
            case e.UpdatesLost():
                self._on_lost(happening, now, out)
            case e.RoundClosed():
                self._on_closed(happening, now, out)
            case e.UpdatesReviewed():
                self._on_reviewed(happening, out)
            case e.RoundCommitted():
                self._on_committed(happening, now)
            case e.RunPaused():
                self.paused = happening.reason
            case e.RunResumed():
                self.paused, self.failures = None, 0
            case e.RunEnded():
                self._on_ended(happening, out)
            case Connected():
                self.connected.add(happening.device)
                self.revoked.discard(happening.device)
                self.stale.add(happening.device)
                self._greet(happening.device, out)
            case Disconnected():
                self.connected.discard(happening.device)
            case Revoked():
                self.connected.discard(happening.device)
                self.revoked.add(happening.device)
            case ProgressSeen():
                self._on_progress(happening, now)
            case NotReceived():
                if (member := self._member(happening.device, happening.key)) is not None:
                    member.progress_at = now
            case Recovered():
                self._on_recovered(happening.elapsed, now, out)
            case Tick() | e.RunStarted():
                pass
        out.extend(decide(self, now))
        return out

    def pardon(self, seconds: float, now: float) -> None:
        """So much time until now was not the devices': the server could not write down what they said."""
        for member in self.current.members.values() if self.current is not None else ():
            member.progress_at = min(now, member.progress_at + seconds)
            member.moved_at = min(now, member.moved_at + seconds)

    def _member(self, device: str, key: TaskKey) -> Member | None:
        if self.current is None or self.current.opened.key != key or self.current.closed is not None:
            return None
        return self.current.members.get(device)

    def _on_opened(self, event: e.RoundOpened, now: float, out: list[Command]) -> None:
        self.current = Round(event, now, {device: Member(progress_at=now) for device in event.drawn})
        for device in event.drawn:
            self._send_task(device, out)

    def _on_probe(self, event: e.ProbeReceived, now: float, out: list[Command]) -> None:
        member = self._member(event.device, event.key)
        if member is None or member.stage is not Stage.PROBING:
            return
        member.probe, member.progress_at = event, now
        if self.current is not None and self.current.opened.evaluate:
            member.stage = Stage.DONE
            self._ask(event.device, out)
        else:
            member.stage = Stage.CHOOSING
            out.append(Choose(event.key, event.device))

    def _on_closed(self, event: e.RoundClosed, now: float, out: list[Command]) -> None:
        assert self.current is not None
        self.current.closed, self.idle_since = event, now
        self.current.reviewed = None  # a round that was opened again is compared again
        for device, member in self.current.members.items():
            member.outlier = ""
            if not member.settled:
                self._cancel(device, event.key, event.reason, out)
                self._ask(device, out)
        if event.aggregate and not self.current.opened.evaluate:
            out.append(after_close(self, self.current))
            return
        self._give_up(self.current)

    def _on_reviewed(self, event: e.UpdatesReviewed, out: list[Command]) -> None:
        assert self.current is not None
        self.current.reviewed = event
        for device, reason in event.outliers.items() if event.reject else ():
            self.current.members[device].outlier = reason
        if sum(member.counts for member in self.current.members.values()) >= self.config.run.min_updates:
            out.append(Aggregate(event.key))
        else:
            self._give_up(self.current)

    def _give_up(self, current: Round) -> None:
        """A round ends without anything to aggregate."""
        self.history.append(current, None)
        if current.opened.evaluate and current.opened.key.round < self.config.run.rounds:
            self.evaluated, self.attempt = current.opened.drawn, self.attempt + 1
        elif current.opened.evaluate:
            self.next_round += 1
        else:
            self.attempt, self.failures = self.attempt + 1, self.failures + 1
        self.current = None

    def _on_lost(self, event: e.UpdatesLost, now: float, out: list[Command]) -> None:
        if self.current is None or self.current.opened.key != event.key:
            return
        closed, self.current.closed = self.current.closed, None
        for device, member in self.current.members.items():
            if closed is not None and not member.settled:  # these were told that the round is over
                member.dropped = e.DeviceDropped(self.name, event.key, device, TooLate.__name__, closed.reason)
                member.stage = Stage.DROPPED
            if device in event.lost and member.accepted is not None:
                member.accepted, member.stage, member.progress_at = None, Stage.TRAINING, now
                member.reached.clear()
                self._send_task(device, out)

    def _on_committed(self, event: e.RoundCommitted, now: float) -> None:
        assert self.current is not None
        for unit in event.units:
            self.ledger[unit.layer], self.broadcast[unit.layer] = unit.ledger, unit.broadcast
        self.history.append(self.current, event)
        self.current, self.idle_since = None, now
        self.next_round, self.attempt, self.failures = self.next_round + 1, 0, 0

    def _on_ended(self, event: e.RunEnded, out: list[Command]) -> None:
        if self.current is not None:
            for device, member in self.current.members.items():
                if not member.settled:
                    self._cancel(device, self.current.opened.key, f"the run {event.outcome}", out)
            self.history.append(self.current, None)
            self.current = None
        self.ended = event
        out.extend(SendEnded(device, self.name, event.outcome) for device in sorted(self.connected))

    def _on_progress(self, seen: ProgressSeen, now: float) -> None:
        member = self._member(seen.device, seen.key)
        if member is None:
            return
        count(self.config, member, seen, now, sum(ref.size for ref in self.broadcast.values()))

    def _on_recovered(self, elapsed: float | None, now: float, out: list[Command]) -> None:
        self.idle_since = now
        if self.current is None:
            return
        # The time the server was down is not the round's, and how far the clock was set meanwhile is no time at all.
        self.current.opened_at = now - (self.told_at - self.current.opened_at if elapsed is None else elapsed)
        for device, member in self.current.members.items():
            member.progress_at = now  # silence while the server was down is not the device's
            if member.stage is Stage.CHOOSING:
                out.append(Choose(self.current.opened.key, device))
        if self.current.closed is not None:
            out.append(after_close(self, self.current))

    # -- what is said to devices -----------------------------------------------------------------

    def _send_task(self, device: str, out: list[Command]) -> None:
        if device in self.connected and (task := self.task(device)) is not None:
            out.append(task)

    def _cancel(self, device: str, key: TaskKey, reason: str, out: list[Command]) -> None:
        if device in self.connected:
            out.append(SendCancel(device, key, reason))

    def _greet(self, device: str, out: list[Command]) -> None:
        if self.ended is not None:
            return
        if (task := self.task(device)) is not None:
            if self.current is not None:
                begin_anew(self.current.members[device])
            out.append(task)
        elif self.current is None or self.current.closed is not None or self.idle(device):
            # Asked at every connection: the budget may have changed while the device was away.
            out.append(SendPlanRequest(device, self.spec))

    def _ask(self, device: str, out: list[Command]) -> None:
        """Ask a device that reconnected during its task, now that it is free again."""
        if device in self.stale & self.connected and self.ended is None:
            out.append(SendPlanRequest(device, self.spec))
