"""What a session's messages cost the server: the service itself, without a connection."""

from __future__ import annotations

import numpy as np
from test_coordinator import database  # noqa: F401
from test_rounds import probed
from test_serving_objects import Open, counted, with_objects

from common.pb import session_pb2
from common.transport import serde
from common.types import ProbeReport
from fp_server.service import Sessions


def _report(key) -> session_pb2.ProbeReport:
    event = probed(key, "b")
    return serde.probe_report_to_pb(
        ProbeReport(key, event.similarity, event.in_out, event.loss, event.tokens, event.peak_bytes, event.seconds)
    )


def test_a_probe_is_decoded_when_it_is_waited_for_and_never_again(tmp_path, database, monkeypatch):  # noqa: F811
    """A matrix of 700 units costs tens of milliseconds of everybody's time."""

    def said(report) -> session_pb2.DeviceMessage:
        return session_pb2.DeviceMessage(probe=report)

    async def body(objects, coordinator, key):
        sessions, decoded = Sessions(coordinator, Open()), counted(monkeypatch, serde, "probe_report_from_pb")
        large = _report(key)
        large.units, large.similarity[:], large.in_out[:] = 700, np.ones(700 * 700).tolist(), [0.5] * 700
        for wrong in (("run", "other"), ("round", key.round + 1), ("attempt", key.attempt + 1)):
            other = session_pb2.ProbeReport()
            other.CopyFrom(large)
            setattr(other.key, *wrong)
            await sessions._hear("a", said(other))
        await sessions._hear("nobody", said(large))
        assert decoded == []
        await sessions._hear("b", said(_report(key)))
        assert len(decoded) == 1 and coordinator.active.current.members["b"].probe is not None
        await sessions._hear("a", said(large))  # waited for, and not the model's
        assert len(decoded) == 2 and coordinator.active.current.members["a"].dropped is not None
        for device in ("a", "b"):
            await sessions._hear(device, said(large))
        assert len(decoded) == 2

    with_objects(tmp_path, database, body)
