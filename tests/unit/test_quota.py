"""Room for arrivals: what was taken is given back, also by a push that was broken off while it took it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from common.errors import LimitError
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
        await asyncio.sleep(0.3)  # the first has given its room back, the second holds its own
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
