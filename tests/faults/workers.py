"""Worker processes at once: a host that has torch loaded and warm forks one for each daemon that asks.

A daemon starts its worker as ever, `sys.executable -m fp_client.worker`; in these tests `sys.executable` is a small script that
hands its descriptors and environment to the host, and ends as the worker does. The forked process runs the very code that the
module runs. Torch is imported here alone, and gRPC never: the two don't go through a fork together.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

STUB = """#!{python} -IS
import json, os, socket
host = socket.socket(socket.AF_UNIX)
host.connect({path!r})
body = json.dumps(dict(os.environ)).encode()
socket.send_fds(host, [len(body).to_bytes(4, "big")], [0, 1, 2])
host.sendall(body)
for fd in (0, 1, 2):
    os.close(fd)
code = int(host.recv(16) or b"70")
os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
"""


class WorkerHost:
    """The host's process, as the runner sees it."""

    def __init__(self, directory: Path) -> None:
        from fp_client.pool import worker_environment

        self.path, self.stub = directory / "workers.sock", directory / "worker"
        self.stub.write_text(STUB.format(python=os.path.realpath(sys.executable), path=str(self.path)))
        self.stub.chmod(0o755)
        with (directory / "workers.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.workers", str(self.path)],
                env={**worker_environment(1), "HF_HUB_OFFLINE": "1"}, stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip
        self._log = directory / "workers.log"

    def wait(self, seconds: float = 600) -> None:
        """Until it serves."""
        deadline = time.monotonic() + seconds
        while not self.path.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class _Ended(Exception):
    """The worker has."""


def _watch(host: socket.socket, worker: int) -> None:
    """Kill the worker when whoever asked for it is gone; tell its end."""

    def ended(_: int, __: FrameType | None) -> None:
        raise _Ended

    try:
        signal.signal(signal.SIGCHLD, ended)
        if os.waitpid(worker, os.WNOHANG) == (0, 0):
            host.recv(1)
            os.kill(worker, signal.SIGKILL)
            os._exit(0)
    except _Ended:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = os.waitpid(worker, 0)[1]
    host.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _work(fds: list[int], environment: dict[str, str]) -> int:
    from fp_client import worker

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if (Path(json.loads(environment.get("FP_FAULTS", "{}")).get("dir", "")) / "spill").exists():
        spill_all()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    return worker.main()


def spill_all() -> None:
    """Nothing a streamed training shelves stays in memory: a tiny model's activations would, in any budget."""
    from fp_client.spill import Spill

    begin = Spill.__init__

    def shelf(self: Spill, memory: int, directory: Path, device: Any = "cpu") -> None:
        begin(self, 0, directory, device)

    Spill.__init__ = shelf  # type: ignore[method-assign]


def _receive(host: socket.socket) -> tuple[list[int], dict[str, str]]:
    head, fds, _, _ = socket.recv_fds(host, 4, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        body += host.recv(size - len(body))
    return fds, json.loads(body)


def serve(path: str) -> None:
    """Load and warm what a worker needs, then fork one for each caller until standard input ends."""
    import gc

    import torch

    from common.types import Quantization
    from fp_client import pacing, tasks
    from fp_client.warmup import warm_up

    torch.set_num_threads(1)
    for quantization in Quantization:
        warm_up("cpu", torch.float32, quantization)
    pacing.ENOUGH = 0.0  # a pace is only for predicting
    tasks.warm_up = lambda *_: None  # type: ignore[assignment]  # every fork is warm already
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(16)
    Path(path + ".new").rename(path)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready and not os.read(0, 1):
            return
        if listener not in ready:
            continue
        host, _ = listener.accept()
        fds, environment = _receive(host)
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            worker = os.fork()
            if worker:
                for fd in (0, *fds):
                    os.close(fd)
                _watch(host, worker)
            host.close()
            code = 70
            try:
                code = _work(fds, environment)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        for fd in fds:
            os.close(fd)
        host.close()


if __name__ == "__main__":
    serve(sys.argv[1])
