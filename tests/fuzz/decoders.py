"""Every decoder of bytes that somebody else has made. A case passes when it decodes, or meets the decoder's own error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from server_side import MANIFEST, plan_report, probe_report

from common import codec, types
from common.blocks import parse_key
from common.errors import FedPrunerError, ModelError, ProtocolError, UpdateRejected
from common.pb import objects_pb2, session_pb2
from common.tensorfile import parse_header
from common.transport import serde
from fp_client.policy import Policy
from fp_client.rpc import heard
from fp_server import events as e
from fp_server.capacity import byte_limit, choose_capacity, plan_problem, refusal
from fp_server.narrate import tell
from fp_server.reports import _probe_problem
from fp_server.validation import check_metrics, check_update
from fuzz import clients, operators, texts
from fuzz.base import (
    ASSIGNMENT,
    CONFIG,
    KEY,
    METRICS,
    PROBE,
    REF,
    SPEC,
    File,
    Target,
    as_seeds,
    message_of,
    patched,
    read_back,
    valid_update,
)  # fmt: skip

DEVICE_MESSAGES = [
    session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(plan_report("toy-run"))),
    session_pb2.DeviceMessage(probe=serde.probe_report_to_pb(probe_report(PROBE, "alice", 6))),
    session_pb2.DeviceMessage(progress=serde.progress_to_pb(types.Progress(KEY, "train", 1, 2))),
    session_pb2.DeviceMessage(failed=serde.failed_to_pb(types.TaskFailed(KEY, "WorkerError", "it broke"))),
]
SERVER_MESSAGES = [
    session_pb2.ServerMessage(plan=session_pb2.PlanRequest(spec=serde.run_spec_to_pb(SPEC))),
    session_pb2.ServerMessage(probe=serde.probe_task_to_pb(PROBE)),
    session_pb2.ServerMessage(assignment=serde.assignment_to_pb(ASSIGNMENT)),
    session_pb2.ServerMessage(cancel=session_pb2.Cancel(key=serde.key_to_pb(KEY), reason="why")),
    session_pb2.ServerMessage(ended=session_pb2.RunEnded(run="toy-run", outcome="finished")),
]
HEADERS = [serde.ready_to_pb(types.UpdateReady(KEY, REF, METRICS), 0)]
PIECES: list[tuple[Any, Callable[[Any], Any]]] = [
    (serde.unit_to_pb(types.UnitId(3)), serde.unit_from_pb),
    (serde.key_to_pb(KEY), serde.key_from_pb),
    (serde.ref_to_pb(REF), serde.ref_from_pb),
    (serde.probe_spec_to_pb(PROBE.spec), serde.probe_spec_from_pb),
    (serde.train_spec_to_pb(SPEC.train), serde.train_spec_from_pb),
    (serde.run_spec_to_pb(SPEC), serde.run_spec_from_pb),
    (serde.plan_report_to_pb(plan_report("toy-run")), serde.plan_report_from_pb),
    (serde.probe_task_to_pb(PROBE), serde.probe_task_from_pb),
    (serde.probe_report_to_pb(probe_report(PROBE, "alice", 6)), serde.probe_report_from_pb),
    (serde.assignment_to_pb(ASSIGNMENT), serde.assignment_from_pb),
    (serde.progress_to_pb(types.Progress(KEY, "train", 1, 2)), serde.progress_from_pb),
    (serde.failed_to_pb(types.TaskFailed(KEY, "WorkerError", "it broke")), serde.failed_from_pb),
]


def device_message(data: bytes) -> None:
    """What a device says, as far as the server reads it: decoded, judged, logged and read back."""
    if (m := message_of(session_pb2.DeviceMessage, DEVICE_MESSAGES, data)) is None:
        return
    units = CONFIG.units(MANIFEST.layers)
    try:
        match m.WhichOneof("body"):
            case "plan":
                report = serde.plan_report_from_pb(m.plan)
                for gradient in types.Gradient:
                    capacity = choose_capacity(report, gradient, 1.0)
                    refusal(report, gradient)
                    if not plan_problem(report, MANIFEST, units) and capacity is not None:
                        byte_limit(report, capacity, units)
                read_back(e.PlanReceived(report.run, "alice", report, 1))
            case "probe":
                r = serde.probe_report_from_pb(m.probe)
                _probe_problem(r, 6)
                read_back(e.ProbeReceived("r", r.key, "alice", r.similarity, r.in_out, r.loss, r.tokens, r.peak_bytes, r.seconds))
            case "progress":
                serde.progress_from_pb(m.progress)
            case "failed":
                f = serde.failed_from_pb(m.failed)
                read_back(e.DeviceDropped("r", f.key, "alice", f.error, f.message))
    except ProtocolError:
        pass


def server_message(data: bytes) -> None:
    """What a server says, as far as the device's policy. What doesn't decode is None here too, as gRPC gives it to a device."""
    m, policy = message_of(session_pb2.ServerMessage, SERVER_MESSAGES, data), Policy()
    try:
        said = heard(m, "fuzz")
        if isinstance(said, types.RunSpec):
            policy.check_plan(said)
            assert codec.from_json(types.RunSpec, json.loads(json.dumps(codec.to_json(said)))) == said
        elif isinstance(said, types.ProbeTask):
            policy.check_probe(SPEC, said)
        elif isinstance(said, types.Assignment):
            policy.check_assignment(said)
            json.dumps(codec.to_json(said), sort_keys=True)
    except FedPrunerError as error:
        assert type(error).__name__ in ("ProtocolError", "PolicyError"), error


def push_header(data: bytes) -> None:
    if (m := message_of(objects_pb2.PushHeader, HEADERS, data)) is None:
        return
    try:
        ready = serde.ready_from_pb(m)
        check_metrics(ready.metrics, 2)
        read_back(e.UpdateAccepted("r", ready.key, "alice", ready.ref, ready.metrics))
        tell(e.UpdateAccepted("r", ready.key, "alice", ready.ref, ready.metrics))
    except (ProtocolError, UpdateRejected):
        pass


def pieces(data: bytes) -> None:
    """Each message of `serde` by itself."""
    if not data:
        return
    seed, decode = PIECES[data[0] % len(PIECES)]
    if (m := message_of(type(seed), [seed], data[1:])) is None:
        return
    with contextlib.suppress(ProtocolError):
        decode(m)


def tensor_header(data: bytes) -> None:
    with File(patched(data, valid_update())) as file:
        try:
            infos, metadata = parse_header(file.path, file.fd, file.size)
        except ModelError:
            return
        assert sum(info.size for info in infos.values()) <= file.size and isinstance(metadata, dict)


def update(data: bytes) -> None:
    content = patched(data, valid_update())
    with File(content) as file:
        try:
            check_update(file.path, ASSIGNMENT, MANIFEST, 1e6)
        except UpdateRejected:
            return
    # What passes holds the same tensors: only their values may be others.
    assert len(content) >= len(valid_update()) - 512


def block_key(data: bytes) -> None:
    try:
        layer, module, factor = parse_key(data.decode(errors="replace"))
    except UpdateRejected:
        return
    assert 0 <= layer < 10**6 and factor in "AB" and ".." not in module and "/" not in module


TARGETS: dict[str, Target] = {
    "device message": Target(device_message, lambda: as_seeds(DEVICE_MESSAGES)),
    "server message": Target(server_message, lambda: as_seeds(SERVER_MESSAGES)),
    "push header": Target(push_header, lambda: as_seeds(HEADERS)),
    "messages' parts": Target(
        pieces, lambda: [bytes((n,)) + one for n, (seed, _) in enumerate(PIECES) for one in as_seeds([seed])]
    ),
    "tensor file": Target(tensor_header, lambda: [b"\0" + valid_update(), bytes((1, 0, 0, 0, 8))]),
    "update": Target(update, lambda: [b"\0" + valid_update(), bytes((1, 0, 1, 0, 8)), bytes((1, 3, 9, 0, 4, 1, 2, 3, 4))]),
    "tensor name": Target(block_key, lambda: [b"layers.3.self_attn.q_proj.lora_A", b"layers.0.x.lora_B"], 256),
    **texts.TARGETS,
    **clients.TARGETS,
    **operators.TARGETS,
}  # fmt: skip
