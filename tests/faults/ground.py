"""What every case begins with: a tiny model, a server directory and two joined devices, made once and copied for each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.contract.ports import free_port
from tests.faults import disturb, spawn

DEVICES = ("alpha", "beta")
ROUNDS = 2
AGED = -172_800.0
"""Seconds by which the clock is set back while the template is made: a clock that jumps back by a day later must not come to a
time before the certificates begin."""
ENDING = 2 / 1440
"""Days for which the certificates of an eventful federation are valid. They begin five minutes back, so their last third has
begun as well, and each daemon renews its own at once."""
RUN = """\
[run]
name = "run"
rounds = {rounds}
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


class Ground:
    """The template below `directory`; `copy` gives a case its own."""

    def __init__(self, directory: Path, stub: Path) -> None:
        self.directory, self.stub = directory, stub
        self._before: Callable[[], object] = lambda: None
        self.model, self.template = directory / "llama", directory / "aged"

    def make(self) -> None:
        """Make what is missing. Joins go over the wire, once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.model / "tokenizer.json").exists():
            subprocess.run([sys.executable, "-c", MODEL, str(self.directory), *DEVICES], check=True, capture_output=True)
        if self.template.exists():
            return
        making = self.directory / "making"
        shutil.rmtree(making, ignore_errors=True)
        aged = making / "marks" / "clock"
        aged.parent.mkdir(parents=True)
        aged.write_text(str(AGED))
        self._before = lambda: disturb.clock(aged, issuing=True)
        (making / "run.toml").write_text(RUN.format(model=self.model, rounds=ROUNDS))
        log, ports = making / "making.log", (free_port(), free_port())
        arguments = ("init", "--dir", making / "server", "--name", "localhost", "--listen", "127.0.0.1")
        self._do("fp-server", log, *arguments, "--port", ports[0], "--enroll-port", ports[1])
        server = spawn.spawn(spawn.program("fp-server", ("run", "--dir", making / "server"), before=self._before), log, {})
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
        shutil.rmtree(aged.parent)
        making.rename(self.template)

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
        code = spawn.wait(spawn.spawn(spawn.program(name, arguments, before=self._before), log, {}))
        assert code == 0, f"{name} {arguments}: exit code {code}\n{log.read_text()}"

    def copy(self, root: Path, proxy: int = 0) -> int:
        """A directory for one case; the server's port. `proxy`: where the devices connect instead."""
        shutil.copytree(self.template, root)
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


def liven(root: Path) -> str:
    """Make a copy eventful, so that steps are passed which an ordinary federation does not come to: all certificates end soon,
    files lie about that a crash has left, and every activation of a device is spilled."""
    from common.transport import tls
    from fp_server import books
    from fp_server.certificates import Issuer, pem
    from fp_server.log import Database
    from fp_server.own import OwnCertificates

    server, run = root / "server", root / "run.toml"
    run.write_text(run.read_text().replace('gradient = "submodel"', 'gradient = "streamed"'))
    database = Database(server / "log.sqlite")
    try:
        own, issuer = OwnCertificates(server, database), Issuer(server)
        own.server(["localhost"], ENDING)
        own.operator("operator", ENDING, same_key=True)
        for name in DEVICES:
            key = tls.load_key(root / name / "device.key").public_key()
            certificate = issuer.client(key, name, "device", ENDING)
            database.run(partial(books.store, certificate=certificate, name=name, role="device"))
            tls.write_private(root / name / "device.pem", pem(certificate))
            (root / "marks" / name).mkdir(parents=True, exist_ok=True)
            (root / "marks" / name / "spill").touch()
    finally:
        database.close()
    for left in (f"objects/00/{'0' * 64}", f"partial/gone/{'0' * 64}", "scratch/left"):
        (server / left).parent.mkdir(parents=True, exist_ok=True)
        (server / left).write_bytes(b"left by a crash")
    return "livened"
