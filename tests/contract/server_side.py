"""A real `fp-server` process in a temporary directory, and devices that speak raw gRPC to it, without torch.

A device here answers every task with values made from its name and the round alone, so that runs can be
compared byte for byte; its hooks let a test act at any point of a round.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from ports import free_port

from common import config as configuration
from common.blocks import write_blocks
from common.checkpoint import dump_manifest
from common.pb import admin_pb2, admin_pb2_grpc, objects_pb2, objects_pb2_grpc, session_pb2, session_pb2_grpc
from common.transport import serde, tls, wire
from common.types import (
    Assignment,
    Capacity,
    Gradient,
    LoraBlock,
    ModelManifest,
    ModuleShape,
    ObjectRef,
    Part,
    PlanReport,
    ProbeReport,
    ProbeTask,
    TaskKey,
    UpdateMetrics,
    UpdateReady,
    model_units,
    unit_modules,
)
from fp_server.app import initialise
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.health import read_endpoint
from fp_server.identity import Authority
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore
from fp_server.rounds import RunMachine

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
"""What a client sees of a server that went away; INTERNAL: in the middle of a write."""

MODULES = (ModuleShape("mlp.down_proj", 16, 24), ModuleShape("self_attn.q_proj", 16, 16))
MANIFEST = ModelManifest("toy", "llama", 6, 16, 64, MODULES, "ab" * 32)
RUN = """
[run]
name = "toy-run"
rounds = 2
seed = 7
min_devices = 2
devices_per_round = 1.0
max_attempts = 2
[model]
name = "toy"
manifest = "toy.json"
[lora]
rank = 2
alpha = 4.0
broadcast_rank = 4
start = "{start}"
[train]
steps = 2
batch_size = 2
sequence_length = 16
[probe]
positions = 16
"""


def run_toml(start: str = "fresh", **values: Any) -> str:
    """A run file; `values` replace or add keys of ``[run]``, ``lora_…`` of ``[lora]``, and so for limits, train and pruning."""
    text = RUN.format(start=start)
    lines = text.splitlines()
    for name, value in values.items():
        section, _, key = name.partition("_")
        section, key = (section, key) if section in ("lora", "limits", "train", "pruning") else ("run", name)
        if f"[{section}]" not in lines:
            lines.append(f"[{section}]")
        begin = lines.index(f"[{section}]") + 1
        end = next((i for i in range(begin, len(lines)) if lines[i].startswith("[")), len(lines))
        lines[begin:end] = [line for line in lines[begin:end] if not line.startswith(f"{key} =")]
        lines.insert(begin, f"{key} = {json.dumps(value)}")
    return "\n".join(lines)


class Server:
    """A server directory and, between `start` and `stop`, the process on it."""

    def __init__(self, directory: Path, devices: tuple[str, ...] = ("alice", "bob")) -> None:
        self.directory = directory
        self.port = free_port()
        initialise(directory, ["localhost"], "127.0.0.1", self.port, 0)
        for name in devices:
            self.identity(name)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def devices(self) -> Path:
        """Where the devices keep their certificates, a directory each."""
        return self.directory.parent / f"{self.directory.name}-devices"

    def identity(self, name: str, role: str = "device", days: float = 1.0) -> Path:
        """A directory with a certificate the server's own CA made, through a token."""
        return self.identities([name], role, days)[0]

    def identities(self, names: Sequence[str], role: str = "device", days: float = 1.0) -> list[Path]:
        """The same for many names."""
        database = Database(self.directory / "log.sqlite")
        try:
            authority = Authority(self.directory, database)

            async def join(name: str) -> Path:
                key = tls.new_key()
                token = await authority.create_token(name, role, 60, "localhost:1", "localhost:2")
                pem, _, _ = await authority.enroll(token.secret, tls.make_csr(key, "ignored"), days)
                return write_identity(self.devices / name, authority.ca_pem, pem, key)

            async def join_all() -> list[Path]:
                return [await join(name) for name in names]

            return asyncio.run(join_all())
        finally:
            database.close()

    def start(self) -> None:
        """Start the process; returns when it serves."""
        (self.directory / "endpoint.json").unlink(missing_ok=True)
        with (self.directory / "server.log").open("ab") as log:
            command = [sys.executable, "-c", "from fp_server.cli import main; main()", "run", "--dir", str(self.directory)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONWARNINGS": "error"})
        deadline = time.monotonic() + 60
        while not (self.directory / "endpoint.json").exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        assert read_endpoint(self.directory).port == self.port

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code. Fails when the process was dead already."""
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.process = None
        return code

    def log(self) -> str:
        """What the process has said."""
        return (self.directory / "server.log").read_text()

    async def arriving(self, device: str, seconds: float = 20.0) -> None:
        """Wait until something of an update of the device's has arrived."""
        async with asyncio.timeout(seconds):
            while not any(path.stat().st_size for path in (self.directory / "partial" / device).glob("*")):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def peak(self) -> int:
        """VmHWM in bytes."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no VmHWM")

    @contextlib.contextmanager
    def folded(self, run: str = "") -> Iterator[RunMachine]:
        """A run's state, folded from the log on disk."""
        database = Database(self.directory / "log.sqlite")
        try:
            config = configuration.load(self.directory / "server.toml", ServerConfig)
            coordinator = Coordinator(config, EventLog(database), ObjectStore(self.directory))
            coordinator.names = coordinator.log.runs()
            yield coordinator.run(run)
        finally:
            database.close()

    def ledger(self, run: str = "") -> dict[int, str]:
        """Layer -> digest of its ledger object."""
        with self.folded(run) as machine:
            return {layer: ref.digest for layer, ref in machine.ledger.items()}

    def credentials(self, name: str) -> grpc.ChannelCredentials:
        return tls.client_credentials(self.devices / name)

    @contextlib.asynccontextmanager
    async def channel(self, name: str) -> AsyncIterator[grpc.aio.Channel]:
        """A device's channel."""
        async with grpc.aio.secure_channel(self.address, self.credentials(name), wire.options(wire.CHANNEL_OPTIONS)) as channel:
            yield channel

    @contextlib.asynccontextmanager
    async def admin(self) -> AsyncIterator[admin_pb2_grpc.AdminAsyncStub]:
        """The operator's service."""
        credentials = tls.client_credentials(self.directory, "operator")
        async with grpc.aio.secure_channel(self.address, credentials, wire.options(wire.CHANNEL_OPTIONS)) as channel:
            yield admin_pb2_grpc.AdminStub(channel)

    async def begin(self, toml: str, manifest: ModelManifest = MANIFEST) -> str:
        """Start a run."""
        async with self.admin() as admin:
            request = admin_pb2.StartRunRequest(toml=toml, manifest=dump_manifest(manifest))
            return str((await admin.StartRun(request, timeout=20)).run)

    async def status(self, run: str = "", last_rounds: int = 0) -> dict[str, Any]:
        """A run's status; 0: the usual last rounds."""
        request = admin_pb2.StatusRequest(run=run, last_rounds=last_rounds)
        async with self.admin() as admin:
            return dict(json.loads((await admin.GetStatus(request, timeout=20)).json))

    async def until(self, ready: Callable[[dict[str, Any]], bool], seconds: float = 60.0, run: str = "") -> dict[str, Any]:
        """Watch until a status is as wanted."""
        async with asyncio.timeout(seconds), self.admin() as admin:
            async for message in admin.WatchStatus(admin_pb2.StatusRequest(run=run)):
                seen = json.loads(message.json)
                if ready(seen):
                    return dict(seen)
        raise AssertionError(f"the watch ended; the server said:\n{self.log()}")


def write_identity(directory: Path, ca_pem: str, pem: str, key: Any) -> Path:
    """ca.pem, device.pem and device.key in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca.pem").write_text(ca_pem)
    (directory / "device.pem").write_text(pem)
    tls.write_private(directory / "device.key", tls.key_pem(key))
    return directory


def seeded(*parts: object) -> np.random.Generator:
    """A generator that depends on these values alone."""
    return np.random.default_rng(list(hashlib.sha256(repr(parts).encode()).digest()))


def plan_report(
    run: str,
    manifest: ModelManifest = MANIFEST,
    units: int = 3,
    samples: int = 40,
    part: Part = Part.LAYER,
    modes: tuple[Gradient, ...] = (Gradient.SUBMODEL,),
) -> PlanReport:
    """An honest plan of a device that holds so many layers: 250 bytes of each are attention."""
    sizes = (1000,) if part is Part.LAYER else (250, 750)
    capacities = tuple(Capacity(mode, units * len(sizes), 1, True, 1 << 20, 0.5) for mode in modes)
    return PlanReport(run, samples, manifest.fingerprint, capacities, sizes * manifest.layers, 1 << 20, "", 1 << 21)


def probe_report(task: ProbeTask, device: str, layers: int) -> ProbeReport:
    """A valid similarity matrix: squared cosines of random vectors."""
    rng = seeded(device, task.key.round, "probe")
    layers = len(model_units(task.spec.part, layers))
    if not task.similarity:
        return ProbeReport(task.key, np.empty((0, 0), np.float32), np.empty(0, np.float32), 2.0 + rng.random(), 100, 5, 0.5)
    rows = rng.standard_normal((layers, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = np.square(rows @ rows.T).astype(np.float32)
    np.fill_diagonal(similarity, 1.0)
    in_out = rng.uniform(0.2, 0.95, layers).astype(np.float32)
    return ProbeReport(task.key, similarity, in_out, 2.0 + rng.random(), 100, 5 << 20, 0.5)


def blocks_of(assignment: Assignment, device: str, manifest: ModelManifest = MANIFEST) -> list[LoraBlock]:
    """An update for an assignment, made from the device and the round alone."""
    out = []
    for unit in assignment.units:
        for target in unit_modules(unit, assignment.spec.targets):
            shape = manifest.module(target)
            assert shape is not None
            rng = seeded(device, assignment.key.round, unit.layer, target)
            a = rng.standard_normal((assignment.spec.rank, shape.d_in), np.float32)
            b = 0.1 * rng.standard_normal((shape.d_out, assignment.spec.rank), np.float32)
            out.append(LoraBlock(unit.layer, target, a, b))
    return out


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Device:
    """A device daemon without the model. `hooks`: point -> what to do there, once a point."""

    server: Server
    name: str
    hooks: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    units: int = 3
    samples: int = 40
    manifest: ModelManifest = MANIFEST
    modes: tuple[Gradient, ...] = (Gradient.SUBMODEL,)
    chunk: int = 256
    seen: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    last_update: tuple[TaskKey, bytes] | None = None
    assignments: list[Assignment] = field(default_factory=list)
    make: Callable[[Assignment, Device], Awaitable[bytes] | bytes] | None = None
    """What to push instead of the honest update."""
    broken: BaseException | None = None
    _pushing: asyncio.Task[None] | None = None

    async def live(self) -> None:
        """Until the run's end is announced; connects again as often as needed."""
        try:
            while True:
                try:
                    if await self.session():
                        return
                except grpc.aio.AioRpcError as error:
                    self.errors.append(f"{error.code().name}: {error.details()}")
                    if error.code() not in GONE:
                        raise
                await asyncio.sleep(0.1)
        finally:
            await self._drop()

    async def _drop(self) -> None:
        if self._pushing is not None:
            self._pushing.cancel()
            await asyncio.wait({self._pushing})
            self._pushing = None
            if self.broken is not None:
                raise self.broken

    async def _hook(self, point: str) -> None:
        self.seen.append(point)
        if (hook := self.hooks.pop(point, None)) is not None:
            await hook()

    async def session(self) -> bool:
        """One session; True when the run ended."""
        async with self.server.channel(self.name) as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await call.write(hello())
            assert (await read(call)).welcome.device == self.name
            try:
                while True:
                    message = await read(call)
                    match message.WhichOneof("body"):
                        case "plan":
                            spec = serde.run_spec_from_pb(message.plan.spec)
                            report = plan_report(spec.run, self.manifest, self.units, self.samples, spec.part, self.modes)
                            await call.write(session_pb2.DeviceMessage(plan=serde.plan_report_to_pb(report)))
                            await self._hook("planned")
                        case "probe":
                            task = serde.probe_task_from_pb(message.probe)
                            report = probe_report(task, self.name, self.manifest.layers)
                            try:
                                for item in task.adapter:
                                    assert digest_of(await fetch(channel, item.ref.digest)) == item.ref.digest
                            except grpc.aio.AioRpcError as error:
                                if error_name(error) != "NotFound":
                                    raise
                                continue  # the round was closed meanwhile: its cancel is on the way
                            await call.write(session_pb2.DeviceMessage(probe=serde.probe_report_to_pb(report)))
                            await self._hook("probed" if task.similarity else "evaluated")
                        case "assignment":
                            assignment = serde.assignment_from_pb(message.assignment)
                            await self._drop()
                            await self._hook("assigned")
                            self._pushing = asyncio.create_task(self._train(call, channel, assignment))
                        case "cancel":
                            await self._hook("cancelled")
                            if self._pushing is not None:  # an answer to the push may be on its way
                                await asyncio.wait({self._pushing}, timeout=0.5)
                            await self._drop()
                        case "ended":
                            return True
            finally:
                call.cancel()
                await self._drop()

    async def _train(self, call: Any, channel: grpc.aio.Channel, assignment: Assignment) -> None:
        self.assignments.append(assignment)
        try:
            if self.make is None:
                data = self.honest(assignment)
            else:
                made = self.make(assignment, self)
                data = made if isinstance(made, bytes) else await made
            self.last_update = (assignment.key, data)
            await self.push(channel, ready_for(assignment.key, data), data)
            await self._hook("accepted")
        except grpc.aio.AioRpcError as error:
            self.errors.append(f"{error.code().name}: {error.details()}")
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):  # a test's own mistake must end the test, not its device
                self.broken = error
                call.cancel()
            raise

    def honest(self, assignment: Assignment) -> bytes:
        """The update's bytes."""
        path = self.server.devices / self.name / "update.safetensors"
        write_blocks(path, blocks_of(assignment, self.name, self.manifest))
        return path.read_bytes()

    async def push(self, channel: grpc.aio.Channel, ready: UpdateReady, data: bytes) -> bool:
        """Push from where the server stands; True for a duplicate."""
        stub = objects_pb2_grpc.ObjectsStub(channel)
        request = objects_pb2.OffsetRequest(key=serde.key_to_pb(ready.key), ref=serde.ref_to_pb(ready.ref))
        reply = await stub.Offset(request, timeout=20)
        if reply.accepted:
            return True

        async def pieces() -> AsyncIterator[objects_pb2.PushMessage]:
            yield objects_pb2.PushMessage(header=serde.ready_to_pb(ready, reply.offset))
            for begin in range(reply.offset, len(data), self.chunk):
                if begin >= len(data) // 2:
                    await self._hook("pushing")
                yield objects_pb2.PushMessage(chunk=objects_pb2.Chunk(data=data[begin : begin + self.chunk]))

        return bool((await stub.Push(pieces(), timeout=60)).duplicate)


def hello(schema: str = "") -> session_pb2.DeviceMessage:
    return session_pb2.DeviceMessage(hello=session_pb2.Hello(schema=schema or serde.schema(), version="test"))


async def read(call: Any) -> session_pb2.ServerMessage:
    """The next message of a session; the call's error when it has ended."""
    message = await call.read()
    if message is grpc.aio.EOF:
        raise grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), await call.trailing_metadata(), await call.details())
    assert isinstance(message, session_pb2.ServerMessage)
    return message


def ready_for(key: TaskKey, data: bytes, digest: str = "", size: int | None = None) -> UpdateReady:
    """The announcement of an update."""
    metrics = UpdateMetrics(3.0, 2.5, 100.0, 1 << 20, 1 << 20, 1.5, 0.75, 0.5, 0.25)
    return UpdateReady(key, ObjectRef(digest or digest_of(data), len(data) if size is None else size), metrics)


async def fetch(channel: grpc.aio.Channel, digest: str, offset: int = 0) -> bytes:
    """An object's bytes."""
    call = objects_pb2_grpc.ObjectsStub(channel).Fetch(objects_pb2.FetchRequest(digest=digest, offset=offset), timeout=20)
    return b"".join([chunk.data async for chunk in call])


def error_name(error: grpc.aio.AioRpcError) -> str:
    """The class name of the server's error."""
    return next((str(v) for k, v in error.trailing_metadata() or () if k == wire.ERROR_KEY), "")


async def whole_run(server: Server, devices: list[Device], toml: str, seconds: float = 30.0) -> dict[str, Any]:
    """Start a run with these devices and see it to its end; the final status."""
    run = await server.begin(toml)
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(device.live() for device in devices))
    except TimeoutError:
        said = {device.name: (device.seen, device.errors) for device in devices}
        with contextlib.suppress(grpc.aio.AioRpcError):  # the tests after this one get the server without this run
            async with server.admin() as admin:
                await admin.ControlRun(admin_pb2.ControlRunRequest(action="stop"), timeout=20)
        raise AssertionError(f"the run did not end; devices: {said}\n{server.log()}") from None
    return await server.status(run, last_rounds=100)


def calm_ledger(directory: Path, toml: str) -> dict[int, str]:
    """The ledger of a run of alice and bob that nothing happened to, on a server of its own."""
    server = Server(directory)
    server.start()
    try:
        asyncio.run(whole_run(server, [Device(server, "alice"), Device(server, "bob")], toml))
        assert server.stop() == 0
    finally:
        if server.process is not None:
            server.kill()
    return server.ledger()
