"""Which parts of the model a device keeps, and the gaps between them. Torch-free.

Positions on the residual stream are counted in components: 2i is before layer i, 2i + 1 between its attention and its
feed-forward block, 2L after the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import ProtocolError
from common.types import Part, UnitId, unit_modules

_OFFSETS = {Part.LAYER: (0, 1), Part.ATTENTION: (0,), Part.FFN: (1,)}


@dataclass(frozen=True)
class Kept:
    """What is kept of one layer: its components, and the modules among the targets that are theirs, sorted."""

    parts: frozenset[Part]
    targets: tuple[str, ...]

    def has(self, module: str) -> bool:
        """Whether a module of the layer belongs to a kept component."""
        return any(unit_modules(UnitId(0, part), (module,)) for part in self.parts)


@dataclass(frozen=True, order=True)
class Gap:
    """Pruned components [start, stop): from one position on the residual stream to another."""

    start: int
    stop: int


def keep(units: Sequence[UnitId], layers: int, targets: tuple[str, ...]) -> dict[int, Kept]:
    """Layer index -> what is kept of it, in model order.

    Raises ProtocolError for no units, the same unit or component twice, and layers the model does not have.
    """
    parts: dict[int, list[Part]] = {}
    for unit in sorted(units):
        if not 0 <= unit.layer < layers:
            raise ProtocolError(f"unit {unit.label}: the model has {layers} layers")
        both = (Part.ATTENTION, Part.FFN)
        parts.setdefault(unit.layer, []).extend(both if unit.part is Part.LAYER else (unit.part,))
    if not parts or any(len(set(found)) != len(found) for found in parts.values()):
        raise ProtocolError("an assignment must list at least one unit, and each only once")
    out = {}
    for layer, found in sorted(parts.items()):
        chosen = tuple(name for name in sorted(targets) if any(unit_modules(UnitId(layer, part), (name,)) for part in found))
        # A module that is neither attention's nor the feed-forward's is the model's mistake to report, with whole layers.
        rest = tuple(name for name in sorted(targets) if not name.startswith(("self_attn.", "mlp.")))
        if not chosen and not rest:
            label = UnitId(layer, found[0] if len(found) == 1 else Part.LAYER).label
            raise ProtocolError(f"unit {label}: none of the run's targets is in it ({', '.join(sorted(targets))})")
        out[layer] = Kept(frozenset(found), tuple(sorted({*chosen, *(rest if len(found) == 2 else ())})))
    return out


def gaps(units: Sequence[UnitId], layers: int) -> tuple[Gap, ...]:
    """The maximal runs of pruned components, in model order: before the first kept unit, between two, after the last."""
    held = {2 * unit.layer + offset for unit in units for offset in _OFFSETS[unit.part]}
    out: list[Gap] = []
    start = 0
    for position in (*sorted(held), 2 * layers):
        if position > start:
            out.append(Gap(start, position))
        start = position + 1
    return tuple(out)
