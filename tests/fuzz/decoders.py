"""Every decoder of bytes that somebody else has made. A case passes when it decodes, or meets the decoder's own error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from server_side import MANIFEST, blocks_of, plan_report, probe_report, run_toml

from common import codec, types
from common import config as configuration
from common.blocks import parse_key, write_blocks
from common.checkpoint import dump_manifest, manifest_from_json
from common.errors import (
    ConfigError,
    FedPrunerError,
    IdentityError,
    ModelError,
    ProtocolError,
    StorageError,
    TokenError,
    UpdateRejected,
)
from common.pb import objects_pb2, session_pb2
from common.tensorfile import parse_header
from common.token import JoinToken
from common.transport import serde, tls
from fp_client import messages, says
from fp_client.config import ClientConfig
from fp_client.pace import Pace
from fp_client.policy import Policy
from fp_server import events as e
from fp_server.capacity import byte_limit, choose_capacity, plan_problem, refusal
from fp_server.config import RunConfig, ServerConfig
from fp_server.identity import Authority
from fp_server.log import Database
from fp_server.narrate import tell
from fp_server.outliers import Score
from fp_server.reports import _probe_problem
from fp_server.rounds import RunMachine
from fp_server.status import status
from fp_server.validation import check_metrics, check_update
from fuzz.source import Source, mutate


@dataclass(frozen=True)
class Target:
    """What is fuzzed: `run` raises whatever is a finding; `seeds` are valid inputs to begin from."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    longest: int = 4096


def shared_memory(prefix: str) -> Path:
    """A temporary directory, in memory where there is such a place."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


# -- protobuf -------------------------------------------------------------------------------------

KEY = types.TaskKey("toy-run", 0, 0)
CONFIG = configuration.parse(run_toml(), RunConfig, "seed")
SPEC = CONFIG.run_spec(MANIFEST)
REF = types.ObjectRef("ab" * 32, 1000)
PROBE = types.ProbeTask(KEY, CONFIG.probe_spec(1), (types.UnitObject(0, REF),))
UNITS = tuple(types.UnitId(n) for n in (0, 2, 5))
ASSIGNMENT = types.Assignment(
    KEY,
    UNITS,
    tuple((u,) for u in UNITS),
    ((1.0,),) * 3,
    CONFIG.train_spec(MANIFEST, 1e-4, 7),
    (types.UnitObject(2, REF),),
    1,
    True,
)
METRICS = types.UpdateMetrics(3.0, 2.5, 100.0, 1 << 20, 1 << 20, 1.5, 0.75, 0.5, 0.25, (0.1, 0.2))

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


def message_of(kind: type[Message], seeds: list[Any], data: bytes) -> Any:
    """A message: an even first byte takes the rest as it is, an odd one mutates a valid one. None: no protobuf at all."""
    if not data or data[0] % 2 == 0:
        try:
            return kind.FromString(data[1:])
        except DecodeError:
            return None
    source = Source(data[1:])
    message = kind()
    message.CopyFrom(source.of(seeds))
    mutate(message, source, 1 + source.below(4))
    return message


def as_seeds(seeds: list[Any]) -> list[bytes]:
    return [b"\0" + one.SerializeToString() for one in seeds] + [bytes((1, n, 0, n, 1, n)) for n in range(len(seeds))]


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
                _read_back(e.PlanReceived(report.run, "alice", report, 1))
            case "probe":
                r = serde.probe_report_from_pb(m.probe)
                _probe_problem(r, 6)
                _read_back(
                    e.ProbeReceived("r", r.key, "alice", r.similarity, r.in_out, r.loss, r.tokens, r.peak_bytes, r.seconds)
                )
            case "progress":
                serde.progress_from_pb(m.progress)
            case "failed":
                f = serde.failed_from_pb(m.failed)
                _read_back(e.DeviceDropped("r", f.key, "alice", f.error, f.message))
    except ProtocolError:
        pass


def _read_back(event: Any) -> None:
    """An event is kept for ever: what the log is given it must give back."""
    again = e.decode(*e.encode(event))
    assert e.encode(again) == e.encode(event), "the log gives back something else"


def server_message(data: bytes) -> None:
    """What a server says, as far as the device's policy."""
    if (m := message_of(session_pb2.ServerMessage, SERVER_MESSAGES, data)) is None:
        return
    policy = Policy()
    try:
        said = says.decode(m)
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
        check_metrics(ready.metrics)
        _read_back(e.UpdateAccepted("r", ready.key, "alice", ready.ref, ready.metrics))
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


# -- files ----------------------------------------------------------------------------------------


@cache
def _update() -> bytes:
    directory = shared_memory("fuzz-")
    try:
        write_blocks(directory / "update", blocks_of(ASSIGNMENT, "alice"))
        return (directory / "update").read_bytes()
    finally:
        shutil.rmtree(directory)


def _patched(data: bytes, valid: bytes) -> bytes:
    """An even first byte: the rest as it is. An odd one: the valid file with bytes overwritten, cut or added."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    source, out = Source(data[1:]), bytearray(valid)
    for _ in range(1 + source.below(6)):
        at = min(len(out), source.byte() << 8 | source.byte())
        match source.below(4):
            case 0:
                piece = source.bytes(8)
                out[at : at + len(piece)] = piece
            case 1:
                del out[at : at + source.byte()]
            case 2:
                out[at:at] = source.bytes(8)
            case 3:
                out[at:at] = out[at : at + source.byte()]
    return bytes(out)


class _File:
    """Bytes as an open file with a name."""

    def __init__(self, data: bytes) -> None:
        self.fd, self.size = os.memfd_create("fuzz"), len(data)
        os.write(self.fd, data)
        self.path = Path(f"/proc/self/fd/{self.fd}")

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def tensor_header(data: bytes) -> None:
    with _File(_patched(data, _update())) as file:
        try:
            infos, metadata = parse_header(file.path, file.fd, file.size)
        except ModelError:
            return
        assert sum(info.size for info in infos.values()) <= file.size and isinstance(metadata, dict)


def update(data: bytes) -> None:
    content = _patched(data, _update())
    with _File(content) as file:
        try:
            check_update(file.path, ASSIGNMENT, MANIFEST, 1e6)
        except UpdateRejected:
            return
    # What passes holds the same tensors: only their values may be others.
    assert len(content) >= len(_update()) - 512


def block_key(data: bytes) -> None:
    try:
        layer, module, factor = parse_key(data.decode(errors="replace"))
    except UpdateRejected:
        return
    assert 0 <= layer < 10**6 and factor in "AB" and ".." not in module and "/" not in module


# -- text -----------------------------------------------------------------------------------------

PIPE: tuple[Any, ...] = (
    messages.WorkerConfig, messages.Ready, messages.CheckArgs, messages.CheckResult, messages.PaceArgs, Pace, messages.ProbeArgs,
    types.ProbeReport, messages.FidelityArgs, messages.FidelityResult, messages.TrainArgs, messages.TrainResult, types.RunSpec,
    types.UpdateReady, messages.AdapterFile,
)  # fmt: skip


def pipe(data: bytes) -> None:
    """What crosses the pipe between daemon and worker, and the daemon's own files: ValueError, and nothing else."""
    if not data:
        return
    try:
        value = json.loads(data[1:])
    except (ValueError, RecursionError):
        return
    kind = PIPE[data[0] % len(PIPE)]
    try:
        made = codec.from_json(kind, value)
    except ValueError:
        return
    codec.to_json(made)


def pipe_seeds() -> list[bytes]:
    task = probe_report(PROBE, "alice", 3)
    values = {
        types.ProbeReport: task, types.RunSpec: SPEC, types.UpdateReady: types.UpdateReady(KEY, REF, METRICS),
        messages.ProbeArgs: messages.ProbeArgs(PROBE, (messages.AdapterFile(1, "x"),)),
        messages.Ready: messages.Ready(1, 2, "cpu"),
        messages.TrainArgs: messages.TrainArgs(ASSIGNMENT, (), "x"), messages.TrainResult: messages.TrainResult(METRICS),
        messages.CheckArgs: messages.CheckArgs(3),
    }  # fmt: skip
    return [bytes((PIPE.index(kind),)) + json.dumps(codec.to_json(value)).encode() for kind, value in values.items()]


EVENT_KINDS = (
    "RunStarted", "PlanReceived", "RoundOpened", "ProbeReceived", "Assigned", "UpdateAccepted", "DeviceDropped", "RoundClosed",
    "RoundCommitted", "RunPaused", "RunResumed", "RunEnded", "Nonsense", "UpdatesLost", "UpdatesReviewed",
)  # fmt: skip


def event(data: bytes) -> None:
    if not data:
        return
    try:
        found = e.decode(EVENT_KINDS[data[0] % len(EVENT_KINDS)], data[1:].decode(errors="replace"))
    except StorageError:
        return
    e.encode(found)


def event_seeds() -> list[bytes]:
    report = probe_report(PROBE, "alice", 3)
    events: list[Any] = [
        e.RunStarted("r", run_toml(), MANIFEST, CONFIG.model_dump_json()),
        e.PlanReceived("r", "a", plan_report("r"), 5),
        e.RoundOpened("r", KEY, ("a", "b"), ("a",), {"c": "why"}),
        e.ProbeReceived("r", KEY, "a", report.similarity, report.in_out, 2.0, 5, 6, 7.0),
        e.Assigned("r", KEY, "a", UNITS, ASSIGNMENT.groups, ASSIGNMENT.probabilities, 0, 0, 1, True),
        e.UpdateAccepted("r", KEY, "a", REF, METRICS),
        e.UpdatesLost("r", KEY, {"a": "why"}),
        e.DeviceDropped("r", KEY, "a", "X", "why"),
        e.RoundClosed("r", KEY, True, "why"),
        e.UpdatesReviewed("r", KEY, {"a": Score(2, 1, 0.5, None)}, {"a": "why"}, True),
        e.RoundCommitted("r", KEY, (e.UnitCommit(1, REF, REF, ("a",), 0.1),), (2,), {"a": 5}, 1, 2),
        e.RunPaused("r", "why"), e.RunResumed("r"), e.RunEnded("r", "finished"),
    ]  # fmt: skip
    return [bytes((EVENT_KINDS.index(kind),)) + body.encode() for kind, body in map(e.encode, events)]


def token(data: bytes) -> None:
    try:
        found = JoinToken.decode(data.decode(errors="replace"))
    except TokenError:
        return
    assert JoinToken.decode(found.encode()) == found


def manifest(data: bytes) -> None:
    try:
        found = manifest_from_json(data.decode(errors="replace"), "fuzz")
    except ModelError:
        return
    assert manifest_from_json(dump_manifest(found), "fuzz") == found


def run_file(data: bytes) -> None:
    """A run file that is accepted must do for a whole run: what devices are told of it has to be sayable."""
    try:
        config = configuration.parse(data.decode(errors="replace"), RunConfig, "fuzz")
        config.check(MANIFEST)
    except ConfigError:
        return
    machine = RunMachine(config, MANIFEST)
    serde.run_spec_to_pb(machine.spec)
    serde.train_spec_to_pb(config.train_spec(MANIFEST, config.learning_rate(config.run.rounds - 1), 2**62))
    config.drawn(1000)
    _read_back(e.RunStarted(config.run.name, "", MANIFEST, config.model_dump_json()))
    json.dumps(status(machine, "", []))


CONFIGS = (ServerConfig, ClientConfig, Policy)


def config_file(data: bytes) -> None:
    if not data:
        return
    with contextlib.suppress(ConfigError):
        configuration.parse(data[1:].decode(errors="replace"), CONFIGS[data[0] % 3], "fuzz")


CONFIG_SEEDS = [
    b'\0names = ["x"]\nport = 1\n[limits]\nsessions = 5\n',
    b'\1server = "x:1"\nthreads = 1\n[budget]\nhost = "1GiB"\n[models."m"]\nsource = "x"\n[data]\nsource = "d"\n',
    b'\2models = ["m"]\nmax_steps = 5\ngradients = ["streamed"]\nstarts = ["fresh"]\nupload_loss = false\n',
]


@cache
def _authority() -> tuple[Authority, asyncio.AbstractEventLoop]:
    from fp_server.app import initialise

    directory = shared_memory("fuzz-ca-") / "server"
    initialise(directory, ["localhost"], "127.0.0.1", 0, 0)
    return Authority(directory, Database(directory / "log.sqlite")), asyncio.new_event_loop()


def csr(data: bytes) -> None:
    """Nobody has the token, so whatever the request is, no certificate comes of it."""
    authority, loop = _authority()
    try:
        loop.run_until_complete(authority.enroll("no such secret", data.decode(errors="replace"), 1.0))
    except IdentityError:
        return
    raise AssertionError("a certificate without a token")


def paging(data: bytes) -> None:
    source = Source(data)
    numbers = [int.from_bytes(source.bytes(4), "big") for _ in range(2)]
    made = status(_machine(), "", ["alice"], *numbers)
    assert len(made["history"]) <= 5 and made["history_first"] >= 1


@cache
def _machine() -> RunMachine:
    machine = RunMachine(CONFIG, MANIFEST)
    for attempt in range(5):
        key = types.TaskKey("toy-run", 0, attempt)
        machine.handle(e.RoundOpened("toy-run", key, ("a",), ("a",)), 0.0)
        machine.handle(e.RoundClosed("toy-run", key, False, "x"), 0.0)
    assert machine.history.total == 5
    return machine


TARGETS: dict[str, Target] = {
    "device message": Target(device_message, lambda: as_seeds(DEVICE_MESSAGES)),
    "server message": Target(server_message, lambda: as_seeds(SERVER_MESSAGES)),
    "push header": Target(push_header, lambda: as_seeds(HEADERS)),
    "messages' parts": Target(
        pieces, lambda: [bytes((n,)) + one for n, (seed, _) in enumerate(PIECES) for one in as_seeds([seed])]
    ),
    "tensor file": Target(tensor_header, lambda: [b"\0" + _update(), bytes((1, 0, 0, 0, 8))]),
    "update": Target(update, lambda: [b"\0" + _update(), bytes((1, 0, 1, 0, 8)), bytes((1, 3, 9, 0, 4, 1, 2, 3, 4))]),
    "tensor name": Target(block_key, lambda: [b"layers.3.self_attn.q_proj.lora_A", b"layers.0.x.lora_B"], 256),
    "worker's pipe": Target(pipe, pipe_seeds),
    "event": Target(event, event_seeds),
    "join token": Target(token, lambda: [JoinToken("h:1", "h:2", "ab" * 32, "s" * 43).encode().encode()], 1024),
    "manifest": Target(manifest, lambda: [dump_manifest(MANIFEST).encode()]),
    "run file": Target(
        run_file,
        lambda: [run_toml().encode(), run_toml("global", lora_targets=["q_proj"], limits_update_bytes=9000).encode()],
    ),
    "configuration": Target(config_file, lambda: CONFIG_SEEDS),
    "certificate request": Target(csr, lambda: [tls.make_csr(tls.new_key(), "alice").encode()]),
    "status pages": Target(paging, lambda: [bytes((4, 0, 0, 0, 3, 4, 0, 0, 0, 2))], 16),
}  # fmt: skip
