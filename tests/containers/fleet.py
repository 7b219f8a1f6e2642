"""A federation in containers, by the commands a person would type: docker and compose as subprocesses.

Every `Fleet` is a project of compose.yaml as it is in the checkout, with a directory of its own for what a person would
write: the devices' client.toml, their data, run files, and memory limits in .env.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import FedPrunerError
from fp_server.operator import Operator
from tests.integration.federation import write_data

ROOT = Path(__file__).resolve().parents[2]
SERVER, CLIENT = "fedpruner-server", "fedpruner-client:cpu"
"""The images, as compose.yaml names them."""
LEDGER = """
import json
from pathlib import Path
from fp_server.log import Database, EventLog
found = {}
for _, event in EventLog(Database(Path("/data/log.sqlite"))).replay("%s"):
    for unit in getattr(event, "units", ()) if type(event).__name__ == "RoundCommitted" else ():
        found[unit.layer] = unit.ledger.digest
print(json.dumps(found, sort_keys=True))
"""


def call(
    *command: object, check: bool = True, input: str | None = None, timeout: float = 240, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. With `check`, a failure is an AssertionError with all it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # compose is Python too
    environment |= {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
    words = [str(part) for part in command]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, input=input, timeout=timeout, cwd=cwd, env=environment
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def docker(*arguments: object, check: bool = True, both: bool = False) -> str:
    """What a docker command prints, on standard output or on `both`."""
    done = call("docker", *arguments, check=check)
    return (done.stdout + done.stderr if both else done.stdout).strip()


@functools.cache
def compose_command() -> tuple[str, ...]:
    """`docker compose` where it is installed, else docker-compose."""
    plugin = ("docker", "compose")
    return plugin if call(*plugin, "version", check=False).returncode == 0 else ("docker-compose",)


class Fleet:
    """One project: `server` and some of device-1 … device-4."""

    def __init__(self, root: Path, models: Path, model: str, budgets: dict[str, str], data_rows: int = 24) -> None:
        """`models`: the directory that holds the model `model`; `budgets`: device -> its budget."""
        self.root, self.model, self.devices = root, model, tuple(budgets)
        self.project = re.sub(r"[^a-z0-9]", "", root.name.lower()) + os.urandom(3).hex()
        self.limits: dict[str, str] = {}
        self._operator: Operator | None = None
        root.mkdir()
        shutil.copy(ROOT / "compose.yaml", root)
        for name in ("devices", "runs", "data"):
            (root / name).mkdir()
        self.models = models
        for seed, (device, budget) in enumerate(budgets.items()):
            (root / "data" / device).mkdir()
            write_data(root / "data" / device / "data.jsonl", data_rows + 8 * seed, seed)
            self.configure(device, budget)
        self.write_environment()

    # -- what a person writes --------------------------------------------------------------------

    def configure(self, device: str, budget: str) -> None:
        """The device's client.toml."""
        (self.root / "devices" / f"{device}.toml").write_text(
            f'server = "server:7443"\ndevice = "cpu"\n[budget]\nhost = "{budget}"\n[models."{self.model}"]\n'
            f'source = "/models/{self.model}"\n[data]\nsource = "/data/data.jsonl"\nheld_out = 0.1\n'
            "[retry]\nattempts = 60\nfirst_seconds = 0.2\nlongest_seconds = 1.0\n"
        )

    def write_environment(self, **limits: int) -> None:
        """.env: where things are, and the devices' memory limits in bytes."""
        self.limits |= {f"{device.upper().replace('-', '_')}_MEMORY": str(limit) for device, limit in limits.items()}
        lines = {"FP_TORCH": "cpu", "FP_MODELS": str(self.models), **self.limits}
        lines |= {f"FP_{name.upper()}": f"./{name}" for name in ("devices", "runs", "data")}
        (self.root / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))

    def run_file(self, name: str, manifest: Path, steps: int, window: int = 224) -> str:
        """A run file of two rounds of so many steps of 4 rows of `window` tokens. Returns its path in the container."""
        sections = {
            "run": f'name = "{name}"\nrounds = 2\nmin_devices = {len(self.devices)}\ndevices_per_round = 1.0\n'
            "progress_timeout_seconds = 180.0\n",
            "model": f'name = "{self.model}"\nmanifest = "{manifest.name}"\n',
            "lora": "rank = 4\nalpha = 8.0\n",
            "train": f"steps = {steps}\nbatch_size = 4\nsequence_length = {window}\n"
            "learning_rate = 1e-3\nfinal_learning_rate = 1e-4\n",
            "probe": "positions = 64\nbatch_size = 4\n",
        }
        if manifest.parent != self.root / "runs":
            shutil.copy(manifest, self.root / "runs")
        (self.root / "runs" / f"{name}.toml").write_text("\n".join(f"[{part}]\n{lines}" for part, lines in sections.items()))
        return f"/runs/{name}.toml"

    # -- what a person types ---------------------------------------------------------------------

    def compose(
        self, *arguments: object, check: bool = True, both: bool = False, input: str | None = None, timeout: float = 240
    ) -> str:
        """What a compose command prints, on standard output or on `both`."""
        command = (*compose_command(), "-p", self.project, *arguments)
        done = call(*command, check=check, input=input, timeout=timeout, cwd=self.root)
        return (done.stdout + done.stderr if both else done.stdout).strip()

    def server(self, *arguments: object) -> str:
        """What an fp-server command in the server's container prints."""
        return self.compose("exec", "-T", "server", "fp-server", *arguments)

    def start_server(self) -> None:
        """The first start: init, then up."""
        self.compose("run", "--rm", "-T", "server", "init", "--name", "server")
        self.compose("up", "-d", "--no-build", "server")

    def join(self, device: str) -> str:
        """A token from the server's container into the device's, never on a disk or a command line."""
        token = self.server("token", device, "--ttl", "10m")
        return self.compose("run", "--rm", "-T", device, "join", "-", input=token + "\n")

    def up(self, *devices: str) -> None:
        """Start devices; compose waits for the server's health first."""
        self.compose("up", "-d", "--no-build", *(devices or self.devices))

    def down(self) -> None:
        """Remove containers, volumes and networks, paused ones too."""
        for container in docker("ps", "-q", "--filter", f"label=com.docker.compose.project={self.project}").split():
            docker("unpause", container, check=False)
        self.compose("down", "-v", "--remove-orphans", "-t", 1, check=False)

    def start(self, run: str) -> None:
        """Start a run by its path in the server's container."""
        self.server("start", run)

    # -- looking ---------------------------------------------------------------------------------

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        labels = {"project": self.project, "service": service, "oneoff": "False"}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        found = docker("ps", "-aq", "--no-trunc", *filters).split()
        assert len(found) == 1, f"{service}: {found}"
        return found[0]

    def inspect(self, service: str) -> dict[str, Any]:
        """`docker inspect` of a service's container."""
        return dict(json.loads(docker("inspect", self.container(service)))[0])

    def log(self, service: str) -> str:
        """What a service has printed."""
        return docker("logs", self.container(service), both=True)

    def inside(self, service: str, *command: object) -> str:
        """What a command in a running service's container prints."""
        return docker("exec", self.container(service), *command)

    def status(self, run: str = "") -> dict[str, Any]:
        """A run's status, asked for at the server's live address with the operator's certificate."""
        container = self.container("server")
        if self._operator is None:
            certificates = self.root / "operator"
            certificates.mkdir()
            for name in ("ca.pem", "operator.pem", "operator.key", "server.toml"):
                docker("cp", f"{container}:/data/{name}", certificates)
            self._operator = Operator(certificates)
        networks = json.loads(docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", container))
        self._operator.address = f"{next(iter(networks.values()))['IPAddress']}:7443"
        return self._operator.status(run, 2**32 - 1)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll; a server that is away or restarts is asked again. Fails with everyone's last lines."""
        deadline, seen = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (FedPrunerError, AssertionError, StopIteration) as error:
                seen = str(error)
            time.sleep(0.3)
        tails = "\n".join(f"--- {name}\n" + "\n".join(self.log(name).splitlines()[-25:]) for name in ("server", *self.devices))
        raise AssertionError(f"not within {seconds} s: {what} {seen}\n{tails}")

    def wait_state(self, run: str, state: str = "finished", seconds: float = 600) -> dict[str, Any]:
        """Wait for the run's state; returns its status."""
        self.wait(lambda: self.status(run)["state"] == state, seconds, f"run {run} is {state}")
        return self.status(run)

    def wait_stage(self, run: str, device: str, *stages: str, seconds: float = 120) -> None:
        """Wait until a device is at one of these stages of the current round."""

        def there() -> bool:
            current = self.status(run)["current"]
            return bool(current) and current["devices"].get(device, {}).get("stage") in stages

        self.wait(there, seconds, f"{device} is {' or '.join(stages)}")

    def wait_health(self, service: str, health: str = "healthy", seconds: float = 120) -> None:
        """Wait for what Docker makes of the image's health check."""
        self.wait(lambda: self.inspect(service)["State"]["Health"]["Status"] == health, seconds, f"{service} is {health}")

    def ledger(self, run: str) -> dict[str, str]:
        """Layer -> digest of its final ledger, from the log in the server's volume."""
        return dict(json.loads(self.inside("server", "python", "-c", LEDGER % run)))

    def memory(self, service: str) -> dict[str, int]:
        """The container's own account, in bytes, with version 1 or 2 of control groups: `peak` (page cache included),
        `limit`, `swap_limit` (0: none), and `kills`, how often the kernel killed one of its processes for memory."""
        script = (
            "cd /sys/fs/cgroup; if [ -e memory.max ]; then cat memory.peak memory.max memory.swap.max memory.events; else "
            "cd memory; cat memory.max_usage_in_bytes memory.limit_in_bytes memory.memsw.limit_in_bytes memory.oom_control; fi"
        )
        lines = self.inside(service, "sh", "-c", script).splitlines()
        peak, limit, swap = (int(line) for line in lines[:3])
        kills = next(int(line.split()[1]) for line in lines[3:] if line.startswith("oom_kill "))
        old = any(line.startswith("oom_kill_disable") for line in lines)
        return {"peak": peak, "limit": limit, "swap_limit": max(0, swap - limit) if old else swap, "kills": kills}

    @contextmanager
    def held(self, service: str) -> Iterator[Callable[[], int]]:
        """Inside, the call gives the most bytes of processes' own memory (no page cache) seen so far in the container: looked
        at twenty times a second from this machine's control groups; 0 where they can't be read."""
        path, most, over = _statistics(self.inspect(service)["State"]["Pid"]), 0, threading.Event()

        def look() -> None:
            nonlocal most
            while path is not None and not over.wait(0.05):
                try:
                    found = re.search(r"^(?:total_rss|anon) (\d+)$", path.read_text(), re.MULTILINE)
                except OSError:
                    return
                most = max(most, int(found[1]) if found else 0)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield lambda: most
        finally:
            over.set()
            thread.join()


def _statistics(pid: int) -> Path | None:
    """memory.stat of a process's control group, as this machine shows it."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        base = "/sys/fs/cgroup/memory" if controllers == "memory" else "/sys/fs/cgroup" if not controllers else None
        if base is not None and (path := Path(f"{base}{group}/memory.stat")).exists():
            return path
    return None
