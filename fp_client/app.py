"""The daemon put together: configuration, connection, agent, signals, and the lock on the device directory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from common.ending import end_within
from common.errors import InUseError, StorageError
from common.logs import OneLine
from common.transport.tls import exposed
from common.transport.wire import Backoff
from fp_client.agent import Agent
from fp_client.cache import ObjectCache
from fp_client.config import ClientConfig, cache_dir, load_config, need_server
from fp_client.health import tell
from fp_client.policy import load_policy
from fp_client.rebudget import take_up
from fp_client.renewal import stay_valid
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer
from fp_client.state import Outbox, Runs
from fp_client.work import LocalWork

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (seconds), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(as_json: bool, verbose: bool = False) -> None:
    """Send the logs to standard error, for people or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else OneLine())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


@contextlib.contextmanager
def only_daemon(directory: Path) -> Iterator[None]:
    """Hold the device directory. Raises InUseError when another daemon does."""
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InUseError(f"{directory}: another fp-client runs on this directory; stop it, or use another --dir") from None
        yield
    finally:
        os.close(fd)


def backoff_of(config: ClientConfig) -> Backoff:
    """The [retry] section as a backoff."""
    return Backoff(config.retry.first_seconds, config.retry.longest_seconds, attempts=config.retry.attempts)


async def serve(directory: Path) -> None:
    """Run the daemon until SIGTERM or SIGINT (returns), or an error that ends it (raises)."""
    config, policy = load_config(directory), load_policy(directory)
    address = need_server(config, directory)
    connection = Connection(directory, address, backoff_of(config))
    cache = ObjectCache(cache_dir(config, directory) / "objects", config.cache.max_size)
    work = LocalWork(config, directory)
    outbox = Outbox(directory / "outbox")
    outbox.sweep()  # what is left of runs whose end was not heard
    agent = Agent(
        connection.open, Transfer(connection), work, policy, cache,
        Runs(directory / "runs"), outbox, connection.backoff,
    )  # fmt: skip
    running = asyncio.create_task(agent.run())
    telling = asyncio.create_task(tell(directory, address, lambda: agent.link))
    renewing = asyncio.create_task(stay_valid(connection, agent.reconnect))
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:
            log.info("stopping: the task under way is ended; a finished update is kept for the next start")
            end_within(config.grace_seconds)
            running.cancel()
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    beside: set[asyncio.Task[object]] = {telling, renewing}

    def hang_up() -> None:
        beside.add(reading := asyncio.create_task(take_up(directory, work, agent)))
        reading.add_done_callback(beside.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    log.info("device directory %s, server %s", directory, address)
    if problem := exposed(directory / "device.key"):
        log.warning("%s", problem)
    for section, there in (("[models]", config.models), ("[data]", config.data)):
        if not there:
            log.warning("client.toml has no %s yet: this device will be left out of every run", section)
    try:
        await running
    except asyncio.CancelledError:
        if not stopping:
            raise
        log.info("stopped")
    finally:
        ending = list(beside)
        for task in ending:
            task.cancel()
        await asyncio.wait(ending)
        await connection.close()


def run(directory: Path) -> None:
    """`serve` with the directory held. Raises ConfigError when it is no device directory."""
    load_config(directory)
    with only_daemon(directory):
        asyncio.run(serve(directory))
