"""What a device's daemon says of itself, and what is made of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from common.errors import UnreachableError
from fp_client import health
from fp_client.health import PATIENCE, SILENCE, Link, check


def said(directory: Path, link: Link, at: float = 1000.0) -> None:
    health._write(directory / health.FILE, {"server": "fp.example.org:7443", "at": at, **vars(link)})


def test_a_session_is_well(tmp_path: Path) -> None:
    said(tmp_path, Link("alice", 400.0))
    assert check(tmp_path, now=1001.0) == "connected to fp.example.org:7443 as 'alice' for 601 s"


def test_a_server_that_is_away_is_borne_for_a_while(tmp_path: Path) -> None:
    said(tmp_path, Link("", 1000.0 - PATIENCE + 10, "can't be reached"))
    assert check(tmp_path, now=1000.0) == "no session with fp.example.org:7443 yet, for 110 s of at most 120: can't be reached"
    with pytest.raises(UnreachableError, match=r"no session with fp.example.org:7443 for 130 s: can't be reached"):
        check(tmp_path, now=1020.0)
    assert "of at most 200" in check(tmp_path, patience=200.0, now=1020.0)


@pytest.mark.parametrize(("now", "what"), [(1000.0 + SILENCE + 1, "61 s old"), (5.0, "from before this machine's last start")])
def test_a_daemon_that_is_silent_hangs_or_is_gone(tmp_path: Path, now: float, what: str) -> None:
    said(tmp_path, Link("alice", 400.0))
    with pytest.raises(UnreachableError, match=f"last sign of life is {what}"):
        check(tmp_path, now=now)


def test_without_a_daemon_it_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="no daemon runs here; start it with `fp-client run --dir"):
        check(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"server": 1, "at": "x", "device": "", "since": 0, "reason": ""}'])
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    (tmp_path / health.FILE).write_text(text)
    with pytest.raises(UnreachableError, match="damaged"):
        check(tmp_path)


def test_the_time_without_a_session_is_counted_from_its_end() -> None:
    link = Link(since=1.0, reason="just started").lost("away")
    assert link == Link("", 1.0, "away"), "failed tries do not start it anew"
    opened = link.opened("alice")
    assert opened.device == "alice" and opened.since <= monotonic()
    ended = opened.lost("the session has ended")
    assert ended.since >= opened.since and ended.lost("away").since == ended.since


def test_a_change_is_written_at_once_and_the_file_goes_with_the_daemon(tmp_path: Path) -> None:
    link = Link(since=monotonic(), reason="just started")

    async def main() -> None:
        nonlocal link
        telling = asyncio.create_task(health.tell(tmp_path, "here:1", lambda: link))
        async with asyncio.timeout(20):
            while not (tmp_path / health.FILE).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert "just started" in check(tmp_path)
            link = link.opened("alice")
            while "connected to here:1 as 'alice'" not in check(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        telling.cancel()
        await asyncio.wait([telling])

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_the_daemons_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = True
    write = health._write

    def failing(path: Path, value: object) -> None:
        if full:
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(health, "_write", failing)

    async def main() -> None:
        nonlocal full
        telling = asyncio.create_task(health.tell(tmp_path, "here:1", Link))
        await asyncio.sleep(2.2)
        full = False
        async with asyncio.timeout(20):
            while not (tmp_path / health.FILE).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        telling.cancel()
        await asyncio.wait([telling])

    asyncio.run(main())
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / health.FILE}: can't be written: No space left on device"
    ], "said once, not every second"


def test_the_container_check_needs_next_to_nothing(tmp_path: Path) -> None:
    """It runs within the memory that the container was given for its task."""
    said(tmp_path, Link("alice", monotonic()), at=monotonic())
    code = (
        "import sys; from fp_client.health import main; code = main(); "
        "print(sorted({'grpc', 'typer', 'rich', 'pydantic', 'numpy', 'cryptography'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[1:] == ["[]"], done.stdout + done.stderr
    (tmp_path / health.FILE).write_text(json.dumps({}))
    done = subprocess.run(
        [sys.executable, "-m", "fp_client.health", tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and done.stdout.startswith("unhealthy: ")
