"""What the three command lines say and import before they do anything."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fp_client.cli
import fp_lab.cli
import fp_server.cli
from common.errors import ConfigError
from common.logs import OneLine
from common.version import installed
from fp_client.commands import HERE, at

APPS = {"fp-server": fp_server.cli.app, "fp-client": fp_client.cli.app, "fp-lab": fp_lab.cli.app}
HEAVY = "{'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets'}"


@pytest.mark.parametrize("name", APPS)
def test_the_version_is_told(name: str) -> None:
    said = CliRunner().invoke(APPS[name], ["--version"])
    assert (said.exit_code, said.output) == (0, f"{name} {installed()}\n")
    helped = CliRunner().invoke(APPS[name], ["--help"]).output
    assert "--version" in helped and str(APPS[name].info.help).split(":")[0].split(".")[0] in " ".join(helped.split())


def imported(arguments: list[str], modules: str) -> tuple[int, str]:
    """Exit code and which of `modules` were imported when a command line has run: program, then its arguments."""
    program, *rest = arguments
    code = (
        f"import sys; sys.argv = {[program, *rest]!r}\n"
        f"from {program.replace('-', '_')}.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code or 0\n"
        f"print(sorted({modules} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


def test_the_lab_imports_no_torch_for_what_needs_none(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "experiment.toml").write_text('name = "x"\nmodel = "m"\n[[row]]\nname = "a"\n')
    missing = ["run", str(tmp_path / "none.toml"), "--out", str(tmp_path / "out")]
    for arguments, code in ((["--help"], 0), (["status", str(results)], 0), (["status", str(tmp_path)], 2), (missing, 2)):
        assert imported(["fp-lab", *arguments], HEAVY) == (code, "[]"), arguments


def test_an_operators_command_imports_nothing_that_only_the_server_needs() -> None:
    code = "import sys, fp_server.cli, fp_server.operator, fp_server.views; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("command", ["init", "run", "health", "verify", "backup", "operator", "certificate"])
def test_what_needs_the_data_directory_says_so(command: str) -> None:
    found = typer.main.get_command(fp_server.cli.app).commands  # type: ignore[attr-defined]
    told = {name: next(one.help for one in found[name].params if one.name == "dir") for name in (command, "status", "audit")}
    assert told[command] == "The server's data directory."
    assert told["status"] == told["audit"] == "The server's data directory, or an operator's."


@pytest.mark.parametrize("head", ["3f9a", "f" * 63, "f" * 65, "g" * 64, "3f9a2b1c0d4e5f60…"])
def test_a_head_that_is_no_full_hash_is_a_slip_and_no_tampering(tmp_path: Path, head: str) -> None:
    said = CliRunner().invoke(fp_server.cli.app, ["audit", "--verify", "--head", head, "--dir", str(tmp_path)])
    assert isinstance(said.exception, ConfigError)
    assert str(said.exception) == f"--head: {head!r} is not a full hash (64 hex digits)"


def test_a_named_command_works_on_the_same_directory() -> None:
    assert [at(path) for path in (HERE, Path(), Path("b"), Path("/srv/my device"))] == [
        "", "", " --dir b", " --dir '/srv/my device'"
    ]  # fmt: skip


def test_a_line_of_the_log_has_date_time_and_level() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "device %s", ("a\nb",), None)
    record.created, record.msecs = 0.0, 7.0
    date, time, rest = OneLine().format(record).split(" ", 2)
    assert date in ("1970-01-01", "1969-12-31") and time.endswith(",007") and rest == "INFO device a\\nb"


@pytest.mark.parametrize(
    ("server", "run", "said"),
    [
        ("", None, "a device may claim 1,000,000 samples"),
        ("", 1_000_000, "a device may claim 1,000,000 samples"),
        ("max_samples = 5000000\n", None, "a device may claim 5,000,000 samples"),
        ("max_samples = 500\n", None, ""),
        ("", 500, ""),
        ("nonsense = 1\n", None, ""),
        (None, None, "limits.max_samples is not set, and what the server's own file says can't be seen from here"),
        (None, 500, ""),
    ],
)
def test_a_start_warns_where_nothing_caps_what_devices_claim(
    tmp_path: Path, server: str | None, run: int | None, said: str
) -> None:
    if server is not None:
        (tmp_path / "server.toml").write_text(f'{server}names = ["localhost"]\n')
    assert fp_server.cli._uncapped(tmp_path, run) == said
