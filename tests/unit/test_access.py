"""Who may call, and for how long: a call ends with its certificate, and with nothing else."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.errors import IdentityError, StorageError
from common.transport.tls import Peer
from fp_server import access as access_module
from fp_server.access import Access
from fp_server.audit import Actor, Entry

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
from fake_ca import FakeCa


class Refusals:
    def __init__(self):
        self.noted: list[Entry] = []
        self.error: Exception | None = None
        self.flushed = 0

    def note(self, entry):
        self.noted.append(entry)

    async def flush(self):
        self.flushed += 1
        if self.error is not None:
            raise self.error


class Authority:
    """Welcomes everybody whose serial is not in `bad`."""

    def __init__(self):
        self.bad: set[str] = set()
        self.refusals = Refusals()

    def check(self, peer: Peer, *roles: str) -> None:
        if peer.serial in self.bad:
            raise IdentityError(f"the certificate of {peer.name!r} has been revoked")
        if peer.role not in roles:
            raise IdentityError(f"{peer.name!r} is a {peer.role}")


class Context:
    def __init__(self, directory):
        self.pem = (directory / "device.pem").read_bytes()

    def auth_context(self):
        return {"x509_subject_alternative_name": [b"fedpruner://device/alice"], "x509_pem_cert": [self.pem]}

    def peer(self):
        return "ipv6:%5B::1%5D:4242"


@pytest.fixture
def context(tmp_path):
    FakeCa.make().join(tmp_path)
    return Context(tmp_path)


def test_a_call_ends_when_its_certificate_does_and_the_reason_is_said(context):
    async def main():
        authority = Authority()
        access, seen = Access(authority), []

        async def call():
            async with access.admitted(context, "Fetch", "device") as peer:
                seen.append(peer)
                await asyncio.Event().wait()

        calls = [asyncio.create_task(call()) for _ in range(3)]
        await asyncio.sleep(0)
        access.look()
        await asyncio.sleep(0)
        assert not any(task.done() for task in calls)
        authority.bad.add(seen[0].serial)
        access.look()
        access.look()  # what is being ended is not ended twice
        for task in calls:
            with pytest.raises(IdentityError, match="'alice' has been revoked"):
                await asyncio.wait_for(task, 5)
        assert access._calls == set()

    asyncio.run(main())


def test_a_time_out_within_a_call_is_its_own_affair(context):
    async def main():
        access = Access(Authority())
        with pytest.raises(TimeoutError, match="mine"):
            async with access.admitted(context, "Push", "device"):
                raise TimeoutError("mine")
        async with access.admitted(context, "Push", "device"):
            pass
        assert access._calls == set()

    asyncio.run(main())


def test_a_clock_that_was_set_back_meanwhile_ends_the_call_all_the_same(context):
    """Between the look and the reason the certificate has become valid again: the peer is told to come back."""

    async def main():
        authority = Authority()
        access = Access(authority)
        with pytest.raises(IdentityError, match="'alice' no longer counts; connect again"):
            async with access.admitted(context, "Open", "device") as peer:
                authority.bad.add(peer.serial)
                access.look()
                authority.bad.clear()
                await asyncio.Event().wait()

    asyncio.run(main())


def test_refusals_are_noted_with_whatever_is_known_of_the_caller(context):
    access = Access(Authority())
    with pytest.raises(IdentityError, match="'alice' is a device"):
        access.caller(context, "Revoke", "operator")
    context.auth_context = dict
    with pytest.raises(IdentityError, match="carries no FedPruner identity"):
        access.caller(context, "Open", "device")
    first, second = access.authority.refusals.noted
    assert (first.actor.name, first.actor.role, first.actor.address) == ("alice", "device", "[::1]:4242") and first.actor.serial
    assert (first.action, first.object, first.outcome) == ("call", "Revoke", "refused: 'alice' is a device")
    assert second.actor == Actor("", address="[::1]:4242") and second.object == "Open"


def test_the_watch_goes_on_whatever_one_look_runs_into(context, monkeypatch, caplog):
    monkeypatch.setattr(access_module, "LOOK", 0.001)

    async def main():
        authority = Authority()
        access = Access(authority)
        refusals = authority.refusals
        watching = asyncio.create_task(access.watch())
        for error in (StorageError("disk full"), RuntimeError("boom"), None):
            refusals.error = error
            before = refusals.flushed
            async with asyncio.timeout(10):
                while refusals.flushed < before + 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        watching.cancel()

    asyncio.run(main())
    full = [record for record in caplog.records if "can't be entered in the audit trail yet: disk full" in record.message]
    assert len(full) == 1, "said once, not every second"
    assert "a look at the calls under way failed" in caplog.text


def test_a_peers_end_is_the_certificates(context):
    peer = Access(Authority()).caller(context, "Open", "device")
    assert peer.not_after is not None and timedelta(hours=23) < peer.not_after - datetime.now(UTC) < timedelta(hours=25)
