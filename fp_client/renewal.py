"""The device's certificate renewed in time, by the daemon itself, while everything goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio
from cryptography import x509

from common.errors import FedPrunerError, IdentityError
from common.transport import enroll, tls, wire
from fp_client.rpc import Connection

log = logging.getLogger(__name__)

LOOK = 3600.0
"""The longest sleep, in seconds: a clock that is set, or a certificate that was replaced by hand, is seen after it."""

Sleep = Callable[[float], Awaitable[None]]


def due(certificate: x509.Certificate) -> datetime:
    """When a daemon renews: within the first tenth of the last third, at a moment that the serial number draws, so that
    devices that joined on one day do not all ask at once."""
    begin, end = tls.renewable_from(certificate), certificate.not_valid_after_utc
    return begin + (end - begin) / 10 * (certificate.serial_number % 1000 / 1000)


def retries(certificate: x509.Certificate) -> wire.Backoff:
    """How long to wait after a failure: from a minute to an hour, less where the whole validity is short."""
    third = (certificate.not_valid_after_utc - tls.renewable_from(certificate)).total_seconds()
    return wire.Backoff(first=min(60.0, third / 20), longest=min(3600.0, third / 5))


async def renew(connection: Connection) -> x509.Certificate:
    """Get a new certificate now, over the one that is there.

    Raises IdentityError (refused), UnreachableError, ProtocolError, StorageError.
    """
    async with connection.using() as channel:
        try:
            return await enroll.renew(channel, connection.directory, "device")
        except grpc.aio.AioRpcError as error:
            raise await connection.translate(error, channel) from None


async def stay_valid(connection: Connection, renewed: Callable[[], Awaitable[None]], sleep: Sleep = asyncio.sleep) -> None:
    """Renew the certificate whenever it is due, for as long as the daemon runs; `renewed` is called after each time.

    No failure ends this: the server may be away for days, a clock be set right, a file be read again, another certificate be
    put in place of one that has ended.
    """
    path = connection.directory / "device.pem"
    failures = 0
    while True:
        try:
            certificate = tls.check_validity(path)
        except IdentityError as error:
            log.error("%s; the next look is in %.0f min", error, LOOK / 60)
            await sleep(LOOK)
            continue
        if (wait := due(certificate).timestamp() - time.time()) > 0:
            await sleep(min(wait, LOOK))
            continue
        try:
            new = await renew(connection)
        except Exception as error:  # one that nobody foresaw is no reason to let the certificate end
            delay = retries(certificate).delay(failures)
            failures += 1
            log.warning(
                "%s ends on %s and is not renewed yet: %s; next try in %.0f s", path, _day(certificate), error, delay,
                exc_info=not isinstance(error, FedPrunerError),
            )  # fmt: skip
            await sleep(delay)
        else:
            log.info("%s is renewed: valid until %s", path, _day(new))
            try:
                await renewed()
            except Exception:
                log.warning("the session goes on with the old certificate until it ends", exc_info=True)
            if due(new).timestamp() > time.time():
                failures = 0
                continue
            delay = retries(new).delay(failures)  # each asks the server for another, and opens the session anew
            failures += 1
            log.warning("%s is new, and due again by this machine's clock: is the clock ahead? Next try in %.0f s", path, delay)
            await sleep(delay)


def _day(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"


def describe(path: Path, renew: str = "fp-client renew") -> str:
    """What `doctor` says of a certificate; `renew`: the command that renews it.

    Raises IdentityError when it is out of its time, or when others can read its key.
    """
    certificate = tls.check_validity(path)
    if problem := tls.exposed(path.with_suffix(".key")):
        raise IdentityError(problem)
    begin = tls.renewable_from(certificate)
    if datetime.now(UTC) < begin:
        return f"valid until {_day(certificate)}; the daemon renews it from {begin:%Y-%m-%d} on"
    return f"valid until {_day(certificate)}; due to be renewed: leave the daemon running, or use `{renew}`"
