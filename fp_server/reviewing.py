"""A closed round's updates are compared with each other before they are stacked. Slow; runs in a thread, gives back an event."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from common.blocks import read_block
from common.faults import fault
from common.tensorfile import TensorFile
from common.types import TaskKey, UnitId, unit_modules
from fp_server import events as e
from fp_server.damage import check_updates, for_devices
from fp_server.objects import ObjectStore
from fp_server.outliers import Score, Shared, judge
from fp_server.products import Product, Reduced, inner_products, moved
from fp_server.rounds import RunMachine
from fp_server.seeding import rng_for
from fp_server.validation import Starts, starting_points
from fp_server.work import current_round

PANEL = 64
"""Updates compared with each other; of more devices, each panel is compared by itself: time and memory grow with their number."""


def review_round(machine: RunMachine, store: ObjectStore, key: TaskKey) -> e.UpdatesReviewed:
    """What the accepted updates of a closed round say of each other.

    Raises LostUpdates for damaged ones, DamagedError when what they started with is lost, TooLate when the run was stopped.
    """
    fault("server.review.before")
    current, config = current_round(machine, key), machine.config
    updates = {d: m.accepted for d, m in sorted(current.members.items()) if m.accepted is not None}
    check_updates(store, updates)
    accepted = {device: update.ref.digest for device, update in updates.items()}
    order = list(accepted)
    rng_for(config.run.seed, key.round, "", f"review/{key.attempt}").shuffle(order)  # nobody chooses whom he is compared with
    panels = -(-len(order) // PANEL)
    scores: dict[str, Score] = {}
    outliers: dict[str, str] = {}
    for index in range(panels):
        panel = {device: store.path(accepted[device]) for device in sorted(order[index::panels])}
        found = judge(_shared(machine, store, key, panel), config.limits.max_norm_ratio, config.limits.max_update_ratio)
        scores, outliers = scores | found[0], outliers | found[1]
    fault("server.review.after")
    return e.UpdatesReviewed(
        machine.name, key, dict(sorted(scores.items())), dict(sorted(outliers.items())), config.limits.outliers == "reject"
    )


def _shared(machine: RunMachine, store: ObjectStore, key: TaskKey, panel: dict[str, Path]) -> list[Shared]:
    """What the panel's devices did to each module, layer by layer; a module's factors are read, compared and let go."""
    current, config, manifest = current_round(machine, key), machine.config, machine.manifest
    targets, scale = config.targets(manifest), config.lora.alpha / config.lora.rank
    holders: dict[UnitId, list[str]] = {}
    for device in panel:
        chosen = current.members[device].assigned
        assert chosen is not None, "its update was accepted"
        for unit in chosen.units:
            holders.setdefault(unit, []).append(device)
    found: list[Shared] = []
    whole = partial(for_devices, machine, store)
    with ExitStack() as stack:
        files = {device: stack.enter_context(TensorFile(path)) for device, path in panel.items()}
        starts = Starts(config.lora.rank, manifest, starting_points(config.lora.start, machine.objects(), whole))
        stack.callback(starts.close)
        for unit, devices in sorted(holders.items()):
            for module in unit_modules(unit, targets):
                read = partial(_moved, [files[d] for d in devices], unit.layer, module, scale, starts.of(unit.layer, module))
                found.append(Shared(module, tuple(devices), inner_products(len(devices), read)))
    return found


def _moved(files: Sequence[TensorFile], layer: int, module: str, scale: float, start: Product, index: int) -> Reduced:
    block = read_block(files[index], layer, module)
    return moved(scale, Product(block.a, block.b), start)
