"""What every case begins with: a tiny model, a server directory and two joined devices, made once and copied for each."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.faults import spawn

DEVICES = ("alpha", "beta")
RUN = """\
[run]
name = "run"
rounds = 2
seed = 11
min_devices = 2
min_updates = 2
devices_per_round = 1.0
max_attempts = 10
progress_timeout_seconds = 90.0
[model]
name = "tiny"
path = "{model}"
[lora]
rank = 4
alpha = 8.0
start = "global"
[train]
gradient = "submodel"
steps = 2
batch_size = 2
sequence_length = 224
learning_rate = 1e-3
final_learning_rate = 1e-4
[probe]
positions = 32
batch_size = 2
[limits]
update_bytes = 60_000
"""
CLIENT = """\
server = "localhost:{port}"
device = "cpu"
[budget]
host = "400MB"
[models."tiny"]
source = "{model}"
quantization = "{quantization}"
[data]
source = "{data}"
held_out = 0.1
max_held_out = 2
[retry]
attempts = 400
first_seconds = 0.1
longest_seconds = 0.4
"""
MODEL = """
import sys
import time
from pathlib import Path
from tests.integration.federation import write_data, write_tokenizer
from tests.unit import tiny
root = Path(sys.argv[1])
made = tiny.make("llama", root, hidden_size=64, intermediate_size=128)
write_tokenizer(made)
for seed, name in enumerate(sys.argv[2:]):
    write_data(root / f"{name}.jsonl", 20 + 8 * seed, seed)
"""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ground:
    """The template below `directory`; `copy` gives a case its own."""

    def __init__(self, directory: Path, stub: Path) -> None:
        self.directory, self.stub = directory, stub
        self.model = directory / "llama"

    def make(self) -> None:
        """Make what is missing. Joins go over the wire, once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.model / "tokenizer.json").exists():
            subprocess.run([sys.executable, "-c", MODEL, str(self.directory), *DEVICES], check=True, capture_output=True)
        if (self.directory / "template").exists():
            return
        making = self.directory / "template.new"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        (making / "run.toml").write_text(RUN.format(model=self.model))
        log, ports = making / "making.log", (free_port(), free_port())
        arguments = ("init", "--dir", making / "server", "--name", "localhost", "--listen", "127.0.0.1")
        self._do("fp-server", log, *arguments, "--port", ports[0], "--enroll-port", ports[1])
        server = spawn.spawn(spawn.program("fp-server", ("run", "--dir", making / "server")), log, {})
        try:
            for name in DEVICES:
                self._join(name, making, log, ports[0])
        finally:
            os.kill(server, 15)
            spawn.wait(server)
        for left in ("objects", "partial", "scratch"):  # a case's server is started for the first time
            shutil.rmtree(making / "server" / left)
        (making / "server" / "endpoint.json").unlink()
        log.unlink()
        making.rename(self.directory / "template")

    def _join(self, name: str, making: Path, log: Path, port: int) -> None:
        said = making / "token"
        while not (making / "server" / "endpoint.json").exists():
            time.sleep(0.05)
        self._do("fp-server", said, "token", name, "--dir", making / "server")
        token = re.search(r"fp1\.\S+", said.read_text())
        assert token is not None, said.read_text()
        said.unlink()
        self._do("fp-client", log, "join", token[0], "--dir", making / name)
        quantization = "nf4" if name == DEVICES[0] else "none"
        data = self.directory / f"{name}.jsonl"
        (making / name / "client.toml").write_text(
            CLIENT.format(port=port, model=self.model, quantization=quantization, data=data)
        )

    def _do(self, name: str, log: Path, *arguments: object) -> None:
        code = spawn.wait(spawn.spawn(spawn.program(name, arguments), log, {}))
        assert code == 0, f"{name} {arguments}: exit code {code}\n{log.read_text()}"

    def copy(self, root: Path, proxy: int = 0) -> int:
        """A directory for one case; the server's port. `proxy`: where the devices connect instead."""
        shutil.copytree(self.directory / "template", root)
        port = free_port()
        config = root / "server" / "server.toml"
        text = re.sub(r"(?m)^port = \d+", f"port = {port}", config.read_text())
        config.write_text(re.sub(r"(?m)^enroll_port = \d+", "enroll_port = 0", text) + "grace_seconds = 5\n")
        for name in DEVICES:
            client = root / name / "client.toml"
            client.write_text(re.sub(r"localhost:\d+", f"localhost:{proxy or port}", client.read_text()))
        return port


def armed(directory: Path, name: str, faults: list[dict[str, object]], trace: bool) -> dict[str, str]:
    """The environment that arms a process called `name`."""
    marks = directory / "marks" / name
    marks.mkdir(parents=True, exist_ok=True)
    plan = {"dir": str(marks), "trace": str(marks / "trace") if trace else "", "faults": faults}
    return {"FP_FAULTS": json.dumps(plan)}
