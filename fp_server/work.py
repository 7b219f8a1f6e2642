"""The slow parts of a round, run in a thread: choosing units, and stacking updates into the ledger.

Both read a machine that does not change under them (a round waits for its own choice or commit) and give
back an event. The same state gives the same event, so a restart simply does them again.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.blocks import block_names, key
from common.config import check, parse
from common.errors import BudgetError, TooLate
from common.faults import fault
from common.tensorfile import TensorFile
from common.types import Gradient, ModelManifest, Part, Start, TaskKey, UnitId, unit_modules
from fp_server import events as e
from fp_server.capacity import byte_limit, refusal
from fp_server.config import RunConfig
from fp_server.damage import broadcast_path, check_updates, ledger_path
from fp_server.ledger import Contribution, aggregate_layer, broadcast_layer
from fp_server.methods import METHODS, PlanInputs
from fp_server.objects import ObjectStore, storage_error
from fp_server.rounds import RunMachine
from fp_server.roundstate import Round
from fp_server.seeding import rng_for


def parse_run(toml: str, source: str) -> RunConfig:
    """A run file's text. Raises ConfigError naming every wrong key."""
    return parse(toml, RunConfig, source)


def run_started(config: RunConfig, toml: str, manifest: ModelManifest) -> e.RunStarted:
    """The event that starts a run."""
    return e.RunStarted(config.run.name, toml, manifest, config.model_dump_json())


def started_config(event: e.RunStarted, source: str) -> RunConfig:
    """What a run was started with. Raises ConfigError when this version can't read it."""
    config = check(event.config, RunConfig, source) if event.config else parse_run(event.toml, source)
    # Before there were others, groups were of any size; before updates were compared, every valid one counted.
    config = _unless_said(_unless_said(config, "pruning", "group_sizes", "free"), "limits", "outliers", "off")
    config = _unless_said(config, "limits", "max_update_ratio", math.inf)  # before, modules were judged one by one
    # Version 0.1 wrote no resolved configuration and knew submodels only.
    return config if event.config else _unless_said(config, "train", "gradient", Gradient.SUBMODEL)


def _unless_said(config: RunConfig, section: str, key: str, value: str | float) -> RunConfig:
    """The configuration with `value` where its file or event had nothing for `section.key`."""
    there = getattr(config, section)
    if key in there.model_fields_set:
        return config
    return config.model_copy(update={section: there.model_copy(update={key: value})})


def current_round(machine: RunMachine, task: TaskKey) -> Round:
    """The round of `task`. Raises TooLate when the machine has moved on while this waited for its thread."""
    current = machine.current
    if current is None or current.opened.key != task:
        raise TooLate(f"round {task.round + 1} of {task.run!r} is over")
    return current


def choose_units(machine: RunMachine, task: TaskKey, device: str) -> e.Assigned:
    """The method's choice of units for one device (paper §3.1, §3.2). Raises BudgetError when nothing fits, TooLate."""
    fault("server.choose.before")
    current = current_round(machine, task)
    probe, report = current.members[device].probe, machine.plans[device].report
    capacity = machine.capacity(device)
    if probe is None or capacity is None:
        why = refusal(report, machine.config.train.gradient, machine.config.train.step_seconds)
        raise BudgetError(f"device {device!r} said meanwhile that it can't train in this run: {why}")
    units, config = machine.units, machine.config
    if (most := config.units_by_update(machine.manifest)) is not None:
        capacity = replace(capacity, units=min(capacity.units, most))
    inputs = PlanInputs(
        probe.similarity, probe.in_out, capacity.units, report.unit_bytes, byte_limit(report, capacity, units),
        config.pruning.eigenvectors, tuple(config.upload_bytes(unit, machine.manifest) for unit in units),
        config.limits.update_bytes or None, config.pruning.group_sizes,
    )  # fmt: skip
    rng = rng_for(config.run.seed, task.round, device, f"plan/{task.attempt}")
    draw = METHODS[config.run.method].plan(inputs, rng)
    fault("server.choose.after")
    return e.Assigned(
        machine.name,
        task,
        device,
        tuple(units[index] for index in draw.units),
        tuple(tuple(units[index] for index in group) for group in draw.groups),
        draw.probabilities,
        draw.redraws,
        draw.reductions,
        capacity.micro_batch,
        capacity.checkpointing,
        capacity.gradient,
    )


def aggregate_round(machine: RunMachine, store: ObjectStore, task: TaskKey, bytes_down: int) -> e.RoundCommitted:
    """Stack a closed round's accepted updates, layer by layer, one module at a time (Eq. 5).

    Holders, weights and `min_holders` are a unit's: in component mode a layer's attention modules may have other
    holders than its feed-forward modules. Raises StorageError (disk full), or DamagedError (a ledger object); then nothing
    has changed and it can be tried again. Raises LostUpdates for damaged updates, TooLate when the run was stopped.
    """
    fault("server.aggregate.before")
    current = current_round(machine, task)
    config, manifest = machine.config, machine.manifest
    accepted = {d: m.accepted for d, m in sorted(current.members.items()) if m.accepted is not None and m.counts}
    check_updates(store, accepted)
    commits: list[e.UnitCommit] = []
    held_back: list[UnitId] = []
    for layer, touched in _holders(current).items():
        used = tuple(h for h in touched if len(h.holders) >= config.limits.min_holders)
        held_back += [h.unit for h in touched if h not in used]
        if not used:
            continue
        contributions = _contributions(machine, current, store, used)
        previous = ledger_path(machine, store, layer) if layer in machine.ledger else None
        continued = config.lora.start is Start.GLOBAL and layer in machine.broadcast
        given = broadcast_path(machine, store, layer) if continued else None
        scratch = _Scratch(store)
        try:
            out = scratch.file()
            aggregate_layer(layer, manifest, contributions, previous, out, config.lora.start, given)
            fault("server.aggregate.ledger")
            new_ledger = store.adopt(out, kind="ledger")
            out = scratch.file()
            dropped = broadcast_layer(store.path(new_ledger.digest), layer, manifest, config.lora.broadcast_rank, out)
            energy = _dropped_energy(out, dropped)
            fault("server.aggregate.broadcast")
            new_broadcast = store.adopt(out, kind="broadcast")
        except OSError as error:
            raise storage_error(store.scratch, error) from None
        finally:
            scratch.clear()
        holders = tuple(sorted({device for h in used for device in h.holders}))
        parts = () if used[0].unit.part is Part.LAYER else used
        commits.append(e.UnitCommit(layer, new_ledger, new_broadcast, holders, energy, parts))
    committed = {commit.layer for commit in commits}
    fault("server.aggregate.after")
    return e.RoundCommitted(
        machine.name,
        task,
        tuple(commits),
        tuple(sorted({unit.layer for unit in held_back} - committed)),
        {device: machine.plans[device].samples for device in accepted},
        sum(update.ref.size for update in accepted.values()),
        bytes_down,
        tuple(unit for unit in held_back if unit.part is not Part.LAYER),
    )


def _holders(current: Round) -> dict[int, list[e.UnitHolders]]:
    """S_l of Eq. 5 by layer: for each unit in an accepted update, in model order, its devices in id order."""
    holders: dict[UnitId, list[str]] = {}
    for device, member in sorted(current.members.items()):
        if member.counts and member.assigned is not None:
            for unit in member.assigned.units:
                holders.setdefault(unit, []).append(device)
    layers: dict[int, list[e.UnitHolders]] = {}
    for unit, devices in sorted(holders.items()):
        layers.setdefault(unit.layer, []).append(e.UnitHolders(unit, tuple(devices)))
    return layers


def _contributions(
    machine: RunMachine, current: Round, store: ObjectStore, units: Sequence[e.UnitHolders]
) -> dict[str, list[Contribution]]:
    """Module -> what its unit's holders add to it, weighted among themselves."""
    config = machine.config
    targets, scale = config.targets(machine.manifest), config.lora.alpha / config.lora.rank
    out: dict[str, list[Contribution]] = {}
    for unit in units:
        weights = METHODS[config.run.method].weights({device: machine.plans[device].samples for device in unit.holders})
        parts: list[Contribution] = []
        for device in unit.holders:
            update = current.members[device].accepted
            assert update is not None
            parts.append(Contribution(device, weights[device], scale, config.lora.rank, store.path(update.ref.digest)))
        out.update(dict.fromkeys(unit_modules(unit.unit, targets), parts))
    return out


def _dropped_energy(broadcast: Path, dropped: dict[str, float]) -> float:
    """The part of a whole layer's energy the broadcast leaves out, from its modules' parts.

    The broadcast's A has orthonormal rows, so ‖B‖² is the energy kept of a module.
    """
    lost = total = 0.0
    with TensorFile(broadcast) as file:
        for layer, module in block_names(file):
            kept = float(np.square(file.float32(key(layer, module, "B")), dtype=np.float64).sum())
            whole = kept / (1.0 - dropped[module]) if dropped[module] < 1.0 else kept
            lost, total = lost + whole - kept, total + whole
    return lost / total if total else 0.0


class _Scratch:
    """Temporary files of one layer, removed whatever happens."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._files = store, list[Path]()

    def file(self) -> Path:
        path = self._store.scratch / uuid.uuid4().hex
        self._files.append(path)
        return path

    def clear(self) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)
