"""A whole federation of real processes on loopback: one `fp-server run`, several `fp-client run`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp_server.log import Database, EventLog
from fp_server.operator import Operator
from tests.contract.ports import free_port

BIN = Path(sys.executable).parent
WORDS = [
    "layer",
    "group",
    "device",
    "round",
    "rank",
    "model",
    "server",
    "adapter",
    "probe",
    "budget",
    "unit",
    "block",
    "wire",
    "log",
    "token",
    "data",
]


def write_data(path: Path, rows: int, seed: int) -> Path:
    """Alpaca rows of plain words, different for each seed."""
    lines = []
    for row in range(rows):
        picks = [WORDS[(seed * 7 + row * 3 + i * (seed + 1)) % len(WORDS)] for i in range(6)]
        lines.append(json.dumps({"instruction": f"Say {picks[0]} {row}", "output": " ".join(picks)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens, fits any tiny vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)


class Federation:
    """Start, kill and look at the processes of one federation below `root`."""

    def __init__(self, root: Path, model: Path, model_name: str = "tiny") -> None:
        self.root, self.model, self.model_name = root, model, model_name
        self.server_dir = root / "server"
        self.port, self.enroll_port = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.run_cli(
            "fp-server", "init", "--dir", self.server_dir, "--name", "localhost",
            "--listen", "127.0.0.1", "--port", self.port, "--enroll-port", self.enroll_port,
        )  # fmt: skip

    def run_cli(self, program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        done = subprocess.run(
            [BIN / program, *map(str, arguments)], capture_output=True, text=True, timeout=180, env=self._environment()
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{program} {arguments} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160", "TOKENIZERS_PARALLELISM": "false"}

    def _spawn(self, name: str, *command: object) -> None:
        log = (self.root / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env=self._environment(), start_new_session=True
        )
        log.close()

    def log(self, name: str) -> str:
        """What a process has printed."""
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_server(self) -> None:
        """Start the server and wait until it answers."""
        self._spawn("server", BIN / "fp-server", "run", "--dir", self.server_dir)

        def up() -> bool:
            with socket.socket() as probe:
                probe.settimeout(0.2)
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        self.wait(up, 120, "the server listens")

    def operator(self) -> Operator:
        """The operator's calls."""
        return Operator(self.server_dir)

    def add_device(self, name: str, data: Path, budget: str = "400MB", quantization: str = "none", **extra: str) -> Path:
        """Join a device; returns its directory."""
        directory = self.root / name
        token = self.run_cli("fp-server", "token", name, "--dir", self.server_dir).stdout.strip()
        self.run_cli("fp-client", "join", token, "--dir", directory)
        lines = [
            f'server = "localhost:{self.port}"', 'device = "cpu"', "threads = 1", *(f"{k} = {v}" for k, v in extra.items()),
            "[budget]", f'host = "{budget}"',
            f'[models."{self.model_name}"]', f'source = "{self.model}"', f'quantization = "{quantization}"',
            "[data]", f'source = "{data}"', "held_out = 0.1",
            "[retry]", "attempts = 60", "first_seconds = 0.2", "longest_seconds = 1.0",
        ]  # fmt: skip
        (directory / "client.toml").write_text("\n".join(lines) + "\n")
        return directory

    def start_device(self, name: str) -> None:
        """Start a joined device's daemon."""
        self._spawn(name, BIN / "fp-client", "run", "--dir", self.root / name)

    def kill(self, name: str, signum: int = signal.SIGKILL) -> int:
        """Signal a process (SIGKILL: the daemon alone, not its children) and wait for its end."""
        process = self.processes.pop(name)
        process.send_signal(signum)
        return process.wait(60)

    def close(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run_file(self, name: str, **sections: str) -> Path:
        """A run file; `sections` are TOML lines by section, added to small defaults."""
        base = {
            "run": f'name = "{name}"\nrounds = 2\nmin_devices = 2\ndevices_per_round = 1.0\nprogress_timeout_seconds = 120.0\n',
            "model": f'name = "{self.model_name}"\npath = "{self.model}"\n',
            "lora": "rank = 4\nalpha = 8.0\n",
            "train": "steps = 2\nbatch_size = 4\nsequence_length = 224\nlearning_rate = 1e-3\nfinal_learning_rate = 1e-4\n",
            "probe": "positions = 64\nbatch_size = 4\n",
        }
        for section, lines in sections.items():
            base[section] = base.get(section, "") + lines + "\n"
        path = self.root / f"{name}.toml"
        path.write_text("\n".join(f"[{section}]\n{lines}" for section, lines in base.items()))
        return path

    def status(self) -> dict[str, Any]:
        """The newest run's status."""
        return self.operator().status("")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll; fails with every process's last lines."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            time.sleep(0.2)
        tails = "\n".join(f"--- {name}\n" + "\n".join(self.log(name).splitlines()[-25:]) for name in self.processes)
        raise AssertionError(f"not within {seconds} s: {what}\n{tails}")

    def wait_state(self, state: str = "finished", seconds: float = 600) -> dict[str, Any]:
        """Wait for the run's state; returns its status."""
        self.wait(lambda: self.status()["state"] == state, seconds, f"the run is {state}")
        return self.status()

    def wait_stage(self, device: str, *stages: str, seconds: float = 120) -> None:
        """Wait until a device is at one of these stages of the current round."""

        def there() -> bool:
            current = self.status()["current"]
            return bool(current) and current["devices"].get(device, {}).get("stage") in stages

        self.wait(there, seconds, f"{device} is {' or '.join(stages)}")

    def ledger(self, run: str) -> dict[str, str]:
        """Layer -> digest of its final ledger, from the log of a stopped or running server."""
        database = Database(self.server_dir / "log.sqlite")
        try:
            found: dict[str, str] = {}
            for _, event in EventLog(database).replay(run):
                for unit in getattr(event, "units", ()) if type(event).__name__ == "RoundCommitted" else ():
                    found[str(unit.layer)] = unit.ledger.digest
            return found
        finally:
            database.close()
