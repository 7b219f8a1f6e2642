"""What is done about an object that is not what was written: every object is checked when it is read, and a damaged one
is in quarantine by then.

An update of the round under way is asked for again where the device still has it. A broadcast object is made again from the
ledger. A ledger object can only come from a backup: any file with its digest is the right one.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from common.errors import DamagedError, NotFound
from common.files import digest_file
from fp_server.events import UpdateAccepted
from fp_server.ledger import LostUpdates, broadcast_layer
from fp_server.objects import ObjectStore, storage_error
from fp_server.rounds import RunMachine

logger = logging.getLogger("fp_server")


def check_updates(store: ObjectStore, accepted: dict[str, UpdateAccepted]) -> None:
    """Read every accepted update. Raises LostUpdates; those are in quarantine then."""
    lost: dict[str, str] = {}
    for device, update in accepted.items():
        try:
            store.checked(update.ref.digest)
        except DamagedError as error:
            lost[device] = str(error)
    if lost:
        raise LostUpdates(lost)


def ledger_path(machine: RunMachine, store: ObjectStore, layer: int, reading: bool = False) -> Path:
    """A layer's ledger, checked. `reading`: without touching the directory. Raises DamagedError that says what to do."""
    digest = machine.ledger[layer].digest
    try:
        return store.sound(digest) if reading else store.checked(digest)
    except DamagedError as error:
        raise DamagedError(f"the ledger of layer {layer + 1} of run {machine.name!r}: {error}; {_restore(digest)}") from None


def broadcast_path(machine: RunMachine, store: ObjectStore, layer: int) -> Path:
    """What devices get of a layer, checked; made again from the ledger when it is damaged.

    Raises DamagedError that says what to do when it can't be. For the thread that aggregates.
    """
    digest = machine.broadcast[layer].digest
    try:
        return store.checked(digest)
    except DamagedError as error:
        why = str(error)
    out = store.scratch / uuid.uuid4().hex
    try:
        broadcast_layer(ledger_path(machine, store, layer), layer, machine.manifest, machine.config.lora.broadcast_rank, out)
        if digest_file(out) != digest:
            raise DamagedError(
                f"the adapter object of layer {layer + 1} of run {machine.name!r}: {why}; made again from the ledger it has "
                f"other bytes; {_restore(digest)}"
            )
        store.adopt(out, digest, "broadcast")
    except OSError as error:
        raise storage_error(out, error) from None
    finally:
        out.unlink(missing_ok=True)
    logger.warning("the adapter object of layer %d was damaged; it has been made again from the ledger", layer + 1)
    return store.path(digest)


def for_devices(machine: RunMachine, store: ObjectStore, digest: str) -> Path:
    """`broadcast_path` by digest. Raises NotFound when the round has moved on meanwhile."""
    for layer, ref in machine.broadcast.items():
        if ref.digest == digest:
            return broadcast_path(machine, store, layer)
    raise NotFound(f"object {digest[:16]}… is not part of the run's adapter any more")


def _restore(digest: str) -> str:
    return f"copy objects/{digest[:2]}/{digest} of a backup to its place, and it goes on by itself"
