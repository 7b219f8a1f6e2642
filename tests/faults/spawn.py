"""Daemons and commands at once: forked from this process, which has their code loaded and has never begun anything with it.

Each runs the program's own `main`, in a session of its own. This process must stay without threads and without gRPC's core
(imported, never used), or its forks would not be what a fresh process is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

ALONE = "this process must have no threads when it forks"


def preload() -> None:
    """Import what daemons and commands import when they begin; objects of a few kilobytes go in several pieces from now on."""
    import fp_server.app
    import fp_server.cli
    import fp_server.exporting
    import fp_server.operator  # noqa: F401
    from common.transport import wire
    from fp_server import transfer

    wire.CHUNK = transfer.CHUNK = 16 << 10


def spawn(work: Callable[[], object], log: Path, environment: dict[str, str]) -> int:
    """Fork and do `work` in the child, its output in `log`; its process id."""
    assert threading.active_count() == 1, ALONE
    pid = os.fork()
    if pid:
        return pid
    code: object = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives this test
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (fd, 1), (fd, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
        os.environ.update({"NO_COLOR": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        os.environ.update(environment)
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def program(
    name: str, arguments: Sequence[object], executable: Path | None = None, before: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    """The `main` of fp-server or fp-client with these arguments. `executable`: what a device starts as its worker; `before`:
    what is done first, in the new process."""

    def run() -> None:
        from fp_client import cli as client
        from fp_server import cli as server

        before()
        sys.argv = [name, *map(str, arguments)]
        if executable is not None:
            sys.executable = str(executable)
        (server if name == "fp-server" else client).main()

    return run


def exit_code(status: int) -> int:
    """As in `subprocess`: negative for a signal."""
    return os.waitstatus_to_exitcode(status)


def wait(pid: int) -> int:
    """Wait for a child's end; its exit code."""
    return exit_code(os.waitpid(pid, 0)[1])
