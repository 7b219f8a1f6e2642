"""A machine that has only the server: nothing of the training stack is there, and nothing of it is asked for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.checkpoint import dump_manifest
from common.types import ModelManifest, ModuleShape

ABSENT = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "fp_client")
SITE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
"""
RUN = '[run]\nname = "alone"\nrounds = 1\n[model]\nname = "toy"\nmanifest = "toy.json"\n'


@pytest.fixture
def alone(tmp_path):
    """The environment of a process that can't import what only devices need."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "160"}


def call(environment, *arguments):
    command = [Path(sys.executable).parent / "fp-server", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_really_is(alone, name):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], env=alone, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and f"{name} is not installed here" in done.stderr


def test_every_command_of_the_server_works_without_the_training_stack(alone, tmp_path):
    directory = tmp_path / "server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ("--listen", "127.0.0.1", "--port", port, "--enroll-port", 0)
    assert "initialised" in call(alone, "init", "--dir", directory, "--name", "localhost", *address)
    shapes = (ModuleShape("self_attn.q_proj", 8, 8),)
    (tmp_path / "toy.json").write_text(dump_manifest(ModelManifest("toy", "llama", 4, 8, 16, shapes, "ab" * 32)))
    (tmp_path / "run.toml").write_text(RUN)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "fp-server", "run", "--dir", directory], env=alone, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while not (directory / "endpoint.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert call(alone, "token", "phone", "--dir", directory).startswith("fp1.")
        assert "run alone started" in call(alone, "start", tmp_path / "run.toml", "--dir", directory)
        assert "alone  gathering" in call(alone, "status", "--dir", directory)
        assert "alone" in call(alone, "runs", "--dir", directory)
        assert "stopped" in call(alone, "stop", "--dir", directory)
        assert "PEFT" in call(alone, "export", "--help")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()
