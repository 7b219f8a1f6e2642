"""What the server does beside answering: tasks on its event loop, and the one thread for heavy work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

logger = logging.getLogger("fp_server")

T = TypeVar("T")


class Background:
    """Tasks of three kinds: those that are cancelled at the end, work that is waited for a while, writes that are finished."""

    def __init__(self) -> None:
        self.thread: Executor = ThreadPoolExecutor(1, thread_name_prefix="heavy")
        """One thread: what it reads stays until that is over, because what removes objects runs in it too."""
        self.tasks: set[asyncio.Task[Any]] = set()
        self.working: set[asyncio.Task[None]] = set()
        """Those of the tasks that choose or aggregate."""
        self.writes: set[asyncio.Task[Any]] = set()

    async def heavy(self, work: Callable[..., T], *given: Any) -> T:
        """Call `work` in the thread for heavy work, after what is there already."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *given)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is cancelled at the end. What it fails with is logged."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that goes on although who waits for it behind a shield is cancelled; at the end it is. What it fails with is its
        waiter's, or nobody's."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._kept)
        return task

    def _kept(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()

    def work(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that `stop` waits for."""
        task = self.spawn(work)
        self.working.add(task)
        task.add_done_callback(self.working.discard)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish `work` even when the caller is cancelled."""
        task = asyncio.create_task(work)
        self.writes.add(task)
        task.add_done_callback(self.writes.discard)
        return await asyncio.shield(task)

    async def stop(self, patience: float) -> None:
        """Wait at most `patience` seconds for work, cancel all tasks, finish the writes. Work not done is left to its thread."""
        if self.working and patience:
            await asyncio.wait(self.working, timeout=patience)
        if self.working:
            logger.warning("what is being chosen or aggregated is not done; it is begun again at the next start")
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*self.writes, return_exceptions=True)
        self.thread.shutdown(wait=False, cancel_futures=True)
