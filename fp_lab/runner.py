"""Job after job of an experiment, in one process; what is done and under way is read from the directory."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from common.errors import ConfigError, FedPrunerError, InUseError
from fp_client.messages import OnProgress
from fp_lab.experiment import Experiment, Row, load_experiment
from fp_lab.results import Line, read

FILE = "experiment.toml"
"""A copy of the experiment file, for `status` and `report`."""


@dataclass(frozen=True)
class JobPlace:
    """A row with a seed, and where its results are."""

    row: Row
    seed: int
    directory: Path
    rounds: int

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.row.name} seed {self.seed}"

    def lines(self) -> list[Line]:
        """Its results so far."""
        return read(self.directory / "results.jsonl")

    def busy(self) -> bool:
        """Whether a process is working on it now."""
        try:
            fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


def places(experiment: Experiment, directory: Path) -> list[JobPlace]:
    """All jobs: every row with its first seed, then with its second one, so that rows can be compared early."""
    found: list[JobPlace] = []
    most = max(len(experiment.seeds_of(row)) for row in experiment.row)
    for turn in range(most):
        for row in experiment.row:
            if turn < len(seeds := experiment.seeds_of(row)):
                place = directory / "jobs" / row.name / f"seed-{seeds[turn]}"
                found.append(JobPlace(row, seeds[turn], place, row.rounds or experiment.rounds))
    return found


def chosen(experiment: Experiment, directory: Path, rows: list[str], seeds: list[int]) -> list[JobPlace]:
    """The jobs of these rows and seeds; all for empty lists. Raises ConfigError when there is none."""
    for name in rows:
        experiment.find(name)
    found = [p for p in places(experiment, directory) if (not rows or p.row.name in rows) and (not seeds or p.seed in seeds)]
    if not found:
        raise ConfigError(f"experiment {experiment.name!r} has no job with seed {', '.join(map(str, seeds))} in the chosen rows")
    return found


def kept_experiment(directory: Path) -> Experiment:
    """The experiment a results directory is of. Raises ConfigError."""
    if not (directory / FILE).exists():
        raise ConfigError(f"{directory}: holds no experiment; `fp-lab run FILE --out {directory}` makes one")
    return load_experiment(directory / FILE)


class Signals:
    """Ctrl-C and SIGTERM: the first asks to stop after the step under way, the second has its usual effect."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def check(self) -> None:
        """Raises Stopped when it was asked for."""
        from fp_lab.job import Stopped

        if self.asked.is_set():
            raise Stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked.set()
        signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Listen within the block."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Watch:
    """How a person follows: `say` a line, `progress` (phase, done, total) within a task, `line` after a round."""

    say: Callable[[str], None] = lambda _: None
    progress: OnProgress = lambda *_: None
    line: Callable[[JobPlace, Line, Line], None] = lambda *_: None
    """Job, the line of its first state, and the new line."""


def run_jobs(
    experiment: Experiment,
    text: str,
    directory: Path,
    jobs: list[JobPlace],
    rounds: int | None,
    signals: Signals,
    watch: Watch,
    fast: bool = False,
) -> int:
    """Work on the jobs that aren't finished or busy; returns how many were left out as busy. Raises Stopped.

    A job that can't go on is told of, and the others are done before its error is raised.
    """
    from fp_lab.devices import Fleet
    from fp_lab.job import Job, check_ended, locked
    from fp_lab.partition import check_partition, prepare

    directory.mkdir(parents=True, exist_ok=True)
    check_partition(directory, experiment.data, experiment.window)
    for job in jobs:
        if len(job.lines()) > job.rounds:
            check_ended(experiment, job.row, job.seed, job.directory)
    open_jobs = [job for job in jobs if len(job.lines()) <= min(job.rounds, job.rounds if rounds is None else rounds)]
    if not open_jobs:
        watch.say("every job is done")
        return 0
    watch.say("loading …")
    fleet = Fleet(experiment, directory)
    fleet.use(prepare(directory, experiment.data, experiment.window, fleet.tokenizer))
    fresh = directory / f"{FILE}.{os.getpid()}"
    fresh.write_text(text)  # not before its data is known to fit the directory
    fresh.replace(directory / FILE)

    def progress(phase: str, done: int, total: int) -> None:
        signals.check()
        watch.progress(phase, done, total)

    busy, failed = 0, list[FedPrunerError]()
    for place in open_jobs:
        signals.check()
        try:
            with (
                locked(place.directory),
                closing(Job(experiment, place.row, place.seed, place.directory, fleet, progress, fast)) as job,
            ):
                watch.say(
                    f"{place.label}: {len(job.results.lines) - 1} of {place.rounds} rounds done"
                    if job.results.lines
                    else f"{place.label}: begins"
                )
                lines = job.results.lines
                job.run(rounds, signals.check, lambda line, place=place, lines=lines: watch.line(place, lines[0], line))  # type: ignore[misc]
        except InUseError:
            busy += 1
            watch.say(f"{place.label}: another process is working on it; left out")
        except FedPrunerError as error:
            failed.append(error)
            watch.say(f"{place.label}: {error}")
    if failed:
        raise failed[0]
    return busy
