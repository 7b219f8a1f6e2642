"""A process that is told to stop ends in time, whatever it is at.

In a container a daemon is process 1, for which the kernel ignores SIGTERM until it has a handler; and a thread that
computes or reads can't be cancelled. What it leaves is what a crash leaves, and both daemons go on from there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

logger = logging.getLogger(__name__)

CLOSING = 1.0
"""Seconds of a grace that are kept for closing files once nothing is waited for any more."""


def leave_on_sigterm() -> None:
    """From now on SIGTERM ends the process with exit code 0: nothing is under way yet. An event loop's handler replaces it.

    Does nothing in another thread than the main one, where a command may be called by a program of its own."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def end_within(seconds: float) -> None:
    """The process ends in `seconds` with exit code 0, even if a thread still computes or reads then."""

    def end() -> None:
        logger.warning("what is under way was left after %.0f s: it is taken up again at the next start", seconds)
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
