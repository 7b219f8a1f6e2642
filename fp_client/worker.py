"""The worker process: ``python -m fp_client.worker``. One task at a time, its messages on standard output.

See `fp_client.messages` for what is said. Standard output is kept for messages alone: descriptor 1
becomes standard error before any library is imported, so that nothing a library prints can get between.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from common.codec import from_json, to_json
from common.errors import BudgetError, FedPrunerError, WorkerError
from common.faults import arm, fault
from common.files import disk_full
from fp_client.messages import Ready, WorkerConfig


class Channel:
    """Messages in and out. The worker dies with its daemon: the end of its input ends the process at once."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._source:
            self._inbox.put(line)
        os._exit(0)

    def receive(self) -> dict[str, Any]:
        """The next message; waits for it."""
        message = json.loads(self._inbox.get())
        if not isinstance(message, dict):
            raise WorkerError("a message to the worker must be an object")
        return message

    def send(self, message: dict[str, Any]) -> None:
        """Write one message."""
        self._sink.write(json.dumps(message).encode() + b"\n")
        self._sink.flush()

    def progress(self, phase: str, done: int, total: int) -> None:
        """A sign of life."""
        self.send({"progress": [phase, done, total]})
        fault("worker.task.step", phase)


def report(error: BaseException) -> dict[str, Any]:
    """An exception as a message. Those not raised on purpose become WorkerError, the traceback goes to standard error."""
    if isinstance(error, FedPrunerError):
        message = {"error": type(error).__name__, "message": str(error)}
        return {**message, "smallest": error.smallest} if isinstance(error, BudgetError) else message
    if isinstance(error, OSError) and disk_full(error):
        return {"error": "StorageError", "message": f"{error.filename or 'the device'}: the disk is full; free some space"}
    traceback.print_exception(error, file=sys.stderr)
    memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
    if memory:
        text = str(error).strip().splitlines()[0] if str(error).strip() else "an allocation failed"
        return {"error": "BudgetError", "message": f"the task needs more memory than its budget: {text}", "smallest": 0}
    return {"error": "WorkerError", "message": f"unexpected {type(error).__name__}: {error}"}


def serve(channel: Channel) -> int:
    """Start up, then do tasks until the daemon goes away."""
    fault("worker.start")
    try:
        config = from_json(WorkerConfig, channel.receive()["config"])
        from fp_client.tasks import Tasks  # torch and the rest are imported here, where errors can be reported

        tasks = Tasks(config)
        fault("worker.ready")
        channel.send({"ready": to_json(Ready(os.getpid(), tasks.warmed_bytes, config.device))})
    except Exception as error:
        channel.send(report(error))
        return 1
    while True:
        try:
            message = channel.receive()
            kind = str(message.get("task"))
            fault("worker.task.begin", kind)
            result = tasks.run(kind, message.get("args"), channel.progress)
            fault("worker.task.done", kind)
            channel.send({"result": to_json(result), "worn": tasks.worn})
            fault("worker.task.said", kind)
        except Exception as error:
            channel.send(report(error))
            del error
            tasks.forget()


def volunteer() -> None:
    """Be the one that the kernel kills when the container's or the machine's memory is spent: this process's task is lost
    then and reported, and the daemon lives on. Anyone may raise their own score (proc(5)); other systems have none."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> int:
    """Volunteer, claim the descriptors, then serve."""
    arm(os.environ)
    volunteer()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return serve(Channel(sys.stdin.buffer, sink))


if __name__ == "__main__":
    raise SystemExit(main())
