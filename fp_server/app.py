"""One server process: its directory, its ports, its lifetime."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from common import config as configuration
from common.ending import CLOSING, end_within
from common.errors import ConfigError, FedPrunerError, InUseError, StorageError
from common.faults import fault
from common.files import sync_directory
from common.pb import admin_pb2_grpc, enroll_pb2_grpc, objects_pb2_grpc, session_pb2_grpc
from common.transport.tls import ServerCertificate, exposed, private_directory, write_private
from common.transport.wire import SERVER_OPTIONS, options
from fp_server import broken_calls
from fp_server.access import Access
from fp_server.admin import Admin, Enrollment, Renewal
from fp_server.certificates import create_authority
from fp_server.config import ServerConfig
from fp_server.coordinator import Coordinator
from fp_server.gate import Gate, enroll_rules, main_rules
from fp_server.health import FILE, Endpoint, Health, host_port, local_host
from fp_server.identity import Authority
from fp_server.limits import (
    ENROLL_MESSAGE,
    HANDSHAKE_SECONDS,
    IDLE_SECONDS,
    MESSAGE,
    METADATA,
    STREAMS,
    Complaints,
    ServerLimits,
    raise_descriptors,
)
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore, storage_error, stored
from fp_server.own import OwnCertificates
from fp_server.service import Sessions
from fp_server.transfer import Objects

logger = logging.getLogger("fp_server")

HOUR = 3600.0
"""Seconds between looks at the server's own certificates."""
CONFIG_TEMPLATE = """\
# Written by `fp-server init`; every key is explained in docs/run-a-server.md.
names = [{names}]
listen = "{listen}"
port = {port}
enroll_port = {enroll_port}
"""


def initialise(directory: Path, names: list[str], listen: str, port: int, enroll_port: int) -> None:
    """Make a data directory with a CA, the server's and an operator's certificate.

    Raises ConfigError when the directory was initialised before: nothing is ever overwritten; StorageError when the disk is full.
    """
    if (directory / "server.toml").exists():
        raise ConfigError(f"{directory}: already initialised (it has a server.toml); choose another --dir")
    text = CONFIG_TEMPLATE.format(
        names=", ".join(json.dumps(name) for name in dict.fromkeys(names)), listen=listen, port=port, enroll_port=enroll_port
    )
    config = configuration.parse(text, ServerConfig, "fp-server init")
    with stored(directory):
        _initialise(directory, config, text)


def _initialise(directory: Path, config: ServerConfig, text: str) -> None:
    private_directory(directory)
    directory.chmod(0o700)
    create_authority(directory, config.names, config.certificate_days)
    database = Database(directory / "log.sqlite")
    try:
        OwnCertificates(directory, database).operator("operator", config.certificate_days)
    finally:
        database.close()
    write_private(directory / "server.toml", text.encode())
    sync_directory(directory.absolute().parent)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the data directory. Raises InUseError when another server does, ConfigError when there is none."""
    if not (directory / "server.toml").exists():
        raise ConfigError(f"{directory}: not a server directory; run `fp-server init --dir {directory} --name HOST` first")
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(f"{directory}: another fp-server is running on this directory") from None
        yield
    finally:
        os.close(fd)


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InUseError(f"{address}: can't listen there; is the port in use, or the address not this machine's?")
    return port


async def serve(directory: Path) -> None:
    """Run until SIGTERM or SIGINT. Raises InUseError, StorageError, IdentityError or ConfigError at the start."""
    with locked(directory):
        fault("server.start.locked")
        config = configuration.load(directory / "server.toml", ServerConfig)
        database = Database(directory / "log.sqlite")
        try:
            await _serve(directory, config, database)
        except OSError as error:  # at the start, mostly: what comes up later belongs to a call or a task
            raise storage_error(Path(error.filename or directory), error) from None
        finally:
            database.close()


def _keep_valid(directory: Path, own: OwnCertificates) -> None:
    """Whoever changes `names` in server.toml needs no restart for it: the file is read every time."""
    config = configuration.load(directory / "server.toml", ServerConfig)
    for name in own.keep_valid(config.names, config.certificate_days):
        logger.info("%s has been made anew", directory / name)


async def _stay_valid(directory: Path, own: OwnCertificates) -> None:
    """No certificate of this machine may run out under a server that runs for months."""
    while True:
        await asyncio.sleep(HOUR)
        try:
            await asyncio.to_thread(_keep_valid, directory, own)
        except (OSError, FedPrunerError) as error:
            logger.error("certificates could not be looked after, trying again in an hour: %s", error)


def _servers(limits: ServerLimits, main_gate: Gate, enroll_gate: Gate) -> tuple[grpc.aio.Server, grpc.aio.Server]:
    """The main and the enrollment server, each behind its gate."""
    bounds = options(
        SERVER_OPTIONS, max_concurrent_streams=STREAMS, absolute_max_metadata_size=METADATA, max_metadata_size=METADATA // 2,
        server_handshake_timeout_ms=int(HANDSHAKE_SECONDS * 1000), max_connection_idle_ms=int(IDLE_SECONDS * 1000),
    )  # fmt: skip
    main = grpc.aio.server(
        interceptors=[main_gate],
        options=options(bounds, max_allowed_incoming_connections=raise_descriptors(limits), max_receive_message_length=MESSAGE),
    )
    enroll = grpc.aio.server(
        interceptors=[enroll_gate],
        options=options(
            bounds, max_allowed_incoming_connections=limits.enroll_connections, max_receive_message_length=ENROLL_MESSAGE
        ),
    )
    return main, enroll


def _write_endpoint(directory: Path, at: Endpoint) -> None:
    temporary = directory / f"{FILE}.tmp"
    temporary.write_text(json.dumps(asdict(at)))
    fault("server.endpoint.written")
    temporary.replace(directory / FILE)


def _when_told_to_stop(grace: float) -> asyncio.Event:
    """Set by SIGTERM or SIGINT. From then on the process has `grace` seconds left, whatever is under way."""
    stopping = asyncio.Event()

    def stop() -> None:
        if not stopping.is_set():
            end_within(grace)
        stopping.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop)
    return stopping


async def _serve(directory: Path, config: ServerConfig, database: Database) -> None:
    stopping = _when_told_to_stop(config.grace_seconds)
    broken_calls.install()
    store, own = ObjectStore(directory), OwnCertificates(directory, database)
    authority = Authority(directory, database, config.limits.tokens)
    store.clear_scratch()
    _keep_valid(directory, own)
    for name in ("ca.key", "server.key", "operator.key"):
        if (directory / name).exists() and (problem := exposed(directory / name)):
            logger.warning("%s", problem)
    access = Access(authority)
    coordinator = Coordinator(config, EventLog(database), store)
    certificate = ServerCertificate(directory)
    objects, complaints = Objects(coordinator, access), Complaints()
    main_gate = Gate(main_rules(), config.limits, complaints, objects.no_turn)
    enroll_gate = Gate(enroll_rules(config.limits), config.limits, complaints)
    main, enroll = _servers(config.limits, main_gate, enroll_gate)
    port = _bind(main, host_port(config.listen, config.port), certificate.credentials(clients=True))
    enroll_port = _bind(enroll, host_port(config.listen, config.enroll_port), certificate.credentials(clients=False))
    sessions = Sessions(coordinator, access)
    main_gate.port = objects.port = sessions.port = port
    enroll_gate.port = enroll_port
    name = config.names[0]
    session_pb2_grpc.add_SessionsServicer_to_server(sessions, main)
    objects_pb2_grpc.add_ObjectsServicer_to_server(objects, main)
    admin_pb2_grpc.add_AdminServicer_to_server(
        Admin(coordinator, access, host_port(name, enroll_port), host_port(name, port)), main
    )
    enroll_pb2_grpc.add_RenewalServicer_to_server(Renewal(access, config.certificate_days), main)
    enroll_pb2_grpc.add_EnrollmentServicer_to_server(Enrollment(access, config.certificate_days), enroll)
    health = Health()
    for server in (main, enroll):
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await coordinator.start()
    await main.start()
    await enroll.start()
    health.serving = True
    fault("server.start.listening")
    try:
        with stored(directory / FILE):
            _write_endpoint(directory, Endpoint(port, enroll_port, local_host(config.listen)))
    except StorageError:  # nobody on this machine would find the server
        await asyncio.gather(main.stop(0), enroll.stop(0))
        await coordinator.stop()
        raise
    logger.info("serving %s on port %d (enrollment on %d)", ", ".join(config.names), port, enroll_port)
    watching = [asyncio.create_task(work) for work in (_stay_valid(directory, own), access.watch())]
    await stopping.wait()
    for task in watching:
        task.cancel()
    deadline = time.monotonic() + max(0.0, config.grace_seconds - CLOSING)
    logger.info("stopping: what is being received or aggregated has %.0f s", deadline - time.monotonic())
    health.serving = False
    fault("server.stop.draining")
    await coordinator.drain()
    patience = max(0.0, deadline - time.monotonic())
    await asyncio.gather(main.stop(patience), enroll.stop(patience))  # no new calls from here on
    fault("server.stop.closed")
    await coordinator.stop(max(0.0, deadline - time.monotonic()))
    await asyncio.gather(*watching, return_exceptions=True)
    with contextlib.suppress(StorageError):
        await authority.refusals.flush()
    logger.info("stopped")
