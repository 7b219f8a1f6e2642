"""The daemon's handle on its worker process. Torch-free.

A task runs in a process of its own, kept warm between tasks and released when idle, so that an
out-of-memory kill or a CUDA fault ends the task and not the device, and memory goes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections import deque
from typing import Any, TypeVar

from common.codec import from_json, to_json
from common.errors import BY_NAME, BudgetError, FedPrunerError, WorkerError
from common.faults import fault
from fp_client.messages import OnProgress, Ready, WorkerConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc returns freed memory at once; without these one identical step peaked 30 % higher. The factors of LoRA have tens of
kilobytes: with a threshold above them they leave holes in the heap, later tensors fall into these, and a task after a larger
one peaked 50 MiB higher than the first of its process."""

_LINE = 16 << 20
"""The longest message a worker may send, in bytes: a similarity matrix is well under a megabyte."""


KERNELS = 64
"""Compiled matrix kernels kept: a step's worth of shapes (`fp_client.memory` counts them)."""


def worker_environment(threads: int) -> dict[str, str]:
    """The environment a worker runs in: this process's, malloc and threads pinned.

    OpenMP threads wait asleep: spinning ones starve each other when devices share a machine's cores.
    """
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    pinned["OMP_WAIT_POLICY"] = "PASSIVE"
    # oneDNN keeps a compiled kernel for every shape of a bf16 product, 0.8 MiB each and a thousand of them by default: with
    # rows of ever other lengths that is more than the model.
    pinned |= dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(KERNELS))
    return {**os.environ, **MALLOC, **pinned, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


class Worker:
    """Runs one task at a time in a child process.

    `idle_seconds`: how long the warm process is kept without a task. Use as an async context manager,
    or call `close`.
    """

    def __init__(self, config: WorkerConfig, idle_seconds: float = 300.0, start_seconds: float = 300.0) -> None:
        self.config = config
        self.idle_seconds, self.start_seconds = idle_seconds, start_seconds
        self.ready: Ready | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: asyncio.Task[None] | None = None
        self._last_words: deque[str] = deque(maxlen=12)
        self._idle: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The warm process, or None when there is none now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def __aenter__(self) -> Worker:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> Ready:
        """Start the process if there is none. Raises WorkerError, or what the worker itself reports."""
        async with self._lock:
            return await self._ensure()

    async def run(self, task: str, args: Any, result: type[T], on_progress: OnProgress | None = None, predicted: int = 0) -> T:
        """Do one task; `args` and `result` are dataclasses of `fp_client.messages`.

        `predicted` bytes are named should the process be killed. A cancelled call kills the process.
        Raises the error the task reports (`common.errors`), or WorkerError when the process dies.
        """
        async with self._lock:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            try:
                await self._ensure()
                fault("device.worker.ready", task)
                reply = await self._exchange({"task": task, "args": to_json(args)}, task, on_progress, predicted)
                found = from_json(result, reply["result"])
                if reply.get("worn"):
                    log.info("worker %s ends: its heap has holes that later tasks would pay for", self.pid)
                    await self._kill()
                return found
            except FedPrunerError as error:
                if isinstance(error, WorkerError):  # unexpected: a CUDA fault, say, would spoil every later task
                    await self._kill()
                raise
            except BaseException:  # cancelled, or a reply that makes no sense: that process is of no more use
                await self._kill()
                raise
            finally:
                if self.pid is not None:
                    self._idle = asyncio.get_running_loop().call_later(self.idle_seconds, self._release)

    async def close(self) -> None:
        """End the process and wait for it."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        await self._kill()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _release(self) -> None:
        self._idle = None
        if not self._lock.locked():
            log.info("worker %s released after %.0f s without a task", self.pid, self.idle_seconds)
            task = asyncio.get_running_loop().create_task(self._kill_if_idle())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _kill_if_idle(self) -> None:
        async with self._lock:
            if self._idle is None:
                await self._kill()

    async def _ensure(self) -> Ready:
        if self.pid is not None and self.ready is not None:
            return self.ready
        await self._kill()
        self._last_words.clear()
        fault("device.worker.start")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fp_client.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=worker_environment(self.config.threads), limit=_LINE, start_new_session=True,
        )  # fmt: skip
        self._stderr = asyncio.create_task(self._forward(self._process))
        fault("device.worker.started")
        try:
            async with asyncio.timeout(self.start_seconds):
                reply = await self._exchange({"config": to_json(self.config)}, "start", None, 0)
            self.ready = from_json(Ready, reply["ready"])
        except TimeoutError:
            await self._kill()
            raise WorkerError(f"the worker did not start within {self.start_seconds:.0f} s{self._words()}") from None
        except BaseException:
            await self._kill()
            raise
        return self.ready

    async def _exchange(self, message: Any, task: str, on_progress: OnProgress | None, predicted: int) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ConnectionError):  # a dead worker shows as the end of its output below
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        fault("device.worker.asked", task)
        while True:
            line = await process.stdout.readline()
            if not line.endswith(b"\n"):
                raise await self._death(process, task, predicted)
            reply: dict[str, Any] = json.loads(line)
            if "progress" in reply:
                if on_progress is not None:
                    on_progress(*reply["progress"])
            elif "error" in reply:
                kind = BY_NAME.get(reply["error"], WorkerError)
                if issubclass(kind, BudgetError):
                    raise kind(reply["message"], int(reply.get("smallest", 0)))
                raise kind(reply["message"])
            else:
                return reply

    async def _death(self, process: asyncio.subprocess.Process, task: str, predicted: int) -> WorkerError:
        code = await process.wait()
        if self._stderr is not None:
            await self._stderr
        await self._kill()
        if code == -signal.SIGKILL:
            budget = f"{self.config.budget_bytes >> 20} MiB" if self.config.budget_bytes else "none"
            size = f"{predicted >> 20} MiB" if predicted else "nothing"
            return WorkerError(
                f"the worker was killed during {task!r} (probably out of memory: predicted {size}, budget {budget}); "
                "give the device a smaller budget, or its container a higher limit"
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerError(f"the worker died during {task!r} ({how}){self._words()}")

    def _words(self) -> str:
        return "; its last words: " + " | ".join(self._last_words) if self._last_words else ""

    async def _forward(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # a line longer than the limit: drop it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._last_words.append(text[-300:])
            log.info("worker %d: %s", process.pid, text)

    async def _kill(self) -> None:
        process, self._process, self.ready = self._process, None, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        if self._stderr is not None:
            await self._stderr
            self._stderr = None
