"""A renewal while the server's clock or the device's is wrong."""

from __future__ import annotations

import asyncio
import os
import re
import time
from datetime import timedelta

import pytest
from fake_server import serving

from common.errors import IdentityError
from common.transport import tls
from fp_client import renewal
from fp_client.rpc import Connection


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (0.0, "the server's clock seems to be ahead"),
        (3600.0, "this machine's clock seems to be behind"),  # something here is younger than now
    ],
)
def test_a_certificate_that_is_not_valid_yet_does_not_replace_the_good_one(tmp_path, written, said):
    async def main():
        async with serving() as server:
            server.ca.join(tmp_path, valid=(timedelta(days=-60), timedelta(days=10)))
            os.utime(tmp_path / "device.pem", (time.time() + written,) * 2)
            before, issue = (tmp_path / "device.pem").read_bytes(), server.renewal.issue
            ahead = (timedelta(hours=1), timedelta(days=90))
            server.renewal.issue = lambda peer, key: server.ca.device(peer.name, key, valid=ahead)
            connection = Connection(tmp_path, server.address)
            match = rf"not valid before .* UTC, here it is .* UTC: {said}; {re.escape(str(tmp_path))}/device\.pem is kept"
            with pytest.raises(IdentityError, match=match):
                await renewal.renew(connection)
            assert (tmp_path / "device.pem").read_bytes() == before and tls.client_credentials(tmp_path)
            server.renewal.issue = issue
            new = await renewal.renew(connection)  # once the clocks are right
            assert tls.check_validity(tmp_path / "device.pem") == new
            await connection.close()

    asyncio.run(main())
