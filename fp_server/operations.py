"""What operators do with runs and devices."""

from __future__ import annotations

from common.errors import ConfigError
from common.types import ModelManifest
from fp_server import audit
from fp_server import events as e
from fp_server.audit import SERVER, Actor, Entry
from fp_server.commands import Connected, Revoked
from fp_server.config import RunConfig
from fp_server.coordinator import Coordinator
from fp_server.identity import revoked_error
from fp_server.limits import RUN_FILE
from fp_server.log import Also
from fp_server.narrate import tell
from fp_server.rounds import RunMachine
from fp_server.sessions import Session
from fp_server.work import parse_run, run_started


async def start_run(coordinator: Coordinator, toml: str, manifest: ModelManifest, actor: Actor = SERVER) -> str:
    """Start a run. Raises ConfigError (bad file, name taken, another run active)."""
    if len(toml.encode()) > RUN_FILE:
        raise ConfigError(f"run file: has {len(toml.encode())} bytes, at most {RUN_FILE} are read")
    config: RunConfig = parse_run(toml, "run file")
    config.check(manifest)
    return await coordinator.background.whole(_start_run(coordinator, config, toml, manifest, actor))


async def _start_run(coordinator: Coordinator, config: RunConfig, toml: str, manifest: ModelManifest, actor: Actor) -> str:
    async with coordinator.lock:
        if config.run.name in coordinator.names:
            raise ConfigError(f"run.name: there is already a run {config.run.name!r}; choose another name")
        if coordinator.active is not None:
            raise ConfigError(
                f"run {coordinator.active.name!r} is active; stop it first (`fp-server stop {coordinator.active.name}`)"
            )
        event = run_started(config, toml, manifest)
        await coordinator.log.append(event, coordinator.clock(), _audited(actor, "start", config.run.name))
        tell(event)
        coordinator.names.append(config.run.name)
        coordinator.active = RunMachine(config, manifest)
        for device in sorted(coordinator.sessions):
            await coordinator.post_locked(Connected(device))
    await coordinator.announce()
    return config.run.name


def _audited(actor: Actor, action: str, run: str) -> Also:
    return lambda c: audit.append(c, Entry(actor, action, f"run {run}"))


async def control(coordinator: Coordinator, run: str, action: str, actor: Actor = SERVER) -> str:
    """``pause``, ``resume`` or ``stop`` a run; returns its phase. Raises NotFound or ConfigError."""
    machine = await coordinator.look_up(run)
    if machine.ended is not None:
        raise ConfigError(f"run {machine.name!r} has {machine.ended.outcome}; nothing to {action}")
    audited = _audited(actor, action, machine.name)
    if action == "pause":
        if machine.paused is None:
            await coordinator.post(e.RunPaused(machine.name, "paused by the operator"), audited)
    elif action == "resume":
        if machine.paused is not None:
            await coordinator.post(e.RunResumed(machine.name), audited)
    elif action == "stop":
        await coordinator.post(e.RunEnded(machine.name, "stopped", "stopped by the operator"), audited)
    else:
        raise ConfigError(f"{action!r}: not an action (pause, resume or stop)")
    return machine.phase


async def kick(coordinator: Coordinator, name: str) -> None:
    """Hang up a device's session (its certificate was revoked); the round goes on without it, and without its update."""
    if (session := coordinator.sessions.get(name)) is not None:
        session.close(revoked_error(name))
    await coordinator.until_stored(lambda: coordinator.background.whole(_leave_round(coordinator, name, session)))


async def _leave_round(coordinator: Coordinator, name: str, session: Session | None) -> None:
    """Take a revoked device out of the round, unless it is closed: decided under the lock, so that the log never says so of an
    update that counts. What the machine decides by itself may meet a full disk in silence; what is asked for here does not."""
    async with coordinator.lock:
        if coordinator.sessions.get(name) in (None, session):  # no round must draw it, nor wait for it
            await coordinator.post_locked(Revoked(name))
        machine = coordinator.active
        if machine is not None and (leaving := machine.leaving(name)) is not None:
            await coordinator.post_locked(leaving)
