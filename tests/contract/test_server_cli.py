"""`fp-server` as a person meets it: outputs and exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from ports import free_port
from server_side import MANIFEST, Device, Server, hello, read, run_toml

from common.checkpoint import dump_manifest
from common.pb import session_pb2_grpc
from common.token import JoinToken
from fp_server.app import initialise
from fp_server.cli import main
from fp_server.health import host_port


def cli(*arguments: object, code: int = 0) -> str:
    """Run `fp-server …`; its output, both streams, after checking the exit code. Only `run` needs a process of its own."""
    if arguments[0] != "run":
        return in_process(list(map(str, arguments)), code)
    command = [sys.executable, "-c", "from fp_server.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"}, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code, (done.returncode, said)
    assert "Traceback" not in said
    return said


def in_process(arguments: list[str], code: int) -> str:
    said, aside = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(aside),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["fp-server", *arguments])
        patch.setenv("COLUMNS", "200")
        main()
    assert (ended.value.code or 0) == code, (ended.value.code, said.getvalue(), aside.getvalue())
    # A script reads standard output alone; what gRPC logs of other tests' closed event loops goes to standard error.
    return said.getvalue() if "--json" in arguments else said.getvalue() + aside.getvalue()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("cli") / "server")
    (server.directory / "toy.json").write_text(dump_manifest(MANIFEST))
    server.start()
    yield server
    assert server.stop() == 0


def test_init_makes_a_directory_once(tmp_path):
    said = cli("init", "--dir", tmp_path / "d", "--name", "fp.example.org", "--name", "10.0.0.5")
    assert "fp-server run --dir" in said
    assert (tmp_path / "d" / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700
    before = (tmp_path / "d" / "ca.pem").read_bytes()
    assert "already initialised" in cli("init", "--dir", tmp_path / "d", "--name", "x", code=2)
    assert (tmp_path / "d" / "ca.pem").read_bytes() == before
    for words in (("x", "--port", "70000"), ("x", "--port", "7443", "--enroll-port", "7443"), ("https://fp.example.org",)):
        said = cli("init", "--dir", tmp_path / "e", "--name", *words, code=2)
        assert ("host name" if "https" in words[0] else "port") in said
    assert not (tmp_path / "e").exists(), "nothing is made of a configuration that is refused"


def test_not_initialised(tmp_path):
    for command in (["run"], ["status"], ["runs"], ["stop"], ["token", "x"]):
        assert str(tmp_path / "none") in cli(*command, "--dir", tmp_path / "none", code=2).replace("\n", "")
    assert "not a server directory" in cli("export", "--dir", tmp_path / "none", "--out", tmp_path / "o", code=2)
    assert not (tmp_path / "none").exists()


def test_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        initialise(tmp_path / "d", ["localhost"], "127.0.0.1", port, 0)
        assert f"127.0.0.1:{port}: can't listen there" in cli("run", "--dir", tmp_path / "d", code=12)
        initialise(tmp_path / "e", ["localhost"], "127.0.0.1", free_port(), port)
        assert f"127.0.0.1:{port}: can't listen there" in cli("run", "--dir", tmp_path / "e", code=12)


def test_a_second_server_on_the_same_directory(running):
    assert "another fp-server is running on this directory" in cli("run", "--dir", running.directory, code=12)
    assert asyncio.run(running.status())["state"] in ("idle", "stopped", "gathering", "paused")


def test_server_down(tmp_path):
    server = Server(tmp_path / "d", ())
    (tmp_path / "run.toml").write_text(run_toml())
    (tmp_path / "toy.json").write_text(dump_manifest(MANIFEST))
    start = ["start", tmp_path / "run.toml"]
    for command in (["status"], ["status", "--watch"], ["runs"], ["pause"], ["token", "x"], ["revoke", "x"], start):
        said = cli(*command, "--dir", server.directory, code=7)
        assert "can't be reached" in said and "fp-server run --dir" in said


BAD_RUNS = {
    "unknown key": (run_toml().replace("[model]", "colour = 1\n[model]"), 2, "run.colour: unknown key"),
    "unknown section": (run_toml() + "\n[colours]\n", 2, "colours: unknown key"),
    "wrong type": (run_toml(rounds="two"), 2, "run.rounds: Input should be a valid integer (got 'two')"),
    "no method": (run_toml(method="magic"), 2, "run.method: no such method (there are: fedpruner, random) (got 'magic')"),
    "no gradient": (run_toml(train_gradient="exact"), 2, "train.gradient: Input should be 'submodel', 'stitched', 'streamed' or"),
    "no targets": (run_toml(pruning_units="component", lora_targets=["q_proj"]), 2, "a device may get ffn parts alone"),
    "no room": (run_toml(limits_update_bytes=9), 2, "limits.update_bytes: 9 holds no layer: one takes 576 bytes"),
    "no model file": (run_toml().replace("toy.json", "none.json"), 3, "none.json: can't be read"),
    "no model here": (run_toml().replace('manifest = "toy.json"', 'path = "nowhere"'), 3, "nowhere: no such model directory"),
    "no module": (run_toml(lora_targets=["z_proj"]), 2, "lora.targets: the model has no module 'z_proj' (it has: mlp.down_proj"),
    "not TOML": ("[run\n", 2, "not valid TOML"),
    "bad name": (run_toml(name="Not A Name"), 2, "run.name: must be lower-case"),
    "missing": ("[run]\nname = 'x'\n", 2, "model: missing"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_run_files(running, tmp_path, case):
    text, code, said = BAD_RUNS[case]
    (tmp_path / "run.toml").write_text(text)
    (tmp_path / "toy.json").write_text(dump_manifest(MANIFEST))
    assert said in cli("start", tmp_path / "run.toml", "--dir", running.directory, code=code).replace("\n", " ")


def test_a_run_file_or_manifest_that_is_none(running, tmp_path):
    assert "no such file" in cli("start", tmp_path / "none.toml", "--dir", running.directory, code=2)
    (tmp_path / "run.toml").write_text(run_toml())
    (tmp_path / "toy.json").write_text('{"name": "x"}')
    assert "not a model manifest" in cli("start", tmp_path / "run.toml", "--dir", running.directory, code=3)


def test_tokens(running):
    token = JoinToken.decode(cli("token", "phone-17", "--ttl", "90s", "--dir", running.directory))
    assert token.server == running.address
    assert "not a name" in cli("token", "Phone 17", "--dir", running.directory, code=2)
    assert "not a role" in cli("token", "x", "--role", "king", "--dir", running.directory, code=2)
    assert "not a duration" in cli("token", "x", "--ttl", "soon", "--dir", running.directory, code=2)
    assert "between a second and 30 days" in cli("token", "x", "--ttl", "31d", "--dir", running.directory, code=2)
    said = cli("revoke", "nobody", "--dir", running.directory, code=9)
    assert "no certificate and no token was ever issued for 'nobody'; nothing was revoked" in said


def test_a_run_from_start_to_export(tmp_path):
    server = Server(tmp_path / "server")
    server.start()
    at = ("--dir", server.directory)
    try:
        assert "no runs yet" in cli("runs", *at)
        assert "no run yet" in cli("status", *at)
        assert json.loads(cli("runs", "--json", *at)) == []
        assert "no run has been started yet" in cli("pause", *at, code=9)
        assert "no run 'other'" in cli("status", "other", *at, code=9)
        (tmp_path / "run.toml").write_text(run_toml())
        (tmp_path / "toy.json").write_text(dump_manifest(MANIFEST))
        said = cli("start", tmp_path / "run.toml", *at)
        assert "run toy-run started" in said and said.count("warning: limits.min_holders is 1") == 1
        assert "limits.min_holders = 2 in the run file" in said
        said = cli("start", tmp_path / "run.toml", *at, code=2)
        assert "there is already a run 'toy-run'" in said and "warning" not in said
        (tmp_path / "other.toml").write_text(run_toml(name="other"))
        assert "run 'toy-run' is active; stop it first" in cli("start", tmp_path / "other.toml", *at, code=2)
        assert "paused" in cli("pause", *at)
        assert json.loads(cli("status", "--json", *at))["paused"] == "paused by the operator"
        assert "paused: paused by the operator" in cli("status", *at)
        assert "gathering" in cli("resume", "toy-run", *at)
        assert "nothing to export" in cli("export", "--out", tmp_path / "a", *at, code=9)

        async def both():
            async with asyncio.timeout(30):
                await asyncio.gather(Device(server, "alice").live(), Device(server, "bob").live())

        asyncio.run(both())
        assert [r["state"] for r in json.loads(cli("runs", "--json", *at))] == ["finished"]
        shown = cli("status", *at)
        assert "finished" in shown and "2 of 2 rounds" in shown and "full-model held-out loss" in shown and "alice" in shown
        watched = cli("status", "--watch", "--json", *at)
        assert json.loads(watched.splitlines()[-1])["state"] == "finished"
        assert "has finished; nothing to stop" in cli("stop", *at, code=2)
        assert "after 2 rounds" in cli("export", "toy-run", "--out", tmp_path / "adapter", *at)
        assert str(tmp_path / "adapter") in cli("export", "--out", tmp_path / "adapter", *at, code=2).replace("\n", "")
        assert "no run 'other'" in cli("export", "other", "--out", tmp_path / "b", *at, code=9)
        assert "run other started" in cli("start", tmp_path / "other.toml", *at)
        assert "stopped" in cli("stop", *at)
        assert [r["state"] for r in json.loads(cli("runs", "--json", *at))] == ["stopped", "finished"]
        assert "finished" in cli("runs", *at)
        assert server.stop() == 0
        assert "after 2 rounds" in cli("export", "toy-run", "--out", tmp_path / "later", *at)
        assert (tmp_path / "later" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
    finally:
        if server.process is not None:
            server.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_server_with_exit_0_also_while_someone_watches(tmp_path, signum):
    server = Server(tmp_path / "server")
    server.start()

    async def body():
        async with server.channel("alice") as channel, asyncio.timeout(20):
            call = session_pb2_grpc.SessionsStub(channel).Open()
            await call.write(hello())
            await read(call)
            server.process.send_signal(signum)
            assert await asyncio.to_thread(server.process.wait) == 0

    asyncio.run(body())
    assert "Traceback" not in server.log() and server.log().count("stopping") >= 1


def test_a_server_that_listens_on_one_address_is_spoken_to_there(tmp_path):
    """127.0.0.2: not what localhost means, and not in the certificate."""
    directory = tmp_path / "server"
    cli("init", "--dir", directory, "--name", "localhost", "--listen", "127.0.0.2", "--port", 0, "--enroll-port", 0)
    command = [sys.executable, "-c", "from fp_server.cli import main; main()", "run", "--dir", str(directory)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (directory / "endpoint.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert "no run yet" in cli("status", "--dir", directory)
    finally:
        process.kill()
        process.wait()


def test_addresses_as_grpc_wants_them():
    assert [host_port(host, 1) for host in ("::1", "10.0.0.5", "fp.example.org")] == ["[::1]:1", "10.0.0.5:1", "fp.example.org:1"]
