"""A whole data directory checked, without changing anything in it; its server may run meanwhile.

The log's chain is checked and folded, the audit trail's chain too, and every object that the folded state needs is read. What
nothing needs is told, too: orphans, leftovers, quarantine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509

from common import config as configuration
from common.errors import ConfigError, DamagedError, FedPrunerError, IdentityError, StorageError
from common.transport.tls import exposed, load_key
from fp_server import audit
from fp_server.config import ServerConfig
from fp_server.folding import fold
from fp_server.log import Database, EventLog
from fp_server.objects import ObjectStore

LOOKS = 8
"""How often the log is folded again when a running server moved on while its objects were read."""

OnObject = Callable[[int, int], None]
"""(objects read, objects needed)."""


@dataclass(frozen=True)
class BadObject:
    """An object the folded state needs, and what is wrong with it."""

    digest: str
    uses: tuple[str, ...]
    problem: str
    advice: str


@dataclass
class Verdict:
    """What was found. `problems`: what makes the directory a damaged one; `notes`: what an owner may want to know."""

    directory: Path
    log_sound: bool | None = None
    """None: it could not be looked at; so for the others."""
    events: int = 0
    head: str = ""
    """Of the event log's chain."""
    audit_sound: bool | None = None
    audited: int = 0
    audit_head: str = ""
    """Of the audit trail's chain, which is another: the one that `fp-server audit --verify` knows."""
    runs: dict[str, str] = field(default_factory=dict)
    """Run -> where it stands."""
    looked: bool = False
    """Whether it is known what objects are needed: not when the log can't be folded."""
    needed: int = 0
    needed_bytes: int = 0
    bad: list[BadObject] = field(default_factory=list)
    orphans: dict[str, int] = field(default_factory=dict)
    """Objects nothing refers to -> bytes."""
    leftovers: dict[str, int] = field(default_factory=dict)
    """Files of pushes and of work under way, or of an interrupted one -> bytes."""
    quarantine: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether something must be done."""
        return bool(self.problems or self.bad)

    def json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "dir": str(self.directory), "damaged": self.damaged, "problems": self.problems, "notes": self.notes,
            "log_sound": self.log_sound, "events": self.events, "head": self.head, "audit_sound": self.audit_sound,
            "audit_entries": self.audited, "audit_head": self.audit_head, "runs": self.runs,
            "objects_looked_at": self.looked, "objects": self.needed, "object_bytes": self.needed_bytes,
            "orphans": self.orphans, "leftovers": self.leftovers, "quarantine": self.quarantine,
            "bad_objects": [
                {"digest": bad.digest, "uses": list(bad.uses), "problem": bad.problem, "advice": bad.advice} for bad in self.bad
            ],
        }  # fmt: skip


def verify(directory: Path, seen: OnObject = lambda done, total: None) -> Verdict:
    """Check a data directory. Raises ConfigError when it is none."""
    if directory.is_file():
        raise ConfigError(
            f"{directory}: a file; of a backup's archive unpack it first (`mkdir -m 700 DIR && tar -xf {directory} -C DIR`), "
            "then `fp-server verify DIR`"
        )
    if not (directory / "log.sqlite").exists() and not (directory / "server.toml").exists():
        raise ConfigError(f"{directory}: not a server directory (it has no server.toml and no log.sqlite)")
    verdict = Verdict(directory)
    store = ObjectStore(directory, reading=True)
    _files(directory, verdict)
    needed = _look(directory, store, verdict, seen)
    verdict.looked = needed is not None
    if needed is not None:
        verdict.orphans = {digest: size for digest, size in sorted(store.stored().items()) if digest not in needed}
    verdict.leftovers = _sizes(directory, "partial/*/*", "scratch/*", "*.tmp")
    verdict.quarantine = _sizes(directory, "quarantine/*")
    return verdict


def _files(directory: Path, verdict: Verdict) -> None:
    """Configuration, certificates, keys."""
    try:
        configuration.load(directory / "server.toml", ServerConfig)
    except ConfigError as error:
        verdict.problems.append(str(error))
    for name in ("ca", "server", "operator"):
        problems = verdict.notes if name == "operator" else verdict.problems  # the server does without an operator of its own
        if lost := lacking(directory, name):
            problems += lost
            continue
        try:
            certificate = x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes())
            if certificate.public_key() != load_key(directory / f"{name}.key").public_key():
                problems.append(f"{directory / name}.key: not the key of {name}.pem")
        except (OSError, ValueError, IdentityError) as error:
            problems.append(str(error) if isinstance(error, IdentityError) else f"{directory / name}.pem: {error}")
        if (directory / f"{name}.key").exists() and (said := exposed(directory / f"{name}.key")):
            verdict.notes.append(said)


def lacking(directory: Path, name: str) -> list[str]:
    """What to do about those files of `name` (ca, server, operator) that a server's directory has no more."""
    copy = "copy it from an older backup"
    without = "without it make a new directory (`fp-server init`), and every device must join again"
    remedies = {
        "ca.pem": copy,
        "ca.key": f"{copy}; {without}",
        "server.pem": f"`fp-server certificate --dir {directory}` makes it anew",
        "server.key": f"{copy}, and server.pem with it; {without}",
    }
    anew = f"`fp-server operator --dir {directory}` makes it anew"
    return [
        f"{directory / file} is missing: {remedies.get(file, anew)}"
        for file in (f"{name}.pem", f"{name}.key")
        if not (directory / file).exists()
    ]


def _look(directory: Path, store: ObjectStore, verdict: Verdict, seen: OnObject) -> dict[str, list[str]] | None:
    """Log, audit trail and objects; what the folded state needs, None when it can't be folded."""
    try:
        database = Database(directory / "log.sqlite", reading=True)
    except StorageError as error:
        verdict.problems.append(str(error))
        return None
    try:
        log = EventLog(database)
        try:
            head = log.check()
        except DamagedError as error:
            verdict.problems.append(str(error))
            verdict.log_sound = False
            return None
        finally:
            _check_audit(database, verdict)
        verdict.log_sound, verdict.events, verdict.head = True, head.seq, head.hash
        if not database.chained:
            verdict.notes.append(
                "the log is of an older version and has no chain of hashes yet; its server adds it at the next start"
            )
        return _check_objects(log, store, verdict, seen)
    finally:
        database.close()


def _check_audit(database: Database, verdict: Verdict) -> None:
    try:
        if not database.run(lambda c: c.execute("SELECT 1 FROM sqlite_schema WHERE name = 'audit'").fetchone()):
            return  # an older version's
        last = audit.verify(audit.read(database))
    except StorageError as error:
        verdict.problems.append(str(error))
        verdict.audit_sound = False
    else:
        verdict.audit_sound = True
        verdict.audited, verdict.audit_head = (last.seq, last.hash) if last is not None else (0, "")


def _check_objects(log: EventLog, store: ObjectStore, verdict: Verdict, seen: OnObject) -> dict[str, list[str]] | None:
    """Read what is needed. A running server removes what it needs no more, so what is bad is looked up again."""
    sound: dict[str, int] = {}
    bad: dict[str, str] = {}
    needed: dict[str, list[str]] = {}
    for look in range(LOOKS):
        try:
            needed = _needed(log, verdict)
        except FedPrunerError as error:
            verdict.problems.append(str(error))
            return None
        fresh = [digest for digest in needed if digest not in sound and (digest not in bad or look == 1)]
        bad = {digest: why for digest, why in bad.items() if digest in needed and digest not in fresh}
        for digest in fresh:
            seen(len(sound), len(needed))
            try:
                sound[digest] = store.sound(digest).stat().st_size
            except (StorageError, OSError) as error:
                bad[digest] = str(error)
        if not bad or not fresh:
            break
        time.sleep(0.2)  # what a running server is replacing just now is replaced by then
    verdict.needed = len(needed)
    verdict.needed_bytes = sum(size for digest, size in sound.items() if digest in needed)
    verdict.bad = [BadObject(d, tuple(needed[d]), bad[d], _advice(d, needed[d])) for d in sorted(bad) if d in needed]
    return needed


def _needed(log: EventLog, verdict: Verdict) -> dict[str, list[str]]:
    """Fold every run. Raises what `fold` does."""
    needed: dict[str, list[str]] = {}
    for run in log.runs():
        try:
            machine = fold(log, run)
        except FedPrunerError:
            raise
        except Exception as error:
            raise DamagedError(f"run {run!r} can't be folded: {type(error).__name__}: {error}") from error
        verdict.runs[run] = f"{machine.phase.value}, {machine.history.committed} of {machine.config.run.rounds} rounds"
        for digest, what in machine.uses().items():
            needed.setdefault(digest, []).extend(what)
    return needed


def _advice(digest: str, what: list[str]) -> str:
    place = f"objects/{digest[:2]}/{digest}"
    if all(use.startswith("update of") for use in what):
        return "the running server asks the device to push it again"
    if all(use.startswith("adapter object of") for use in what):
        return f"the running server makes it again from the ledger for who asks; or copy {place} of a backup to its place"
    return f"copy {place} of a backup to its place"


def _sizes(directory: Path, *patterns: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for pattern in patterns:
        for path in sorted(directory.glob(pattern)):
            try:
                found[str(path.relative_to(directory))] = path.stat().st_size
            except FileNotFoundError:  # a running server's
                continue
    return found
