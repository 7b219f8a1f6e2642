"""The server process's own clocks: time that does not step, and certificates looked after."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from common.errors import StorageError
from fp_server import app
from fp_server.coordinator import steady_clock


def test_a_step_of_the_wall_clock_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = steady_clock()
    before = clock()
    assert abs(before - time.time()) < 1.0
    monkeypatch.setattr(time, "time", lambda: before + 86_400)
    assert 0 <= clock() - before < 60


def test_certificates_are_looked_after_and_a_failure_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are read anew each time: whoever changes them needs no restart."""
    monkeypatch.setattr(app, "HOUR", 0.001)
    (tmp_path / "server.toml").write_text('names = ["fp.example.org"]')
    asked = []

    class Own:
        def keep_valid(self, names: list[str], days: float) -> list[str]:
            asked.append((names, days))
            if len(asked) == 1:
                raise StorageError("the disk is full")
            (tmp_path / "server.toml").write_text('names = ["other.example"]\ncertificate_days = 7')
            return ["operator.pem"]

    async def main() -> None:
        work = asyncio.create_task(app._stay_valid(tmp_path, Own()))  # type: ignore[arg-type]
        while len(asked) < 3:  # noqa: ASYNC110  filled by a thread
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(asyncio.wait_for(main(), 10))
    assert asked[:3] == [(["fp.example.org"], 90), (["fp.example.org"], 90), (["other.example"], 7)]
