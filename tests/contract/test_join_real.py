"""`fp-client join` against the real server: every bad token has its own text, and exit code 6."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from fake_ca import FakeCa
from test_client_cli import Printed

from common.errors import IdentityError
from common.token import JoinToken
from common.transport import tls
from fp_client.commands_doctor import Doctor
from fp_client.config import ClientConfig, load_config
from fp_client.rpc import Connection
from fp_server.operator import Operator


@pytest.fixture
def run(capsys) -> Printed:
    return Printed(capsys)


def changed(text: str, **values: str) -> str:
    token = JoinToken.decode(text)
    return JoinToken(**{**{name: getattr(token, name) for name in ("enroll", "server", "ca", "secret")}, **values}).encode()


def test_each_bad_token_is_refused_by_its_reason(server, tmp_path, run):
    operator = Operator(server.directory)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    good = operator.token("carol", "device", 60).text
    code, out, err = run("join", good, "--dir", first, "--json")
    assert code == 0, err
    assert json.loads(out) == {"name": "carol", "role": "device", "server": server.address, "dir": str(first)}
    assert tls.check_validity(first / "device.pem")

    refused = {
        "wrong": (changed(good, secret="x" * 43), "the token is unknown here; ask the operator for a new one"),
        "used": (good, "the token for 'carol' was used before; ask the operator for a new one"),
    }
    for bad, text in refused.values():
        code, _, err = run("join", bad, "--dir", second)
        assert code == 6 and err.splitlines()[-1].startswith(f"error: {text}"), err
    short = operator.token("dave", "device", 1).text
    time.sleep(1.1)
    code, _, err = run("join", short, "--dir", second)
    assert code == 6 and "error: the token for 'dave' has expired; ask the operator for a new one" in err
    assert not (second / "device.pem").exists() and not (second / "client.toml").exists()

    unused = operator.token("erin", "device", 60).text
    code, _, err = run("join", changed(unused, ca=FakeCa.make().digest), "--dir", third)
    assert code == 6 and "the server's CA is not the token's" in err and "Nothing was sent" in err
    code, _, err = run("join", unused, "--dir", third)
    assert code == 0, "the token was not spent on a server that is not the token's"


@pytest.mark.parametrize("again", [False, True])
def test_a_certificate_is_renewed_in_its_own_directory(server, tmp_path, run, again):
    """Near its end by a plain `join`, before that with --again; the server knows both certificates."""
    directory = server.devices / "alice"  # of one day, just issued
    (directory / "client.toml").write_text('server = "elsewhere:1"\nthreads = 2\n')
    operator = Operator(server.directory)
    if not again:
        ca = x509.load_pem_x509_certificate((server.directory / "ca.pem").read_bytes())
        key = tls.load_key(directory / "device.key")
        age = (timedelta(days=-340), timedelta(days=25))
        pem = FakeCa(tls.load_key(server.directory / "ca.key"), ca).device("alice", key.public_key(), valid=age)
        (directory / "device.pem").write_bytes(pem)
    before = {name: (directory / name).read_bytes() for name in ("device.key", "device.pem")}
    token = operator.token("alice", "device", 60).text
    if again:
        code, _, err = run("join", token, "--dir", directory)
        assert code == 6 and "already joined" in err and "--again" in err
    code, _, err = run("join", changed(token, secret="y" * 43), "--dir", directory, *(["--again"] if again else []))
    assert code == 6 and "unknown here" in err
    assert {name: (directory / name).read_bytes() for name in before} == before, "a refused renewal costs nothing"
    code, _, err = run("join", token, "--dir", directory, *(["--again"] if again else []))
    assert code == 0, err
    assert (directory / "device.key").read_bytes() == before["device.key"]
    assert tls.check_validity(directory / "device.pem").not_valid_after_utc > datetime.now(UTC) + timedelta(days=26)
    config = load_config(directory)
    assert (config.server, config.threads) == (server.address, 2)

    async def session():
        connection = Connection(directory, server.address)
        opened = await connection.open()
        await opened.close()
        await connection.close()
        return opened.device

    assert asyncio.run(session()) == "alice"


def test_doctor_says_that_a_device_is_revoked(server, tmp_path):
    """And passes one that is not, though there is no run and nothing to ask about."""
    operator, directory = Operator(server.directory), server.devices / "alice"
    doctor = Doctor(directory, 0, True)
    doctor.config = ClientConfig(server=server.address)
    assert asyncio.run(doctor._server()) == f"{server.address} accepts this certificate (SERVING)"
    operator.revoke("alice")
    with pytest.raises(IdentityError, match="the certificate of 'alice' has been revoked"):
        asyncio.run(doctor._server())


def test_another_name_for_a_directory_is_said(server, tmp_path, run):
    operator, directory = Operator(server.directory), tmp_path / "twice"
    code, out, err = run("join", operator.token("gina", "device", 60).text, "--dir", directory)
    assert code == 0 and "from now on" not in err and out.endswith(f"then `fp-client doctor --dir {directory}`\n")
    code, out, err = run("join", operator.token("hugo", "device", 60).text, "--dir", directory, "--again")
    assert code == 0 and "as device 'hugo'" in out
    assert f"{directory} was 'gina' and is 'hugo' from now on; `fp-server revoke gina` ends the old certificate" in err
