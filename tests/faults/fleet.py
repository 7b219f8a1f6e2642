"""One federation of real daemons on loopback: started, watched, disturbed as its case says, started again, and judged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import StorageError
from tests.faults import disturb, proxy, shadow, spawn
from tests.faults.case import Case, Result
from tests.faults.cases import EVENTS
from tests.faults.deeds import NOTHING, Asked, acted, ended, kills, thaw
from tests.faults.evidence import inspect, missing
from tests.faults.ground import DEVICES, ROUNDS, Ground, armed, free_port, liven
from tests.faults.verdict import judge

LONGEST = 150.0
"""Seconds a case may take on a busy machine; some six are usual on an idle one."""
SETTLING = 4.0
"""Seconds after the run's end in which what is still to happen at its end happens."""


class Fleet:
    """The processes of one case below `root`."""

    def __init__(self, ground: Ground, root: Path, case: Case) -> None:
        self.ground, self.root, self.case = ground, root, case
        shutil.rmtree(root, ignore_errors=True)
        self.outside = free_port() if case.proxied else 0
        self.port = ground.copy(root, self.outside)
        self.pids: dict[str, int] = {}
        self.killed: set[int] = set()
        self.problems: list[str] = []
        self.restarts, self.spared = 0, 0
        self.flipped: list[str] = []
        self._asked = Asked(self)
        self._thaw: list[tuple[float, int]] = []
        self._ended_at, self._server_from = 0.0, 0
        (root / "out").mkdir()
        (root / "kept").mkdir()
        for name, tasks in case.refuse.items():
            (root / "marks" / name).mkdir(parents=True)
            (root / "marks" / name / "refuse").write_text(json.dumps(tasks))
        if case.eventful:
            self._in_a_process(lambda: liven(root))
        if case.power:
            shadow.begin(self.disk(case.power), root / "shadow")

    # -- processes -----------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start the server, a device, the operator's command or the export."""
        at = self.root / ("server" if name in ("operator", "export") else name)
        environment = armed(self.root, name, self.case.faults.get(name, []), self.case.trace)
        if name == self.case.power or (self.case.power == "server" and at.name == "server"):  # the export closes the log, too
            environment |= shadow.environment(self.disk(self.case.power), self.root / "shadow")

        def disturbed() -> None:
            disturb.install(self.root / "marks" / name)

        if name == "server":
            self._server_from = len(self.log("server"))
            work = spawn.program("fp-server", ("run", "--dir", at), before=disturbed)
        elif name == "operator":
            work = spawn.program("fp-server", ("start", self.root / "run.toml", "--dir", at))
        elif name == "export":
            work = spawn.program("fp-server", ("export", "--out", self.root / "out" / "adapter", "--dir", at))
        elif name == "proxy":
            work = proxy.proxying(self.outside, self.port, self.root / "proxy.sock")
        else:
            work = spawn.program("fp-client", ("run", "--dir", at), self.ground.stub, disturbed)
        self.pids[name] = spawn.spawn(work, self.root / f"{name}.log", environment)

    def disk(self, name: str) -> Path:
        """Where a process keeps what it keeps."""
        return self.root / ("out" if name == "export" else name)

    def lose_power(self, name: str) -> bool:
        """The machine of a process goes down; what was not synced is gone. Whatever somebody was told must still be there.
        Whether it was up."""
        if (pid := self.pids.pop(name, None)) is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            time.sleep(0.2)  # its worker ends with it
        rng = None if self.case.chance is None else random.Random(self.case.chance)
        shadow.lose(self.disk(name), self.root / "shadow", rng)
        if name != "export":
            damaged = [Path(path).name for path in self.flipped]  # on purpose, and perhaps not seen yet
            lost = self._in_a_process(lambda: missing(self.root, name))
            self.problems += [text for text in lost if not any(digest in text for digest in damaged)]
        if pid is not None and name == "export" and (self.root / "out" / "adapter").exists():
            self.spared += 1  # its rename was kept: whether all else was, its bytes tell
        elif pid is not None:
            self.restarts += 1
            self.start(name)
        return pid is not None

    def _in_a_process(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, done in a process of its own."""
        out, log = self.root / "found.json", self.root / "inspect.log"
        out.unlink(missing_ok=True)
        code = spawn.wait(spawn.spawn(lambda: out.write_text(json.dumps(work())), log, {}))
        return json.loads(out.read_text()) if code == 0 else [f"the directory can't be read: {self.log('inspect')[-600:]}"]

    def kill(self, name: str, number: int = signal.SIGKILL) -> bool:
        """Signal a process; it is started again when it has ended. Whether it was there."""
        if (pid := self.pids.get(name)) is None or ended(pid):
            return False
        self.killed.add(pid)
        os.kill(pid, number)
        return True

    def freeze(self, name: str, seconds: float) -> bool:
        """Stop a process for a while. Whether it was there."""
        if (pid := self.pids.get(name)) is None or ended(pid):
            return False
        os.kill(pid, signal.SIGSTOP)
        until = max([time.monotonic() + seconds, *(at for at, frozen in self._thaw if frozen == pid)])
        self._thaw = [*((at, frozen) for at, frozen in self._thaw if frozen != pid), (until, pid)]
        return True

    def log(self, name: str) -> str:
        """What a process has said."""
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End whatever still runs."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.pids.clear()

    # -- watching ------------------------------------------------------------------------------

    def live(self) -> None:
        """From the start to the run's end, whatever happens on the way."""
        if self.case.proxied:
            self.start("proxy")
        self.start("server")
        if all(one in EVENTS["server"] for one in self.case.faults.get("server", [])):
            self._await_server()
        for name in DEVICES:
            self.start(name)
        deadline = time.monotonic() + LONGEST
        while not self._over():
            if time.monotonic() > deadline:
                self.problems.append(f"not finished within {LONGEST:.0f} s")
                return
            self._step()
        self._reap()  # one that was killed in the last moment is started again, too

    def _await_server(self) -> None:
        """A device that finds no server tries again later: how often it opens a session, and whether it renews its certificate
        before the run ends, would be a matter of luck. Where the server's start is disturbed, the devices are there."""
        patience = time.monotonic() + LONGEST / 2
        while "serving localhost" not in self.log("server"):
            if time.monotonic() > patience:
                self.problems.append("the server does not come to serve")
                return
            time.sleep(0.02)

    def export(self) -> None:
        """Export from the directory, again when that is killed."""
        self.start("export")
        deadline = time.monotonic() + LONGEST / 2
        while "export" in self.pids and time.monotonic() < deadline:
            self._step()

    def _step(self) -> None:
        self._operate()
        self._asked.answer()
        self._reap()
        self._thaw = thaw(self._thaw, set(self.pids.values()))
        time.sleep(0.02)

    def _operate(self) -> None:
        """Start the run once the server answers; again when the server was killed before it had an answer."""
        if "operator" not in self.pids and "serving localhost" in self.log("server")[self._server_from :] and not self._begun():
            self.start("operator")

    def _begun(self) -> bool:
        said = self.log("operator")
        return "already a run" in said or "run run started" in said

    def _over(self) -> bool:
        """Whether the run has finished and its end was heard; where not, because of a fault, after a while."""
        if self._ended_at == 0.0 and self._finished():
            self._ended_at = time.monotonic()
        if self._ended_at == 0.0:
            return False
        heard = all("run run: finished" in self.log(name) for name in DEVICES)
        ready = heard and self._happened_all(("server", *DEVICES)) and not self._thaw
        return (ready and time.monotonic() > self._ended_at + 0.3) or time.monotonic() > self._ended_at + SETTLING

    def _finished(self) -> bool:
        """By the server's own words; one that was killed just after the last event finds nothing to take up."""
        begun, said = self._begun(), self.log("server")  # in this order: the server says first that the run has begun
        if "run run finished" in said:
            return True
        latest = said[self._server_from :]
        going_on = "taken up again" in latest or "run run started" in latest
        return begun and "serving localhost" in latest and not going_on

    def _reap(self) -> None:
        for name, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done == 0:
                continue
            del self.pids[name]
            code = spawn.exit_code(status)
            if name == "operator":
                if code not in (0, 2, 7, 11, -9):
                    self.problems.append(f"fp-server start: exit code {code}: {self.log(name)[-300:]}")
                continue
            full = code == StorageError.exit_code and "fail:ENOSPC" in str(self.case.faults.get(name))  # it has said so
            struck = pid in self.killed or code == -signal.SIGKILL or full
            if name == "export" and (code == 0 or (struck and (self.root / "out" / "adapter").exists())):
                self.spared += code != 0  # killed after the rename, it is whole: its bytes are compared
                continue
            if not struck:  # nobody has killed it, and no fault either
                self.problems.append(f"{name} ended by itself, exit code {code}: {self.log(name)[-400:]}")
                if len(self.problems) > 5:
                    raise Hopeless
            self.restarts += 1
            self.start(name)

    # -- the end -------------------------------------------------------------------------------

    def happened(self) -> list[str]:
        """The faults that have happened, as ``process: deed at point``, and whether they found something to act on."""
        found = [f"flipped a bit of {name}" for name in self.flipped]
        for name, number, one in self._faults():
            if (self.root / "marks" / name / f"fault-{number}").exists():
                nothing = "" if acted(self.root / "marks", name, number, one["do"]) else NOTHING
                found.append(f"{name}: {one['do']} at {one['at']}#{one.get('hit', 1)}{nothing}")
        return found

    def _faults(self) -> list[tuple[str, int, dict[str, Any]]]:
        return [(name, number, one) for name, faults in self.case.faults.items() for number, one in enumerate(faults)]

    def _happened_all(self, names: tuple[str, ...]) -> bool:
        marks = self.root / "marks"
        return all((marks / name / f"fault-{number}").exists() for name, number, _ in self._faults() if name in names)

    def _vacuous(self) -> str:
        """Why this case has tried nothing, if it has not: its faults did not happen, or nobody noticed."""
        happened = self.happened()
        if self.case.must and not self._happened_all(tuple(self.case.faults)):
            return "a fault did not happen"
        if self.case.must and (idle := [text for text in happened if text.endswith(NOTHING)]):
            return "; ".join(idle)
        marks = self.root / "marks"
        killing = [
            (marks / name / f"fault-{number}").exists() and acted(marks, name, number, one["do"])
            for name, number, one in self._faults()
            if kills(name, one["at"], one["do"])
        ]
        return "a process was killed, and none was started again" if any(killing) and not self.restarts + self.spared else ""

    def judged(self, expected: dict[str, Any] | None, seconds: float) -> Result:
        """The verdict, from the directory that is left."""
        found: Any = {}
        if self.case.power and not self.problems:
            self.lose_power(self.case.power)
            self.close()
        if not self.problems:
            found = self._in_a_process(lambda: inspect(self.root / "server", self.root / "out" / "adapter", self.flipped))
            if isinstance(found, list):
                self.problems, found = found, {}
        if self.problems:
            outcome, why = "failed", "; ".join(self.problems)
        else:
            outcome, why = judge(found, expected, DEVICES, ROUNDS)
            if vacuous := self._vacuous():
                outcome, why = "failed", vacuous
            elif trace := self._traceback():
                outcome, why = "failed", trace
        return Result(self.case.name, outcome, why, round(seconds, 1), self.happened(), self.restarts, found)

    def _traceback(self) -> str:
        """An unexpected error that a daemon has logged; a failing disk is none."""
        for name in ("server", *DEVICES):
            if (text := self.log(name)) and "Traceback" in text:
                return f"{name} has logged a traceback: {text[text.index('Traceback') :][:1200]}"
        return ""


class Hopeless(Exception):
    """A process ends by itself again and again."""


def play(ground: Ground, root: Path, case: Case, expected: dict[str, Any] | None) -> Result:
    """One case, from copy to verdict."""
    begin = time.monotonic()
    fleet = Fleet(ground, root, case)
    try:
        fleet.live()
        fleet.close()
        if not fleet.problems:
            fleet.export()
    except Hopeless:  # judged by its problems
        pass
    finally:
        fleet.close()
    return fleet.judged(expected, time.monotonic() - begin)
