"""Error translation both ways, and bounded retries."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from common.errors import BY_NAME, BudgetError, ConfigError, FedPrunerError, IdentityError, UnreachableError, UpdateRejected
from common.transport import wire


def rpc_error(code, details="", name=None):
    trailing = grpc.aio.Metadata(*([(wire.ERROR_KEY, name)] if name else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)


class Context:
    async def abort(self, code, details, metadata):
        raise rpc_error(code, details, dict(metadata)[wire.ERROR_KEY])


@pytest.mark.parametrize("kind", BY_NAME.values())
def test_every_error_of_ours_crosses_the_wire_as_itself(kind):
    async def body():
        async with wire.errors_to_status(Context()):
            raise kind("what, where, what to do")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(body())
    assert caught.value.code() == getattr(grpc.StatusCode, kind.status)
    again = wire.from_rpc_error(caught.value, "h:1")
    assert type(again) is kind and str(again) == "what, where, what to do"


def test_a_long_message_is_cut_to_fit_the_metadata_limit():
    async def body():
        await wire.abort(Context(), UpdateRejected("x" * 10_000))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(body())
    assert len(caught.value.details()) == 2000


@pytest.mark.parametrize(
    ("code", "details", "kind", "said"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Connection refused", UnreachableError, "h:1: can't be reached: Connection refused"),
        (grpc.StatusCode.UNAVAILABLE, "Ssl handshake failed: SSL_ERROR", IdentityError, "TLS handshake failed"),
        (grpc.StatusCode.UNAVAILABLE, "CERTIFICATE_VERIFY_FAILED", IdentityError, "TLS handshake failed"),
        (grpc.StatusCode.UNAVAILABLE, "Handshake read failed (Connection reset by peer)", UnreachableError, "was cut"),
        (grpc.StatusCode.UNAVAILABLE, "Handshake failed", IdentityError, "TLS handshake failed"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", UnreachableError, "did not answer in time"),
        (grpc.StatusCode.PERMISSION_DENIED, "no", IdentityError, "h:1: no"),
        (grpc.StatusCode.UNKNOWN, "boom", FedPrunerError, "h:1: UNKNOWN: boom"),
    ],
)
def test_errors_that_are_not_ours(code, details, kind, said):
    error = wire.from_rpc_error(rpc_error(code, details), "h:1")
    assert type(error) is kind and said in str(error)


def test_a_name_that_is_no_error_of_ours_is_not_believed():
    assert type(wire.from_rpc_error(rpc_error(grpc.StatusCode.UNKNOWN, "x", "SystemExit"), "h")) is FedPrunerError


def retry(answers, attempts=4):
    calls, waits = [], []

    async def call():
        calls.append(1)
        answer = answers[min(len(calls), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    backoff = wire.Backoff(first=0.0, longest=0.0, attempts=attempts)
    try:
        return asyncio.run(wire.retrying(call, backoff, "h:1", lambda n, d, e: waits.append(n))), len(calls), waits
    except FedPrunerError as error:
        return error, len(calls), waits


def test_only_unreachability_is_retried_and_only_so_often():
    gone = rpc_error(grpc.StatusCode.UNAVAILABLE, "refused")
    assert retry([gone, gone, 7]) == (7, 3, [1, 2])
    error, calls, waits = retry([gone])
    assert isinstance(error, UnreachableError) and calls == 4 and waits == [1, 2, 3]
    for final in (rpc_error(grpc.StatusCode.INVALID_ARGUMENT, "x", "ConfigError"), rpc_error(grpc.StatusCode.UNAVAILABLE, "SSL")):
        error, calls, waits = retry([gone, final])
        assert isinstance(error, ConfigError | IdentityError) and calls == 2 and waits == [1]


def test_delays_grow_are_jittered_and_bounded():
    backoff = wire.Backoff(first=1.0, longest=8.0)
    assert [backoff.delay(n, lambda: 1.0) for n in range(6)] == [1, 2, 4, 8, 8, 8]
    assert backoff.delay(2, lambda: 0.0) == 2.0 and backoff.delay(10**6, lambda: 1.0) == 8.0


def test_options_are_prefixed_and_appended():
    made = dict(wire.options(wire.SERVER_OPTIONS, max_receive_message_length=5))
    assert made["grpc.max_receive_message_length"] == 5 and made["grpc.so_reuseport"] == 0 and made["grpc.http2.bdp_probe"] == 0
    assert BudgetError("x", 5).smallest == 5
