"""The server process's own clocks: time that does not step, and certificates looked at every day."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from common.errors import StorageError
from fp_server import app
from fp_server.config import ServerConfig
from fp_server.coordinator import steady_clock


def test_a_step_of_the_wall_clock_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = steady_clock()
    before = clock()
    assert abs(before - time.time()) < 1.0
    monkeypatch.setattr(time, "time", lambda: before + 86_400)
    assert 0 <= clock() - before < 60


def test_certificates_are_looked_at_every_day_and_a_failure_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "DAY", 0.001)
    asked = []

    class Authority:
        def renew(self, names: list[str], days: float) -> list[str]:
            asked.append((names, days))
            if len(asked) == 1:
                raise StorageError("the disk is full")
            return ["operator.pem"]

    async def main() -> None:
        config = ServerConfig(names=["fp.example.org"])
        work = asyncio.create_task(app._renew_daily(Path(), config, Authority()))  # type: ignore[arg-type]
        while len(asked) < 3:  # noqa: ASYNC110  filled by a thread
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(asyncio.wait_for(main(), 10))
    assert asked[0] == (["fp.example.org"], 90)
