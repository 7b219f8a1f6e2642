"""The daemon renews its certificate by itself, uses it from the next connection on, and drops nothing."""

from __future__ import annotations

import asyncio
import logging
import re
import stat
from datetime import UTC, datetime, timedelta

import pytest
from fake_ca import FakeCa
from fake_server import serving
from test_agent import Device, assignment, probe_task
from test_client_cli import Printed

from common.errors import IdentityError, ProtocolError, StorageError
from common.transport import enroll, tls
from common.transport.wire import Backoff
from fp_client import renewal
from fp_client.rpc import Connection

DUE = (timedelta(days=-60), timedelta(days=10))
"""A certificate in its last third, past the moment a daemon chooses."""


def serial(path) -> str:
    return f"{tls.check_validity(path).serial_number:x}"


def against(tmp_path, body, valid=DUE):
    async def main():
        async with serving() as server:
            server.ca.join(tmp_path, valid=valid)
            await body(server)

    asyncio.run(main())


def test_the_certificate_is_renewed_while_a_task_runs_and_nothing_is_dropped(tmp_path):
    """The session is opened anew with the new one; the task goes on, and its update is pushed."""

    async def body(server):
        old, key = serial(tmp_path / "device.pem"), (tmp_path / "device.key").read_bytes()
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            await device.hears("assignment", assignment())
            await device.until(lambda: "train" in device.work.begun)
            before = device.connection.channel
            renewing = asyncio.create_task(renewal.stay_valid(device.connection, device.agent.reconnect))
            await device.until(lambda: server.sessions.opened == 2)
            new = serial(tmp_path / "device.pem")
            assert server.sessions.serials == [old, new] and new != old
            await device.hears("assignment", assignment())  # a server sends the outstanding task again
            device.work.gate.set()
            await device.until(lambda: server.objects.accepted)
            assert device.work.begun.count("train") == 1 and device.work.killed == 0
            assert [peer.serial for peer in server.renewal.asked] == [old] and not renewing.done()
            assert device.connection.channel is not before and device.connection._users.get(before) is None
            renewing.cancel()
        assert (tmp_path / "device.key").read_bytes() == key
        for name in ("device.pem", "device.key"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600

    against(tmp_path, body)


def test_a_push_under_way_goes_on_over_the_channel_it_began_with(tmp_path):
    async def body(server):
        connection = Connection(tmp_path, server.address)
        async with connection.using() as first:
            await renewal.renew(connection)
            async with connection.using() as second:
                assert second is not first
            await asyncio.sleep(0)
            assert connection._users == {first: 1, second: 0}
        assert connection._users == {second: 0}
        await connection.close()

    against(tmp_path, body)


def test_a_server_that_refuses_or_is_away_is_asked_again(tmp_path, caplog):
    """Nothing breaks meanwhile: the session goes on with the certificate that is there."""
    slept: list[float] = []

    async def sleep(seconds):
        slept.append(seconds)
        await asyncio.sleep(0.01)

    async def body(server):
        server.renewal.errors = [StorageError("the server's disk is full"), ProtocolError("not now")]
        old = serial(tmp_path / "device.pem")
        async with Device(server, tmp_path) as device:
            await device.joins()
            renewing = asyncio.create_task(renewal.stay_valid(device.connection, device.agent.reconnect, sleep))
            await device.until(lambda: server.sessions.opened == 2)
            assert old not in (serial(tmp_path / "device.pem"), server.sessions.serials[1])
            renewing.cancel()
        await server.stop()
        server.ca.join(tmp_path, valid=DUE)
        async with asyncio.timeout(20):
            connection = Connection(tmp_path, server.address, Backoff(first=0.01, longest=0.01))
            renewing = asyncio.create_task(renewal.stay_valid(connection, lambda: asyncio.sleep(0), sleep))
            while len(slept) < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await server.start()
            old = serial(tmp_path / "device.pem")
            while serial(tmp_path / "device.pem") == old:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            renewing.cancel()
            await connection.close()

    with caplog.at_level(logging.WARNING):
        against(tmp_path, body)
    assert "is not renewed yet: the server's disk is full; next try in" in caplog.text and "not now" in caplog.text
    assert all(30 <= seconds <= 3600 for seconds in slept), slept


@pytest.mark.parametrize(
    ("issue", "said"),
    [
        (lambda ca, peer, key: ca.device("root", key), "is for device/root"),
        (lambda ca, peer, key: ca.device(peer.name, key, role="operator"), "is for operator/alice"),
        (lambda ca, peer, key: ca.device(peer.name, tls.new_key().public_key()), "signed another key than ours"),
        (lambda ca, peer, key: FakeCa.make().device(peer.name, key), "holds no certificate of its CA"),
        (lambda ca, peer, key: b"-----BEGIN PRIVATE KEY-----", "holds no certificate of its CA"),
    ],
)
def test_what_a_server_may_not_make_of_a_device(tmp_path, issue, said):
    async def body(server):
        server.renewal.issue = lambda peer, key: issue(server.ca, peer, key)
        before = (tmp_path / "device.pem").read_bytes()
        connection = Connection(tmp_path, server.address)
        with pytest.raises(ProtocolError, match=said):
            await renewal.renew(connection)
        assert (tmp_path / "device.pem").read_bytes() == before
        await connection.close()

    against(tmp_path, body)


class Sleeps:
    """Takes no time to sleep, so many times; then it sleeps for good, and `enough` is set."""

    def __init__(self, times: int) -> None:
        self.times, self.seconds, self.enough = times, [], asyncio.Event()

    async def __call__(self, seconds):
        self.seconds.append(seconds)
        if len(self.seconds) == self.times:
            self.enough.set()
            await asyncio.Event().wait()


def test_a_clock_that_is_ahead_does_not_make_it_ask_again_and_again(tmp_path, caplog):
    """What it gets is due at once by its clock: it waits, longer each time, before it asks for another."""
    sleep = Sleeps(4)

    async def body(server):
        server.renewal.issue = lambda peer, key: server.ca.device(peer.name, key, valid=DUE)
        connection = Connection(tmp_path, server.address)
        renewing = asyncio.create_task(renewal.stay_valid(connection, lambda: asyncio.sleep(0), sleep))
        async with asyncio.timeout(20):
            await sleep.enough.wait()
        renewing.cancel()
        await connection.close()

    with caplog.at_level(logging.WARNING):
        against(tmp_path, body)
    slept = sleep.seconds
    assert all(30 <= seconds <= 3600 for seconds in slept) and max(slept) > 2 * slept[0], slept
    assert "is the clock ahead?" in caplog.text


def test_a_session_that_can_not_be_opened_anew_does_not_end_renewal(tmp_path, caplog):
    sleep = Sleeps(2)

    async def body(server):
        async def broken():
            raise RuntimeError("the stream is gone")

        connection = Connection(tmp_path, server.address)
        renewing = asyncio.create_task(renewal.stay_valid(connection, broken, sleep))
        async with asyncio.timeout(20):
            await sleep.enough.wait()
        assert not renewing.done() and len(server.renewal.asked) == 1
        renewing.cancel()
        await connection.close()

    against(tmp_path, body)
    assert "the session goes on with the old certificate" in caplog.text and "the stream is gone" in caplog.text


async def in_the_end(server, connection, before):
    """`stay_valid` until it has renewed, once; `before` hears the seconds of each sleep until then."""
    again = asyncio.Event()

    async def sleep(seconds):
        if again.is_set():
            await asyncio.Event().wait()
        assert server.renewal.asked == [], "nothing is signed that can't be used"
        before(seconds)

    async def renewed():
        again.set()

    renewing, waiting = asyncio.create_task(renewal.stay_valid(connection, renewed, sleep)), asyncio.create_task(again.wait())
    await asyncio.wait({renewing, waiting}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert again.is_set() and not renewing.done() and len(server.renewal.asked) == 1
    renewing.cancel()
    await connection.close()


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        (timedelta(days=30), r"expired on .* join again with a new token; the next look is in 60 min"),
        (timedelta(days=-90), r"not valid before .* is the clock right\?; the next look is in 60 min"),
    ],
)
def test_a_certificate_is_not_asked_for_while_it_has_ended_and_is_once_the_clock_is_right_again(
    tmp_path, caplog, monkeypatch, ahead, said
):
    slept: list[float] = []

    class Clock(datetime):
        off = ahead

        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + cls.off

    async def body(server):
        connection = Connection(tmp_path, server.address)
        monkeypatch.setattr(tls, "datetime", Clock)
        with pytest.raises(IdentityError, match=said.partition(";")[0]):
            await renewal.renew(connection)

        def before(seconds):
            slept.append(seconds)
            if len(slept) == 3:
                Clock.off = timedelta(0)

        await in_the_end(server, connection, before)

    with caplog.at_level(logging.ERROR):
        against(tmp_path, body)
    assert slept == [renewal.LOOK] * 3
    assert sum(re.search(said, message) is not None for message in caplog.messages) == 3, "once a look"


@pytest.mark.parametrize("what", ["ca.pem", "unforeseen"])
def test_a_file_that_can_not_be_read_for_a_moment_and_an_error_nobody_foresaw_do_not_end_the_renewals(
    tmp_path, caplog, monkeypatch, what
):
    async def body(server):
        connection, ask, aside = Connection(tmp_path, server.address), enroll.renew, tmp_path / "aside"

        async def unforeseen(*_):
            raise RuntimeError("boom")

        if what == "ca.pem":
            (tmp_path / "ca.pem").rename(aside)
        else:
            monkeypatch.setattr(enroll, "renew", unforeseen)

        def before(seconds):
            assert 30 <= seconds <= 60
            if aside.exists():
                aside.rename(tmp_path / "ca.pem")
            monkeypatch.setattr(enroll, "renew", ask)

        await in_the_end(server, connection, before)

    with caplog.at_level(logging.WARNING):
        against(tmp_path, body)
    said = {"ca.pem": f"{tmp_path}/ca.pem: can't be read: No such file or directory", "unforeseen": "boom"}[what]
    assert f"is not renewed yet: {said}; next try in" in caplog.text
    assert ("Traceback" in caplog.text) == (what == "unforeseen")


def test_a_certificate_replaced_by_hand_is_taken_up_without_a_restart(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            server.ca.join(tmp_path)
            new = serial(tmp_path / "device.pem")
            await server.sessions.tell.put("cut")
            await device.until(lambda: server.sessions.opened == 2)
            assert server.sessions.serials[1] == new
            await device.hears("probe", probe_task())
            await server.sessions.next("probe")

    against(tmp_path, body)


def test_a_replaced_certificate_may_end_under_the_session_it_opened(tmp_path):
    """A server ends the session when the old one ends: that is no reason to end the daemon, which has another."""

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            server.ca.join(tmp_path)
            await server.sessions.tell.put(IdentityError("the certificate has expired"))
            await device.until(lambda: server.sessions.opened == 2)
            assert server.sessions.serials[1] == serial(tmp_path / "device.pem") != server.sessions.serials[0]
            await device.hears("probe", probe_task())
            await server.sessions.next("probe")
            await server.sessions.tell.put(IdentityError("revoked"))  # of the one that is there, it ends the daemon
            with pytest.raises(IdentityError, match="revoked"):
                await asyncio.wait_for(device.running, 20)

    against(tmp_path, body)


def test_a_session_that_was_being_opened_when_another_was_wanted_is_opened_anew(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            whole, times = device.agent._open, []

            async def opening():
                session = await whole()
                if not times:
                    times.append(1)
                    await device.agent.reconnect()
                return session

            device.agent._open = opening
            await server.sessions.tell.put("cut")
            await device.until(lambda: server.sessions.opened == 3)
            await device.hears("probe", probe_task())
            await server.sessions.next("probe")
            assert server.sessions.opened == 3

    against(tmp_path, body)


def test_a_damaged_certificate_on_disk_does_not_take_the_good_one_away(tmp_path, caplog):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            kept = (tmp_path / "device.pem").read_bytes()
            tls.write_private(tmp_path / "device.pem", b"x")
            async with device.connection.using() as channel:
                assert channel is device.connection.channel
            tls.write_private(tmp_path / "device.pem", kept)

    with caplog.at_level(logging.WARNING):
        against(tmp_path, body)
    assert "device.pem: not a PEM certificate; the certificate before it is used further" in caplog.text


def test_when_a_daemon_renews(tmp_path):
    """Within the first tenth of the last third, not all devices of one day at once; retries fit the validity."""
    ca, moments = FakeCa.make(), set()
    for _ in range(20):
        ca.join(tmp_path, valid=(timedelta(0), timedelta(days=90)))
        certificate = tls.check_validity(tmp_path / "device.pem")
        days = (renewal.due(certificate) - datetime.now(UTC)) / timedelta(days=1)
        assert 59.9 <= days <= 63.1
        moments.add(round(days, 2))
    assert len(moments) > 10
    assert renewal.retries(certificate) == Backoff(first=60.0, longest=3600.0)
    ca.join(tmp_path, valid=(timedelta(0), timedelta(minutes=6)))
    short = renewal.retries(tls.check_validity(tmp_path / "device.pem"))
    assert (round(short.first), round(short.longest)) == (6, 24)


@pytest.fixture
def run(capsys) -> Printed:
    return Printed(capsys)


def test_the_command_and_what_the_doctor_says(tmp_path, run):
    async def body(server):
        (tmp_path / "client.toml").write_text(f'server = "{server.address}"\n')
        assert "due to be renewed" in renewal.describe(tmp_path / "device.pem")
        code, out, err = await asyncio.to_thread(run, "renew", "--dir", tmp_path)
        assert code == 0 and re.search(r"device\.pem is renewed: valid until 20", out), err
        assert re.search("valid until .* UTC; the daemon renews it from 20", renewal.describe(tmp_path / "device.pem"))
        (tmp_path / "device.key").chmod(0o644)
        with pytest.raises(IdentityError, match=r"device\.key: others on this machine can read this key \(mode 644\)"):
            renewal.describe(tmp_path / "device.pem")
        (tmp_path / "device.key").chmod(0o600)
        server.renewal.errors = [IdentityError("the certificate of 'alice' has been revoked; ask the operator for a new token")]
        code, _, err = await asyncio.to_thread(run, "renew", "--dir", tmp_path)
        assert code == 6 and "'alice' has been revoked" in err
        await server.stop()
        code, _, err = await asyncio.to_thread(run, "renew", "--dir", tmp_path)
        assert code == 7 and "can't be reached" in err
        await server.start()

    against(tmp_path, body)
