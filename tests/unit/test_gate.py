"""The gate's book of connections: whose is cut, and whose never, when a caller uses too many."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest

from common.transport.tls import Peer
from fp_server import gate as module
from fp_server.gate import FETCH, Gate, main_rules
from fp_server.limits import CONNECTIONS_EACH, OPERATOR_AT_ONCE, Complaints, ServerLimits

HOST = "192.0.2.1"
"""One address before all devices, as of a NAT or a proxy."""


class Call:
    """A call's context: who calls, from which port, and how long the answer takes."""

    def __init__(self, name, port):
        self.name, self.port, self.role, self.refusal = name, port, "device", ""
        self.answered = asyncio.Event()

    def peer(self):
        return f"ipv4:{HOST}:{self.port}"

    def auth_context(self):
        return {"name": [self.name], "role": [self.role]}

    def invocation_metadata(self):
        return ()

    def code(self):
        return None

    async def read(self):
        return b""

    async def abort(self, code, details, metadata=()):
        self.refusal = details
        raise grpc.aio.AbortError


class Port:
    """A gate without a server; `cut` has the ports it has hung up, in order."""

    def __init__(self, monkeypatch, **limits):
        self.gate, self.cut = Gate(main_rules(), ServerLimits(**limits), Complaints()), []
        monkeypatch.setattr(module, "peer_of", lambda auth: Peer(auth["role"][0], auth["name"][0]))
        monkeypatch.setattr(module, "hang_up", lambda address, port: self.cut.append(address[1]) or True)

    async def serve(self, call, method="/fedpruner.v1.Objects/Offset"):
        async def behaviour(request, context):
            await context.answered.wait()

        async def continuation(details):
            return grpc.unary_unary_rpc_method_handler(behaviour)

        handler = await self.gate.intercept_service(continuation, SimpleNamespace(method=method))
        try:
            await handler.stream_unary(None, call)
        except grpc.aio.AbortError:
            assert call.refusal

    async def called(self, name, *ports):
        """A short call from each port; why the last was refused."""
        for port in ports:
            call = Call(name, port)
            call.answered.set()
            await self.serve(call)
        return call.refusal

    async def hung_up(self):
        await asyncio.gather(*self.gate._cutting)
        return self.cut


@pytest.fixture
def port(monkeypatch):
    return Port(monkeypatch)


FIRST = range(1000, 1000 + CONNECTIONS_EACH)
"""The ports from which alice has called, each once: as many as she may have connections, open or long closed."""


def test_a_connection_from_an_address_that_another_had_is_not_cut(port):
    """Alice has reconnected often; bob's connection comes from one of her old addresses."""

    async def body():
        await port.called("alice", *FIRST)
        await port.called("bob", 1000)
        await port.called("alice", 2000)
        assert await port.hung_up() == [], "hers are eight again: one has become bob's"
        await port.called("alice", 2001, 2002)
        assert await port.hung_up() == [1001, 1002], "her own are cut as ever, the longest unused first"

    asyncio.run(body())


def test_who_comes_before_the_cut_keeps_his_connection(port):
    """It is cut a moment later, and the address can be another's by then."""

    async def body():
        await port.called("alice", *FIRST, 2000)
        await port.called("bob", 1000)
        assert await port.hung_up() == []
        await port.called("alice", 2001)
        assert await port.hung_up() == [1001]

    asyncio.run(body())


def test_connections_in_use_are_kept_and_every_further_one_is_cut(port):
    async def body():
        used = [Call("alice", n) for n in FIRST]
        serving = [asyncio.create_task(port.serve(call)) for call in used]
        await asyncio.sleep(0)
        further = range(2000, 2005)
        for n in further:
            assert "alice' uses 8 connections already; this one is cut" in await port.called("alice", n)
        assert await port.hung_up() == [*further]
        used[3].answered.set()
        await serving[3]
        assert await port.called("alice", 3000) == "" and await port.hung_up() == [*further, used[3].port]
        for call in used:
            call.answered.set()
        await asyncio.gather(*serving)

    asyncio.run(body())


def test_a_call_of_a_connection_that_is_gone_is_not_counted_with_the_next_one(port):
    """Alice's call has not noticed yet that its connection is closed; the address is bob's, then hers again."""

    async def body():
        old = Call("alice", 1000)
        serving = asyncio.create_task(port.serve(old))
        await asyncio.sleep(0)
        await port.called("bob", 1000)
        new = Call("alice", 1000)
        again = asyncio.create_task(port.serve(new))
        await asyncio.sleep(0)
        old.answered.set()
        await serving
        await port.called("alice", *range(2000, 2000 + CONNECTIONS_EACH))
        assert await port.hung_up() == [2000], "the first is in use"
        new.answered.set()
        await again

    asyncio.run(body())


def test_the_book_is_bounded(monkeypatch):
    port = Port(monkeypatch, sessions=10)

    async def body():
        for n in range(500):
            await port.called(f"device-{n % 100}", 10_000 + n)
        book = port.gate._connections
        assert len(port.gate._callers) <= 21 and len(book) <= 21 * CONNECTIONS_EACH
        assert len(book) == sum(len(caller.connections) for caller in port.gate._callers.values())
        assert all(one.caller.connections[address] is one for address, one in book.items())

    asyncio.run(body())


def test_an_operator_may_have_as_many_connections_as_calls(port):
    """Each command is one, and the health check of the machine another: they must not shut each other out."""

    async def body():
        calls = [Call("operator", 1000 + n) for n in range(OPERATOR_AT_ONCE + 1)]
        for call in calls:
            call.role = "operator"
        working = [asyncio.create_task(port.serve(call)) for call in calls]
        await asyncio.sleep(0.01)
        assert [call.refusal for call in calls[:-1]] == [""] * OPERATOR_AT_ONCE
        assert f"uses {OPERATOR_AT_ONCE} connections already" in calls[-1].refusal
        assert await port.hung_up() == [calls[-1].port]
        for call in calls:
            call.answered.set()
        await asyncio.gather(*working)

    asyncio.run(body())


def test_a_fetch_that_finds_no_turn_is_told_of(port, monkeypatch):
    monkeypatch.setattr("fp_server.limits.WAIT_SECONDS", 0.05)
    told = []

    async def no_fetch(context):
        told.append(context.name)

    async def body():
        gate = port.gate = Gate(main_rules(), ServerLimits(fetches=1), Complaints(), no_fetch)
        first, second, other = Call("alice", 1000), Call("bob", 1001), Call("carol", 1002)
        working = asyncio.create_task(port.serve(first, FETCH))
        await asyncio.sleep(0.01)
        await port.serve(second, FETCH)
        assert "as many fetches" in second.refusal and told == ["bob"]
        first.answered.set()
        await working
        other.answered.set()
        await port.serve(other, FETCH)
        assert not other.refusal and told == ["bob"] and not gate._under_way.total()

    asyncio.run(body())
