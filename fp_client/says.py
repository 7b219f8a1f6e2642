"""What is said in a session, as values: messages in and out."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ProtocolError
from common.pb import session_pb2
from common.transport import serde
from common.types import Assignment, PlanReport, ProbeReport, ProbeTask, Progress, RunSpec, TaskFailed, TaskKey


@dataclass(frozen=True)
class Cancel:
    """The server drops a task."""

    key: TaskKey
    reason: str


@dataclass(frozen=True)
class RunEnded:
    """A run is over; `outcome` is finished, stopped or failed."""

    run: str
    outcome: str


@dataclass(frozen=True)
class Unreadable:
    """A plan request (no `key`) or task that does not decode: it is refused by its reason, and the session goes on."""

    run: str
    key: TaskKey | None
    error: ProtocolError


ServerSays = RunSpec | ProbeTask | Assignment | Cancel | RunEnded | Unreadable
DeviceSays = PlanReport | ProbeReport | Progress | TaskFailed


def decode(message: session_pb2.ServerMessage) -> ServerSays:
    """A server's message as a value. Raises ProtocolError for one that has no place here, or does not say what it is about."""
    body = message.WhichOneof("body")
    if body == "plan":
        run = serde.run_name(message.plan.spec.run, "spec.run")
        try:
            return serde.run_spec_from_pb(message.plan.spec)
        except ProtocolError as error:
            return Unreadable(run, None, error)
    if body in ("probe", "assignment"):
        key = serde.key_from_pb(message.probe.key if body == "probe" else message.assignment.key)
        try:
            return serde.probe_task_from_pb(message.probe) if body == "probe" else serde.assignment_from_pb(message.assignment)
        except ProtocolError as error:
            return Unreadable(key.run, key, error)
    if body == "cancel":
        return Cancel(serde.key_from_pb(message.cancel.key), plain(message.cancel.reason))
    if body == "ended":
        return RunEnded(serde.run_name(message.ended.run, "ended.run"), plain(message.ended.outcome))
    raise ProtocolError(f"the server sent an unexpected message ({body or 'empty'}); update fp-client")


def plain(text: str, most: int = 300) -> str:
    """A server's words, for the log: no line breaks or control characters, and not too many."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def encode(value: DeviceSays) -> session_pb2.DeviceMessage:
    """A value as a device's message."""
    if isinstance(value, PlanReport):
        return session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(value))
    if isinstance(value, ProbeReport):
        return session_pb2.DeviceMessage(probe=serde.probe_report_to_pb(value))
    if isinstance(value, Progress):
        return session_pb2.DeviceMessage(progress=serde.progress_to_pb(value))
    return session_pb2.DeviceMessage(failed=serde.failed_to_pb(value))
