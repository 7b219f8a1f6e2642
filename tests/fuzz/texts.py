"""Decoders of text: the worker's pipe, the event log, files that people write, join tokens and certificate requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from functools import cache
from typing import Any

from server_side import MANIFEST, plan_report, probe_report, run_toml

from common import codec, types
from common import config as configuration
from common.checkpoint import dump_manifest, manifest_from_json
from common.errors import ConfigError, IdentityError, ModelError, StorageError, TokenError
from common.token import JoinToken
from common.transport import serde, tls
from fp_client import messages
from fp_client.config import ClientConfig
from fp_client.pace import Pace
from fp_client.policy import Policy
from fp_server import events as e
from fp_server.config import RunConfig, ServerConfig
from fp_server.identity import Authority
from fp_server.log import Database
from fp_server.outliers import Score
from fp_server.rounds import RunMachine
from fp_server.status import status
from fuzz.base import ASSIGNMENT, CONFIG, KEY, METRICS, PROBE, REF, SPEC, UNITS, Target, read_back, shared_memory
from fuzz.source import Source, changed

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
    """What the log holds: what is read of it is written the same way. A second byte of 1: a valid event, changed."""
    if not data:
        return
    kind, body = EVENT_KINDS[data[0] % len(EVENT_KINDS)], data[1:].decode(errors="replace")
    if data[1:2] == b"\1":
        source = Source(data[2:])
        kind, valid = source.of(_events())
        body = json.dumps(changed(json.loads(valid), source))
    try:
        found = e.decode(kind, body)
    except StorageError:
        return
    if _finite(json.loads(body)):  # what isn't is refused before it gets here; it would be written as null
        read_back(found)


def _finite(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@cache
def _events() -> list[tuple[str, str]]:
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
    return [e.encode(one) for one in events]


def event_seeds() -> list[bytes]:
    whole = [bytes((EVENT_KINDS.index(kind),)) + body.encode() for kind, body in _events()]
    return whole + [bytes((0, 1, n, 1, 2, 0, 1, 2, 0, 1)) for n in range(len(_events()))]


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
    read_back(e.RunStarted(config.run.name, "", MANIFEST, config.model_dump_json()))
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
def authority() -> tuple[Authority, asyncio.AbstractEventLoop]:
    """A CA in memory, and the loop its database is used in."""
    from fp_server.app import initialise

    directory = shared_memory("fuzz-ca-") / "server"
    initialise(directory, ["localhost"], "127.0.0.1", 0, 0)
    return Authority(directory, Database(directory / "log.sqlite")), asyncio.new_event_loop()


def csr(data: bytes) -> None:
    """Nobody has the token, so whatever the request is, no certificate comes of it."""
    signing, loop = authority()
    try:
        loop.run_until_complete(signing.enroll("no such secret", data.decode(errors="replace"), 1.0))
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
