"""Room for arrivals: what was taken is given back, also by a push that was broken off while it took it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from common.errors import LimitError
from fp_server import quota as module
from fp_server.limits import ServerLimits
from fp_server.quota import Quota


class SlowQuota(Quota):
    """Looks at the disk until it is let go on."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.looking, self.go_on = threading.Event(), threading.Event()

    def _check(self, device, size):
        super()._check(device, size)
        self.looking.set()
        self.go_on.wait(10)


async def hold(quota, device, size):
    async with quota.held(device, size):
        await asyncio.Event().wait()


async def broken_off(quota):
    """A push of alice's that is cancelled while its thread looks at the disk."""
    taking = asyncio.create_task(hold(quota, "alice", 800))
    await asyncio.to_thread(quota.looking.wait, 10)
    taking.cancel()
    return taking


def test_a_push_that_is_broken_off_while_it_takes_its_room_gives_it_back(tmp_path):
    quota = SlowQuota(tmp_path, ServerLimits(arrival_bytes=1000, disk_reserve_bytes=0))

    async def body():
        taking = await broken_off(quota)
        with pytest.raises(asyncio.CancelledError):
            await taking
        quota.go_on.set()  # and now the thread takes it
        async with asyncio.timeout(5):
            while True:
                try:
                    async with quota.held("bob", 1000):
                        return
                except LimitError:
                    await asyncio.sleep(0.02)

    asyncio.run(body())


def test_what_is_left_of_a_broken_off_push_does_not_take_the_room_of_the_next_one(tmp_path):
    quota = SlowQuota(tmp_path, ServerLimits(arrival_bytes=1000, disk_reserve_bytes=0))

    async def body():
        taking = await broken_off(quota)
        again = asyncio.create_task(hold(quota, "alice", 800))
        await asyncio.sleep(0.1)
        quota.go_on.set()
        async with asyncio.timeout(10):  # the first gives its room back, the second holds its own
            while not (taking.done() and len(quota._arriving) == 1):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(LimitError, match="would take 1600 bytes"):
            async with quota.held("bob", 800):
                pass
        again.cancel()
        await asyncio.wait({taking, again})
        async with quota.held("bob", 800):
            pass

    asyncio.run(body())


def test_room_that_was_refused_is_not_held(tmp_path):
    quota = Quota(tmp_path, ServerLimits(arrival_bytes=1000, disk_reserve_bytes=0))

    async def body():
        with pytest.raises(LimitError):
            await hold(quota, "alice", 1001)
        async with quota.held("bob", 1000):
            pass

    asyncio.run(body())
    assert quota.fits(1000) and not quota.fits(1001)


def test_only_folders_that_may_have_bytes_are_looked_into(tmp_path, monkeypatch):
    """Whoever was ever drawn has one. What arrives, what is left of it, and what lay there at the start are counted."""
    for number in range(50):
        (tmp_path / f"d{number}").mkdir()
    (tmp_path / "d7" / "part").write_bytes(b"x" * 100)
    quota, looked, whole = Quota(tmp_path, ServerLimits(arrival_bytes=1000, disk_reserve_bytes=0)), [], module._size
    monkeypatch.setattr(module, "_size", lambda folder: (looked.append(folder.name), whole(folder))[1])

    async def looks(device: str, size: int = 1) -> set[str]:
        looked.clear()
        async with quota.held(device, size):
            return set(looked)

    async def body():
        assert len(await looks("d1")) == 50
        assert await looks("new") == {"d1", "d7"}
        (tmp_path / "new").mkdir()
        async with quota.held("new", 300):
            (tmp_path / "new" / "part").write_bytes(b"x" * 250)
            assert await looks("d2") == {"d7", "new"}
        with pytest.raises(LimitError, match="would take 1001 bytes"):  # 100 of d7's, 250 of the new one's
            await looks("d3", 651)
        (tmp_path / "new" / "part").unlink()
        assert await looks("d3", 900) == {"d7", "new"} and await looks("d3") == {"d3", "d7"}

    asyncio.run(body())
