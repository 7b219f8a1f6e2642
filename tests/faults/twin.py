"""The obvious slow twin of the server's stacking: the ledger as a sum of dense products, from the log and the updates alone.

Nothing of the product's arithmetic is used, only its log. ΔW of a module is a float64 matrix; a round adds what each device's
B·A is more than what it started with, weighted by its examples (Eq. 5 with `start = "global"`):

    ΔW ← ΔW + Σ_n w_n ((α/r) B_n A_n − top_r(ΔW)),   w_n = |D_n| / Σ |D|

The updates are those that `disturb` has copied when they came into the store: what was stacked is deleted there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

NEAR = 1e-6
"""How far apart the norms may be, as a part of the whole: the server keeps float32, and drops what is 1e-7 of the largest."""

Matrix = npt.NDArray[np.float64]
Place = tuple[int, str]
"""(layer, module)."""


def top(delta: Matrix, rank: int) -> Matrix:
    """The best approximation of a rank."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank], dtype=np.float64)


def products(path: Path) -> dict[Place, Matrix]:
    """Every module of a file of factors or dense matrices, multiplied out."""
    parts: dict[Place, dict[str, Matrix]] = {}
    for name, value in load_file(path).items():
        head, _, factor = name.removeprefix("base_model.model.model.").removesuffix(".weight").rpartition(".")
        layer, _, module = head.removeprefix("layers.").partition(".")
        parts.setdefault((int(layer), module), {})[factor] = value.astype(np.float64)
    return {at: one["delta"] if "delta" in one else one["lora_B"] @ one["lora_A"] for at, one in parts.items()}


def differ(what: str, found: dict[Place, Matrix], wanted: dict[Place, Matrix]) -> list[str]:
    """Where they do: a module that is not in a file is 0."""
    out = []
    for at in sorted(found.keys() | wanted.keys()):
        one, other = found.get(at), wanted.get(at)
        whole = float(np.linalg.norm(other if other is not None else one))  # type: ignore[arg-type]
        apart = whole if one is None or other is None else float(np.linalg.norm(one - other))
        if not apart <= NEAR * max(whole, 1e-12):  # nor NaN
            out.append(f"{what}: layer {at[0] + 1} {at[1]} is {apart / max(whole, 1e-12):.1e} away from the sum of the updates")
    return out


def recompute(events: list[Any], kept: Path, adapter: Path | None) -> list[str]:
    """Where the ledger and the broadcast of each round, or the exported adapter, are not what the accepted updates add up to."""
    from fp_server import events as e

    started = next(x for x in events if isinstance(x, e.RunStarted))
    from fp_server.work import started_config

    lora = started_config(started, "the log").lora
    scale, delta, problems = lora.alpha / lora.rank, dict[Place, Matrix](), list[str]()
    samples: dict[str, int] = {}
    units: dict[Any, dict[str, set[int]]] = {}
    accepted: dict[Any, dict[str, str]] = {}
    rejected: dict[Any, set[str]] = {}
    for x in events:
        if isinstance(x, e.PlanReceived):
            samples[x.device] = x.samples
        elif isinstance(x, e.Assigned):
            units.setdefault(x.key, {})[x.device] = {unit.layer for unit in x.units}
        elif isinstance(x, e.UpdateAccepted):
            accepted.setdefault(x.key, {})[x.device] = x.ref.digest
        elif isinstance(x, e.UpdatesLost):
            for device in x.lost:
                accepted[x.key].pop(device, None)
        elif isinstance(x, e.UpdatesReviewed):
            rejected[x.key] = set(x.outliers) if x.reject else set()
        elif isinstance(x, e.RoundCommitted):
            counting = {d: digest for d, digest in accepted.get(x.key, {}).items() if d not in rejected.get(x.key, set())}
            if absent := [device for device, digest in counting.items() if not (kept / digest).exists()]:
                return [f"round {x.key.round + 1}: the updates of {absent} never came into the store"]
            updates = {device: products(kept / digest) for device, digest in counting.items()}
            if strange := [d for d, update in updates.items() if {layer for layer, _ in update} != units[x.key][d]]:
                return [f"round {x.key.round + 1}: the updates of {strange} are of other layers than assigned"]
            delta = stack(delta, updates, samples, scale, lora.rank)
            refs = {commit.layer: commit for commit in x.units}
            touched = {layer for layer, _ in delta if any(layer in units[x.key][device] for device in counting)}
            if touched != set(refs):
                problems.append(f"round {x.key.round + 1}: layers {sorted(touched)} were trained, {sorted(refs)} committed")
            for layer, commit in refs.items():
                wanted = {at: value for at, value in delta.items() if at[0] == layer}
                given = {at: top(value, lora.broadcast_rank) for at, value in wanted.items()}
                where = f"round {x.key.round + 1}"
                problems += differ(f"{where}, ledger", products(kept / commit.ledger.digest), wanted)
                problems += differ(f"{where}, broadcast", products(kept / commit.broadcast.digest), given)
    if adapter is not None:
        problems += differ("the exported adapter", products(adapter / "adapter_model.safetensors"), delta)
    return problems


def stack(
    delta: dict[Place, Matrix], updates: dict[str, dict[Place, Matrix]], samples: dict[str, int], scale: float, rank: int
) -> dict[Place, Matrix]:
    """One round. A module nobody trained stays what it was."""
    out = dict(delta)
    for at in {at for update in updates.values() for at in update}:
        holders = [device for device, update in updates.items() if at in update]
        whole = sum(samples[device] for device in holders)
        before = delta.get(at)
        total = before if before is not None else np.zeros_like(updates[holders[0]][at])
        start = top(before, rank) if before is not None else np.zeros_like(total)
        for device in holders:
            total = total + samples[device] / whole * (scale * updates[device][at] - start)
        out[at] = total
    return out
