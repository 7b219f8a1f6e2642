"""The demo's processes: every command is one a person would type; nothing outlives the demo."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

TOOLS = Path(sys.executable).parent
"""Where this environment's `fp-server` and `fp-client` are."""
COMMAND_SECONDS = 600.0
GRACE_SECONDS = 15.0
"""How long a stopped daemon may take before it is killed."""
POLL_SECONDS = 0.25
LAST_LINES = 12


class DemoError(Exception):
    """The demo can't go on; the message is for the person who started it."""


class Fleet:
    """Runs commands and daemons. `say` gets each command line; `logs` is where the daemons' logs go."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        self.logs, self._say = logs, say
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def command(self, *args: str, stdin: str | None = None, show: str | None = None) -> str:
        """Run a command to its end; returns what it printed. Raises DemoError with what it said on failure.

        `show`: what to show in place of the command itself; empty shows nothing.
        """
        line = " ".join(args) if show is None else show
        if line:
            self._say(line)
        try:
            done = subprocess.run(
                [str(TOOLS / args[0]), *args[1:]],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise DemoError(f"{TOOLS / args[0]}: not installed; run `make install`, then `make demo`") from None
        except subprocess.TimeoutExpired:
            raise DemoError(f"`{' '.join(args)}` did not end within {COMMAND_SECONDS:.0f} s") from None
        if done.returncode != 0:
            raise DemoError(f"`{' '.join(args)}` failed (exit {done.returncode}):\n{done.stderr.strip()[-2000:]}")
        return done.stdout

    def daemon(self, name: str, *args: str) -> None:
        """Start a daemon in the background, its log in ``logs/NAME.log``."""
        self._say(" ".join(args) + " &")
        with (self.logs / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops the daemons in order.
            self._daemons[name] = subprocess.Popen(
                [str(TOOLS / args[0]), *args[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def check(self) -> None:
        """Raises DemoError when a daemon has ended."""
        for name, process in self._daemons.items():
            if process.poll() is not None:
                log = self.logs / f"{name}.log"
                last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
                code = process.returncode
                how = f"exit {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
                raise DemoError(f"{name} ended ({how}) while it was needed; the end of {log}:\n{last}")

    def wait_for(self, path: Path, what: str, seconds: float = 60.0) -> None:
        """Until a daemon has written a file. Raises DemoError when it takes too long, or a daemon ends."""
        until = time.monotonic() + seconds
        while not path.exists():
            self.check()
            if time.monotonic() > until:
                raise DemoError(f"{what} was not ready within {seconds:.0f} s; see {self.logs}")
            time.sleep(POLL_SECONDS)

    def follow(self, *args: str) -> Iterator[str | None]:
        """Lines of a command's output as they come; None about once a second without one. Checks the daemons as it waits."""
        self._say(" ".join(args))
        process = subprocess.Popen(
            [str(TOOLS / args[0]), *args[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None and process.stderr is not None
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: Iterator[str] = process.stdout) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while True:
                self.check()
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    yield None
                    continue
                if line is None:
                    break
                yield line
            if process.wait() != 0:
                raise DemoError(f"`{' '.join(args)}` failed (exit {process.returncode}):\n{process.stderr.read().strip()}")
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()
            process.stderr.close()

    def stop(self) -> None:
        """Stop every daemon: SIGTERM to the last started first, and after a grace period a kill, workers included."""
        running = [process for process in self._daemons.values() if process.poll() is None]
        family = [child for process in running for child in _family(process.pid)]
        for process in reversed(running):
            process.terminate()
        _, left = psutil.wait_procs(family, timeout=GRACE_SECONDS)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=GRACE_SECONDS)
        for process in running:
            process.wait()
        self._daemons.clear()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
