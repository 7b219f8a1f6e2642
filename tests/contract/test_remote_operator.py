"""An operator who is not on the server's machine, and the audit trail of what operators and devices did."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import stat
import subprocess
import sys
from datetime import timedelta

import pytest
from fake_ca import FakeCa
from server_side import MANIFEST, Device, Server, hello, read, run_toml
from test_bad_access import first_answer, refused
from test_client_cli import Printed
from test_server_cli import cli

from common.checkpoint import dump_manifest
from common.pb import admin_pb2, admin_pb2_grpc, session_pb2_grpc
from common.token import JoinToken
from common.transport import tls
from fp_server import audit
from fp_server.log import Database


@pytest.fixture
def run(capsys) -> Printed:
    return Printed(capsys)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def token_for(server, name, *more):
    said = cli("token", name, *more, "--dir", server.directory)
    return next(line for line in said.splitlines() if line.startswith("fp1."))


def test_every_command_works_from_another_machine(tmp_path):
    """From a directory that holds an operator's certificate and the server's address, and nothing else of the server."""
    server = Server(tmp_path / "server")
    server.start()
    there = tmp_path / "operators" / "alice"
    at = ("--dir", there)
    try:
        token = token_for(server, "alice-op", "--role", "operator")
        said = cli("join", token, *at)
        assert f"joined {server.address} as operator 'alice-op'" in said and token not in said
        assert sorted(path.name for path in there.iterdir()) == ["ca.pem", "operator.key", "operator.pem", "operator.toml"]
        assert mode(there) == 0o700 and mode(there / "operator.key") == 0o600 and mode(there / "operator.pem") == 0o600
        assert "already joined" in cli("join", token, *at, code=6)
        assert "no runs yet" in cli("runs", *at)
        (tmp_path / "run.toml").write_text(run_toml(rounds=1, final_evaluation=False))
        (tmp_path / "toy.json").write_text(dump_manifest(MANIFEST))
        assert "run toy-run started" in cli("start", tmp_path / "run.toml", *at)
        assert "paused" in cli("pause", *at) and "gathering" in cli("resume", *at)
        assert "nothing to export" in cli("export", "--out", tmp_path / "none", *at, code=9)

        async def both():
            async with asyncio.timeout(60):
                await asyncio.gather(*(Device(server, name).live() for name in ("alice", "bob")))

        asyncio.run(both())
        assert json.loads(cli("status", "--json", *at))["state"] == "finished"
        assert json.loads(cli("status", "--watch", "--json", *at).splitlines()[-1])["state"] == "finished"
        said = cli("export", "toy-run", "--out", tmp_path / "far", *at)
        assert said == cli("export", "toy-run", "--out", tmp_path / "near", "--dir", server.directory).replace("/near", "/far")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
        assert "exists already" in cli("export", "--out", tmp_path / "far", *at, code=2)
        assert "no run 'other'" in cli("export", "other", "--out", tmp_path / "x", *at, code=9)
        assert JoinToken.decode(cli("token", "carol", *at)).server == server.address
        assert "revoked 1 certificate of bob" in cli("revoke", "bob", *at)
        assert "no certificate and no token was ever issued for 'nobody'" in cli("revoke", "nobody", *at, code=9)
        assert "run other started" in cli("start", _other(tmp_path), *at) and "stopped" in cli("stop", *at)
        for command in (["operator"], ["certificate"]):
            assert "not a server directory; run this on the server's machine" in cli(*command, *at, code=2)
        mine = [json.loads(line) for line in cli("audit", "--json", *at).splitlines()]
        assert mine == [json.loads(line) for line in cli("audit", "--json", "--dir", server.directory).splitlines()]
        did = [
            (entry["action"], entry["object"]) for entry in mine if entry["actor"] == "alice-op" and entry["action"] != "enroll"
        ]
        actions = "start, pause, resume, read ledger, read ledger, token, revoke, start, stop"
        assert ", ".join(action for action, _ in did) == actions and {what for _, what in did[:5]} == {"run toy-run"}
        assert did[6][1].startswith("bob: 1 certificates")
        certificate = tls.check_validity(there / "operator.pem")
        for entry in mine:
            if entry["actor"] == "alice-op":
                assert (entry["role"], entry["serial"]) == ("operator", f"{certificate.serial_number:x}")
                assert entry["address"].startswith("127.0.0.1:") or entry["address"].startswith("[::1]:")
        assert "revoked 1 certificate of alice-op" in cli("revoke", "alice-op", "--dir", server.directory)
        said = cli("runs", *at, code=6)
        assert "certificate of 'alice-op' has been revoked; ask the operator for a new token" in said
        assert server.stop() == 0
        said = cli("runs", *at, code=7)
        assert "can't be reached" in said and "does the server run, and listen there?" in said
    finally:
        if server.process is not None:
            server.kill()


def _other(tmp_path):
    (tmp_path / "other.toml").write_text(run_toml(name="other"))
    return tmp_path / "other.toml"


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("remote") / "server")
    server.start()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log()


def test_a_token_is_for_its_role_and_not_used_up_by_the_other_command(idle, tmp_path, run):
    token = token_for(idle, "dora-op", "--role", "operator")
    code, _, err = run("join", token, "--dir", tmp_path / "device")
    assert code == 6 and "the token for 'dora-op' is for the role operator: use it with `fp-server join`" in err
    assert not (tmp_path / "device" / "device.pem").exists()
    cli("join", token, "--dir", tmp_path / "operator")
    token = token_for(idle, "dora")
    assert "is for the role device: use it with `fp-client join`" in cli("join", token, "--dir", tmp_path / "o2", code=6)
    assert run("join", token, "--dir", tmp_path / "device")[0] == 0
    assert mode(tmp_path / "device") == 0o700
    assert "is a server's data directory; join in another --dir" in cli("join", token, "--dir", idle.directory, code=2)
    assert "neither a server's directory" in cli("runs", "--dir", tmp_path / "device", code=2)
    (tmp_path / "operator" / "operator.toml").write_text('server = "http://fp.example"\n')
    assert "is not host:port" in cli("runs", "--dir", tmp_path / "operator", code=2)


def test_a_second_token_for_a_name_in_use_warns(idle, tmp_path, run):
    first = cli("token", "frank", "--dir", idle.directory)
    assert "warning" not in first
    assert "warning: there is an unused token for 'frank' already; both can be used" in cli(
        "token", "frank", "--dir", idle.directory
    )
    assert run("join", first.strip(), "--dir", tmp_path / "d")[0] == 0
    said = cli("token", "frank", "--dir", idle.directory)
    assert "warning: device 'frank' has a certificate that is valid until 20" in said and "`fp-server revoke frank` first" in said
    said = cli("token", "frank", "--role", "operator", "--dir", idle.directory)
    assert "revoking 'frank' will revoke both" in said
    assert "revoked 1 certificate of frank; 3 unused tokens void" in cli("revoke", "frank", "--dir", idle.directory)
    assert "revoked 0 certificates of frank" in cli("revoke", "frank", "--dir", idle.directory)
    assert "revoked 0 certificates of ghost" in cli("revoke", "ghost", "--force", "--dir", idle.directory)


def test_an_operators_certificate_is_renewed_by_whatever_command_is_used(idle, tmp_path, monkeypatch):
    """In its last third; a server that can't renew it is worth a warning and not the command."""
    there = tmp_path / "op"
    cli("join", token_for(idle, "gina", "--role", "operator"), "--dir", there)
    fresh = (there / "operator.pem").read_bytes()
    cli("runs", "--dir", there)
    assert (there / "operator.pem").read_bytes() == fresh
    old = tls.check_validity(there / "operator.pem")
    monkeypatch.setattr(tls, "renewable_from", lambda certificate: certificate.not_valid_before_utc)
    cli("runs", "--dir", there)
    new = tls.check_validity(there / "operator.pem")
    assert new.serial_number != old.serial_number and new.public_key() == old.public_key()
    assert tls.identity_of(new) == ("operator", "gina")
    ca = FakeCa(tls.load_key(idle.directory / "ca.key"), tls.check_validity(idle.directory / "ca.pem"))
    unknown = ca.device("gina", new.public_key(), role="operator", valid=(timedelta(days=-60), timedelta(days=10)))
    tls.write_private(there / "operator.pem", unknown)
    logged = []
    monkeypatch.setattr(logging.getLogger("fp_server"), "warning", lambda text, *more: logged.append(text % more))
    assert "no runs yet" in cli("runs", "--dir", there)
    assert len(logged) == 1 and "could not be renewed: the certificate of 'gina' is not in this server's books" in logged[0]


def test_what_is_refused_is_in_the_trail_and_the_chain_holds(idle, tmp_path, run):
    """A device that plays the operator, an operator that plays a device, a revoked one, and bad tokens."""
    idle.identity("henry", "operator")
    idle.identity("ida")
    bad = JoinToken.decode(token_for(idle, "jo"))
    token = JoinToken(bad.enroll, bad.server, bad.ca, "x" * 43).encode()

    async def attempts():
        async with idle.channel("alice") as channel:
            for _ in range(3):
                await refused(admin_pb2_grpc.AdminStub(channel).Revoke(admin_pb2.RevokeRequest(name="bob"), timeout=10))
        async with idle.channel("henry") as channel:
            await refused(lambda: first_answer(channel, hello()))
        async with idle.channel("ida") as channel:
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await call.write(hello())
            await read(call)
            async with idle.admin() as admin:
                await admin.Revoke(admin_pb2.RevokeRequest(name="ida"), timeout=10)
            await refused(read(call))
            await refused(lambda: first_answer(channel, hello()))

    asyncio.run(attempts())
    assert run("join", token, "--dir", tmp_path / "d")[0] == 6
    at = ("--dir", idle.directory)

    def refusals():
        entries = [json.loads(line) for line in cli("audit", "--json", *at).splitlines()]
        return {(e["actor"], e["role"], e["action"], e["object"], e["outcome"]) for e in entries if e["outcome"] != "ok"}

    async def all_there():
        async with asyncio.timeout(20):
            while len(refusals() & expected) < len(expected):  # noqa: ASYNC110  entered within a second or two
                await asyncio.sleep(0.1)

    gone = "ask the operator for a new token"
    expected = {
        ("alice", "device", "call", "Revoke", "refused: 'alice' is a device; this needs the role operator"),
        ("henry", "operator", "call", "Open", "refused: 'henry' is an operator; this needs the role device"),
        ("ida", "device", "call", "Open", f"refused: the certificate of 'ida' has been revoked; {gone}"),
        (
            "", "", "enroll", "Enroll",
            "refused: the token is unknown here; ask the operator for a new one (`fp-server token NAME`)",
        ),
    }  # fmt: skip
    asyncio.run(all_there())
    said = cli("audit", "--verify", *at)
    head = re.search(r"^(\d+) entries, each follows from the one before; audit head ([0-9a-f]{64})", said)
    assert head and int(head[1]) == len(cli("audit", "--json", *at).splitlines())
    assert json.loads(cli("audit", "--verify", "--head", head[2], "--json", *at))["head"] == head[2]
    assert f"audit head {head[2]}" in cli("audit", "--verify", "--head", head[2].upper(), *at)
    first = json.loads(cli("audit", "--json", *at).splitlines()[2])["hash"]
    assert f"it contains {first[:16]}… as entry 3" in cli("audit", "--verify", "--head", first, *at)
    assert "is not a full hash (64 hex digits)" in cli("audit", "--verify", "--head", head[2][:16], *at, code=2)
    assert "no audit entry has the hash ffff" in cli("audit", "--verify", "--head", "f" * 64, *at, code=11)
    assert "--head: goes with --verify" in cli("audit", "--head", "f", *at, code=2)
    assert "--since: 'yesterday' is neither" in cli("audit", "--since", "yesterday", *at, code=2)
    assert "not a server directory" in cli("audit", "--dir", tmp_path / "none", code=2)
    shown = cli("audit", "--since", "1h", *at)
    assert "operator operator" in shown and "device alice" in shown and "nothing in the audit trail" not in shown
    assert "nothing in the audit trail for that time" in cli("audit", "--since", "2999-01-01", *at)


def test_no_secret_is_in_any_log_or_trail(tmp_path, run, caplog):
    """Everything said at debug level while devices and an operator join, renew, fail and are revoked, on both sides."""
    caplog.set_level(logging.DEBUG)
    server = Server(tmp_path / "server")
    secrets: list[str] = []
    said: list[str] = []
    with (server.directory / "server.log").open("ab") as log:
        command = [sys.executable, "-c", "from fp_server.cli import main; main()", "run", "-v", "--dir", str(server.directory)]
        environment = {**os.environ, "GRPC_VERBOSITY": "DEBUG"}
        server.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def client(*arguments, code=0):
        found, out, err = run(*arguments)
        assert found == code, err
        said.extend((out, err))

    def token(*arguments):
        text = token_for(server, *arguments)
        secrets.extend((text, JoinToken.decode(text).secret))
        return text

    try:
        asyncio.run(_until(lambda: (server.directory / "endpoint.json").exists()))
        text = token("kim")
        client("join", text, "--dir", tmp_path / "kim")
        client("join", text, "--dir", tmp_path / "kim-again", code=6)
        text = token("lee", "--role", "operator")
        said.append(cli("join", text, "--dir", tmp_path / "lee"))
        said.append(cli("join", text, "--dir", tmp_path / "lee-again", code=6))
        client("renew", "--dir", tmp_path / "kim")
        token("kim")
        said.append(cli("revoke", "kim", "--dir", server.directory))
        client("renew", "--dir", tmp_path / "kim", code=6)
        said.append(cli("audit", "--dir", tmp_path / "lee"))
        said.append(cli("audit", "--json", "--dir", server.directory))
        assert server.stop() == 0
    finally:
        if server.process is not None:
            server.kill()
    for path in tmp_path.rglob("*.key"):
        secrets += [line for line in path.read_text().splitlines() if "-----" not in line]
    assert len(secrets) > 15
    text = "\n".join(said) + server.log() + caplog.text
    assert "kim" in text and "PRIVATE KEY" not in text and "BEGIN CERTIFICATE" not in text
    kept = b"".join(path.read_bytes() for path in server.directory.glob("log.sqlite*"))
    for secret in secrets:
        assert secret not in text
        assert secret.encode() not in kept
    database = Database(server.directory / "log.sqlite")
    try:
        assert audit.verify(audit.read(database)) is not None
        did = [(row.entry.actor.name, row.entry.action) for row in audit.read(database)]
        assert [pair for pair in did if pair[0] in ("kim", "lee")][:3] == [("kim", "enroll"), ("lee", "enroll"), ("kim", "renew")]
    finally:
        database.close()


async def _until(ready):
    async with asyncio.timeout(60):
        while not ready():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
