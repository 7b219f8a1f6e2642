"""`fp-client` as a person and a script see it: real processes, exit codes, what is printed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from datetime import timedelta

import pytest
from fake_ca import FakeCa
from fake_server import serving

from common.checkpoint import Checkpoint
from common.errors import IdentityError, ModelError, ProtocolError, UnknownFamilyError
from fp_client.cli import app
from fp_client.enroll import write_server
from fp_client.shapes import CONFIGS
from tests.unit import device

RETRY = "\n[retry]\nattempts = 3\nfirst_seconds = 0.01\nlongest_seconds = 0.05\n"


async def start(*arguments: object):
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fp_client.cli", *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
    )  # fmt: skip


async def call(*arguments: object) -> tuple[int, str, str]:
    process = await start(*arguments)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


def configure(directory, address: str) -> None:
    (directory / "client.toml").write_text(f'server = "{address}"\n{RETRY}')


def test_join_then_run_until_sigterm(tmp_path):
    async def main():
        async with serving() as server:
            code, out, err = await call("join", server.token(), "--dir", tmp_path, "--json")
            assert code == 0, err
            assert json.loads(out) == {"name": "alice", "role": "device", "server": server.address, "dir": str(tmp_path)}
            process = await start("run", "--dir", tmp_path, "--json")
            async with asyncio.timeout(30):
                while not server.sessions.opened:  # noqa: ASYNC110  # the other side is a process
                    await asyncio.sleep(0.02)
            code, out, err = await call("run", "--dir", tmp_path)
            assert code == 12 and "another fp-client runs on this directory" in err
            async with asyncio.timeout(60):
                while f"connected to {server.address} as 'alice' for " not in out:  # written within a second
                    code, out, err = await call("health", "--dir", tmp_path)
                    assert code == 0, err
            process.send_signal(signal.SIGTERM)
            out, err = await asyncio.wait_for(process.communicate(), 30)
            assert process.returncode == 0 and out == b""
            lines = [json.loads(line) for line in err.decode().splitlines()]
            assert any("connected as 'alice'" in line["message"] for line in lines) and lines[-1]["message"] == "stopped"
            assert any("a finished update is kept for the next start" in line["message"] for line in lines)
            code, _, err = await call("health", "--dir", tmp_path)
            assert code == 7 and "no daemon runs here; start it with `fp-client run --dir" in err

    asyncio.run(main())


def test_an_unreachable_server_ends_the_daemon_with_7_after_bounded_tries(tmp_path):
    FakeCa.make().join(tmp_path)
    configure(tmp_path, "localhost:1")
    code, _, err = asyncio.run(call("run", "--dir", tmp_path))
    assert code == 7 and "try 3 of 3" in err and "try 4" not in err
    assert err.splitlines()[-1].startswith("error: localhost:1: can't be reached")


def test_a_rogue_certificate_ends_the_daemon_with_6(tmp_path):
    async def main():
        async with serving() as server:
            FakeCa.make().join(tmp_path)
            (tmp_path / "ca.pem").write_bytes(server.ca.pem)
            configure(tmp_path, server.address)
            return await call("run", "--dir", tmp_path)

    code, _, err = asyncio.run(main())
    assert code == 6 and "refuses this device's certificate" in err.splitlines()[-1]


@pytest.mark.parametrize("case", ["missing", "expired"])
def test_no_certificate_or_an_expired_one_ends_the_daemon_with_6(tmp_path, case):
    if case == "expired":
        FakeCa.make().join(tmp_path, valid=(timedelta(days=-2), timedelta(days=-1)))
    configure(tmp_path, "localhost:1")
    code, _, err = asyncio.run(call("run", "--dir", tmp_path))
    assert code == 6 and ("fp-client join" in err if case == "missing" else "expired on" in err)


def test_another_schema_ends_the_daemon_with_8(tmp_path):
    async def main():
        async with serving() as server:
            server.sessions.refuse = ProtocolError("the device speaks protocol schema A, this server B")
            server.ca.join(tmp_path)
            configure(tmp_path, server.address)
            return await call("run", "--dir", tmp_path)

    code, _, err = asyncio.run(main())
    assert code == 8 and err.splitlines()[-1] == "error: the device speaks protocol schema A, this server B"


def test_doctor_says_what_is_missing_and_what_to_do(tmp_path):
    async def main():
        async with serving() as server:
            server.ca.join(tmp_path)
            write_server(tmp_path / "client.toml", server.address)
            return await call("doctor", "--dir", tmp_path, "--json")

    code, out, _ = asyncio.run(main())
    found = {finding["check"]: finding for finding in json.loads(out)}
    assert code == 2
    assert {name for name, finding in found.items() if not finding["ok"]} == {"data", "model"}
    assert "accepts this certificate" in found["server"]["note"] and "add [data]" in found["data"]["note"]


@pytest.mark.parametrize(
    "why", ["has been revoked; ask the operator for a new token", "is an operator; this needs the role device"]
)
def test_doctor_shows_its_certificate_to_somebody_who_looks_at_it(tmp_path, why):
    """The health service lets pass whatever the CA has signed."""

    async def main():
        async with serving() as server:
            server.objects.error = IdentityError(f"the certificate of 'alice' {why}")
            server.ca.join(tmp_path)
            (tmp_path / "client.toml").write_text(f'server = "{server.address}"\n')
            result = await call("doctor", "--dir", tmp_path, "--json")
            assert server.sessions.opened == 0
            return result

    code, out, _ = asyncio.run(main())
    assert code == 6
    assert [finding["note"] for finding in json.loads(out) if finding["check"] == "server"] == [
        f"the certificate of 'alice' {why}"
    ]


class Printed:
    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """The command line's entry point in this process."""
        from fp_client import cli

        before, sys.argv = sys.argv, ["fp-client", *map(str, arguments)]
        handler = signal.getsignal(signal.SIGTERM)  # `run` takes it over
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            sys.argv = before
            if signal.getsignal(signal.SIGTERM) is not handler:
                signal.signal(signal.SIGTERM, handler)
        seen = self.capsys.readouterr()
        return ended.value.code or 0, seen.out, seen.err


@pytest.fixture
def run(capsys) -> Printed:
    return Printed(capsys)


def test_errors_are_one_line_and_their_exit_code(tmp_path, run):
    assert run("join", "nonsense", "--dir", tmp_path)[::2] == (
        6, "error: this is not a join token; copy the whole line that `fp-server token` printed (it begins with fp1.)\n"
    )  # fmt: skip
    (tmp_path / "client.toml").write_text("colour = 1\n")
    code, _, err = run("run", "--dir", tmp_path)
    assert code == 2 and err.endswith("client.toml: colour: unknown key\n")
    code, _, err = run("plan", "--dir", tmp_path)
    assert code == 2 and "unknown key" in err


def test_plan_of_common_shapes(tmp_path, run):
    code, out, _ = run(
        "plan", "--dir", tmp_path, "--json", "--budget", "3GB", "--batch", "1", "--rank", "8", "--broadcast-rank", "16"
    )
    plan = json.loads(out)
    rows = {row["model"]: row for row in plan["models"]}
    assert code == 0 and set(rows) == set(CONFIGS) and plan["budget"] == 3 * 10**9
    for row in rows.values():
        assert [mode["gradient"] for mode in row["modes"]] == ["submodel", "stitched", "streamed"]
        for mode in row["modes"]:
            assert mode["peak"] <= plan["budget"] and 0 < mode["units"] <= row["of"]
            assert mode["peak"] == max(sum(mode["train"]["rows"].values()), sum(row["probe"]["rows"].values()))
    seven, thirteen = ([mode["units"] for mode in rows[name]["modes"]] for name in ("llama2-7b", "llama2-13b"))
    assert seven[0] > thirteen[0] and seven[2] == 32 > seven[0]


def test_plan_of_one_gradient_mode_and_of_components(tmp_path, run):
    asked = ("plan", "--dir", tmp_path, "--shape", "llama2-7b", "--budget", "1200MiB", "--batch", "1", "--gradient", "streamed")
    code, out, _ = run(*asked, "--units", "component", "--json")
    row = json.loads(out)["models"][0]
    assert code == 0 and [mode["gradient"] for mode in row["modes"]] == ["streamed"]
    assert row["of"] == 64 and row["modes"][0]["units"] % 2 == 0 and row["unit_bytes"][0] < row["unit_bytes"][1]
    code, out, _ = run(*asked)
    assert code == 0 and "streamed" in out and "stitched" not in out


def test_plan_of_a_budget_too_small_says_the_smallest_that_would_do(tmp_path, run):
    asked = ("plan", "--dir", tmp_path, "--json", "--shape", "llama2-7b", "--batch", "1", "--gradient", "submodel", "--budget")
    code, out, err = run(*asked, "300MB")
    row = json.loads(out)["models"][0]
    assert code == 5 and row["modes"] == [] and "the smallest that would do" in err
    code, out, _ = run(*asked, row["smallest_budget"])
    assert code == 0 and json.loads(out)["models"][0]["modes"][0]["units"] == 1


def test_wrong_flags(tmp_path, run):
    code, _, err = run("plan", "--dir", tmp_path, "--shape", "gpt-9")
    assert code == 2 and "'gpt-9' is not known (known: smollm2-135m" in err
    code, _, err = run("plan", "--dir", tmp_path, "--budget", "much")
    assert code == 2 and err.startswith("error: --budget: not a size")


def test_every_command_has_help_with_an_example(run):
    assert len(app.registered_commands) == 9
    for command in app.registered_commands:
        code, out, _ = run(command.callback.__name__, "--help")
        assert code == 0 and "Example:" in out


def test_missing_model_for_manifest_and_merge(tmp_path, run):
    code, _, err = run("manifest", tmp_path / "none", "-o", tmp_path / "m.json")
    assert code == 3 and "no such model directory" in err
    code, _, err = run("merge", tmp_path, tmp_path / "adapter", tmp_path / "out")
    assert code == 2 and "adapter_config.json" in err


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-10])
    return shard.name, "truncated or corrupt"


def break_header(shard):
    shard.write_bytes(b"\x10" + shard.read_bytes()[1:])
    return shard.name, "not a usable safetensors file"


def remove(shard):
    shard.unlink()
    return shard.name, "shard is missing (named by model.safetensors.index.json)"


def of_no_family(shard):
    path = shard.parent / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt_neox"}))
    return "config.json", "model family 'gpt_neox' is not supported (supported: "


@pytest.mark.parametrize("damage", [truncate, break_header, remove, of_no_family])
def test_a_damaged_model_is_named_with_its_file_and_3(tmp_path, run, damage):
    model = device.model(tmp_path)
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    name, why = damage(shards[1])
    with pytest.raises(ModelError) as caught:
        Checkpoint(model)
    assert isinstance(caught.value, UnknownFamilyError) == (damage is of_no_family)
    assert f"{model / name}: " in str(caught.value) and why in str(caught.value)

    device.data(tmp_path / "data.jsonl")
    here = f'[budget]\nhost = "1GiB"\n[models."toy"]\nsource = "{model}"\n[data]\nsource = "{tmp_path / "data.jsonl"}"\n'

    async def doctor():
        async with serving() as server:
            server.ca.join(tmp_path)
            (tmp_path / "client.toml").write_text(f'server = "{server.address}"\n{here}')
            return await call("doctor", "--dir", tmp_path, "--json")

    code, out, _ = asyncio.run(doctor())
    found = {finding["check"]: finding for finding in json.loads(out)}
    assert code == 3 and [check for check, finding in found.items() if not finding["ok"]] == ["model toy"]
    assert str(model / name) in found["model toy"]["note"] and why in found["model toy"]["note"]
    for command in (("plan", "--dir", tmp_path), ("manifest", model, "-o", tmp_path / "m.json")):
        code, _, err = run(*command)
        said = err.splitlines()[-1]  # before it, what making the model printed
        assert code == 3 and said.startswith(f"error: {model / name}: ") and why in said, err
    assert not (tmp_path / "m.json").exists()


def test_a_plan_for_a_directory_that_is_not_there_ends_with_2(tmp_path, run):
    code, out, err = run("plan", "--dir", tmp_path / "nodir")
    assert code == 2 and not out and f"error: --dir: {tmp_path / 'nodir'} is no directory" in err


def test_the_command_line_and_the_daemon_do_not_import_torch():
    check = (
        "import sys, fp_client.cli, fp_client.commands_plan\n"
        "assert 'grpc' not in sys.modules, 'grpc'\n"
        "import fp_client.app\n"
        "assert not {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
    )

    async def main():
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", check, stderr=asyncio.subprocess.PIPE)
        _, err = await process.communicate()
        return process.returncode, err.decode()

    assert asyncio.run(main()) == (0, "")


def test_a_manifest_can_be_printed_where_no_file_can_be_written(tmp_path, run):
    model = device.model(tmp_path)
    code, out, _ = run("manifest", model, "--name", "tiny", "-o", "-")
    assert code == 0 and run("manifest", model, "--name", "tiny", "-o", tmp_path / "tiny.json")[0] == 0
    assert json.loads(out) == json.loads((tmp_path / "tiny.json").read_text()) and json.loads(out)["name"] == "tiny"
