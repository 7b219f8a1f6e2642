"""The ledger on disk: one safetensors file a layer, read and written one module at a time.

A module is ``layers.<n>.<module>.lora_A`` (R, d_in) with ``….lora_B`` (d_out, R), or ``….delta``
(d_out, d_in) once dense; what was never trained is absent. ΔW = B @ A, scales folded in. Files are
immutable: each round writes a new one, and a layer nobody trained keeps its file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from common.blocks import key, read_block, write_blocks
from common.errors import DamagedError, ModelError, StorageError
from common.tensorfile import TensorFile, TensorWriter
from common.types import LoraBlock, ModelManifest, ModuleShape, Start
from fp_server.aggregation import Holder, next_rank, too_large, update_fresh, update_global
from fp_server.lowrank import Delta, Dense, Factored, empty, recompress

OPEN_FILES = 32
"""Updates held open at once, however many devices there are."""


class LostUpdates(DamagedError):
    """Accepted updates that can't be aggregated. `lost`: device -> what is wrong with its update."""

    def __init__(self, lost: dict[str, str]) -> None:
        super().__init__("; ".join(f"the update of {device!r}: {why}" for device, why in sorted(lost.items())))
        self.lost = lost


@dataclass(frozen=True)
class Contribution:
    """One accepted update that holds a module. Weight, scale and rank are the roster's and the assignment's."""

    device: str
    weight: float
    """w_n of Eq. 5, normalised over the module's holders."""
    scale: float
    """α_n / r_n."""
    rank: int
    path: Path
    """The update object: canonical keys (`common.blocks`), checked against the assignment."""


def delta_key(layer: int, module: str) -> str:
    """The key of a dense module."""
    return f"layers.{layer}.{module}.delta"


def read_delta(file: TensorFile | None, layer: int, module: ModuleShape) -> Delta:
    """One module's ΔW, read alone; rank 0 when it is absent or there is no file. Raises StorageError when it is damaged."""
    rank = ledger_rank(file, layer, module)
    if file is None or rank == 0:
        return empty(module.d_out, module.d_in)
    try:
        if rank is None:
            return Dense(file.float32(delta_key(layer, module.name)))
        block = read_block(file, layer, module.name)
    except ModelError as error:
        raise StorageError(f"damaged ledger: {error}") from None
    return Factored(block.a, block.b)


def ledger_rank(file: TensorFile | None, layer: int, module: ModuleShape) -> int | None:
    """The rank of a module's factors: 0 when absent, None when dense. Reads the header alone."""
    if file is None:
        return 0
    names = {factor: key(layer, module.name, factor) for factor in ("A", "B")}
    shapes = {factor: file.tensors[name].shape for factor, name in names.items() if name in file.tensors}
    dense = file.tensors.get(delta_key(layer, module.name))
    if dense is not None and not shapes:
        if dense.shape == (module.d_out, module.d_in):
            return None
    elif not shapes:
        return 0
    elif dense is None and len(shapes) == 2 and shapes["A"][1:] == (module.d_in,):
        rank = shapes["A"][0]
        if shapes["B"] == (module.d_out, rank):
            return rank
    raise StorageError(f"{file.path}: damaged ledger: layer {layer + 1} {module.name} does not fit the model's shapes")


def open_ledger(path: Path) -> TensorFile:
    """Raises StorageError when the file is missing or damaged."""
    try:
        return TensorFile(path)
    except ModelError as error:
        raise StorageError(f"damaged ledger: {error}") from None


def aggregate_layer(
    layer: int,
    manifest: ModelManifest,
    contributions: Mapping[str, Sequence[Contribution]],
    previous: Path | None,
    out: Path,
    start: Start = Start.FRESH,
    given: Path | None = None,
) -> bool:
    """Write the layer's next ledger to `out` (synced; the caller renames it). Holds one module and one device's block.

    `contributions`: module -> the updates that trained it (a layer's components may have different holders); the
    ledger's other modules are copied to the bit. `given`: for `Start.GLOBAL`, the broadcast file the devices started
    from (`broadcast_layer`), None when there was none yet. Returns False, and writes nothing, when nobody trained
    anything: the layer keeps its bytes. Raises StorageError for a damaged ledger, ValueError as `update_fresh` does
    and when `given` is lacking although there is a ledger; LostUpdates for an update that an older version has accepted and
    this one would not: its device is asked for it again, and refused.
    """
    trained = {name: parts for name, parts in contributions.items() if parts}
    if not trained:
        return False
    if start is Start.GLOBAL and previous is not None and given is None:
        raise ValueError(f"layer {layer + 1}: what the devices continued would be counted twice without the broadcast file")
    with _Files() as files:
        ledger = None if previous is None else files.ledger(previous)
        start_from = None if given is None or start is not Start.GLOBAL else files.ledger(given)
        ranks = {m.name: ledger_rank(ledger, layer, m) for m in manifest.modules}
        if unknown := trained.keys() - ranks.keys():
            raise ValueError(f"{manifest.name} has no module {min(unknown)!r}")
        for module in manifest.modules:
            if added := [c.rank for c in trained.get(module.name, ())]:
                taken_back = min(_given_rank(start_from, layer, module), max(added))
                ranks[module.name] = next_rank(ranks[module.name], (module.d_out, module.d_in), added, taken_back)
        with TensorWriter(out, _shapes(layer, manifest, ranks)) as writer:
            for module in manifest.modules:
                delta = read_delta(ledger, layer, module)
                if module.name in trained:
                    holders = [_holder(files, c, layer, module.name) for c in trained[module.name]]
                    if start is Start.GLOBAL:
                        delta = update_global(delta, _given(start_from, layer, module), holders)
                    else:
                        delta = update_fresh(delta, holders)
                _write(writer, layer, module.name, delta)
                del delta
    return True


def broadcast_layer(ledger: Path, layer: int, manifest: ModelManifest, broadcast_rank: int, out: Path) -> dict[str, float]:
    """Write what the devices get of a layer: factors with ΔW ≈ B @ A (no scale left to apply), to `out`, synced.

    B = U·S and A = Vᵀ of at most `broadcast_rank` components, largest first, so the first r of them are the best
    approximation of rank r (`lowrank.recompress`). Returns the part of each module's energy that was dropped; a module
    whose ΔW is 0 is left out of the file, not of the result. Raises StorageError for a damaged ledger.
    """
    dropped: dict[str, float] = {}
    blocks: list[LoraBlock] = []
    with open_ledger(ledger) as file:
        for module in manifest.modules:
            if ledger_rank(file, layer, module) == 0:
                continue
            factors, dropped[module.name] = recompress(read_delta(file, layer, module), broadcast_rank)
            if factors.rank:
                blocks.append(LoraBlock(layer, module.name, factors.a, factors.b))
    write_blocks(out, blocks)
    return dropped


def _given_rank(file: TensorFile | None, layer: int, module: ModuleShape) -> int:
    rank = ledger_rank(file, layer, module)
    if rank is None:
        raise StorageError(f"{module.name} of layer {layer + 1}: the broadcast holds a dense matrix, expected factors")
    return rank


def _given(file: TensorFile | None, layer: int, module: ModuleShape) -> Factored:
    delta = read_delta(file, layer, module)
    assert isinstance(delta, Factored), "checked by _given_rank"
    return delta


def _shapes(layer: int, manifest: ModelManifest, ranks: dict[str, int | None]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module in manifest.modules:
        rank = ranks[module.name]
        if rank is None:
            shapes[delta_key(layer, module.name)] = (module.d_out, module.d_in)
        elif rank:
            shapes[key(layer, module.name, "A")] = (rank, module.d_in)
            shapes[key(layer, module.name, "B")] = (module.d_out, rank)
    return shapes


def _write(writer: TensorWriter, layer: int, module: str, delta: Delta) -> None:
    if isinstance(delta, Dense):
        writer.write(delta_key(layer, module), delta.w)
    elif delta.rank:
        writer.write(key(layer, module, "A"), delta.a)
        writer.write(key(layer, module, "B"), delta.b)


def _holder(files: _Files, part: Contribution, layer: int, module: str) -> Holder:
    def read() -> LoraBlock:
        block = read_block(files.update(part.path), layer, module)
        for factor, tensor in (("A", block.a), ("B", block.b)):
            if why := too_large(factor, tensor, part.scale):
                raise LostUpdates({part.device: f"tensor {key(layer, module, factor)!r} {why}"})
        return block

    return Holder(part.device, part.weight, part.scale, part.rank, read)


class _Files:
    """Open files of one aggregation: the ledger's stay, of the updates the `OPEN_FILES` last used."""

    def __init__(self) -> None:
        self._ledgers: list[TensorFile] = []
        self._updates: OrderedDict[Path, TensorFile] = OrderedDict()

    def ledger(self, path: Path) -> TensorFile:
        self._ledgers.append(open_ledger(path))
        return self._ledgers[-1]

    def update(self, path: Path) -> TensorFile:
        if path not in self._updates:
            while len(self._updates) >= OPEN_FILES:
                self._updates.popitem(last=False)[1].close()
            self._updates[path] = TensorFile(path)
        self._updates.move_to_end(path)
        return self._updates[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for file in (*self._ledgers, *self._updates.values()):
            file.close()
