"""An uploaded update against its assignment, before it counts.

Everything expected comes from the assignment and the model's manifest, never from the upload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from common.blocks import key, parse_key
from common.errors import ModelError, UpdateRejected
from common.tensorfile import TensorFile
from common.types import Assignment, Factors, FloatArray, ModelManifest, Start, UnitObject, UpdateMetrics, unit_modules
from fp_server.aggregation import too_large
from fp_server.ledger import open_ledger, read_delta
from fp_server.lowrank import Factored
from fp_server.products import Product, moved, reduced

HEADER_LIMIT = 8 << 20
"""Bytes an update's header may take: some fifty thousand tensors."""
LARGEST = 1e12
"""No honest loss, time or speed comes near."""
REPRESENTABLE = 1e12
"""No update may be larger in norm, operator's limit or not: after a million rounds a ledger's entries are at most 10¹⁸, and what
devices continue of it (`start = "global"`) stays below `aggregation.ENTRY` for a thousand."""
CANCELLING = 1e4
"""How many times its product's norm an update's Σ‖b_k‖‖a_k‖ may be. Where more cancels, what float32 makes of the stacked
factors is no longer what was measured: 10⁴ times its rounding is 0.06 % of the product. An honest A is random or orthonormal,
and B follows its large directions: that is about √r (32 for the largest rank)."""
NOTHING = 1e-6
"""Below this Σ‖b_k‖‖a_k‖ anything may cancel: a module that hardly moved, and no rounding of it counts."""


def expected_shapes(assignment: Assignment, manifest: ModelManifest) -> dict[str, tuple[int, int]]:
    """Key -> shape of every tensor the assignment asks for, in model order.

    Raises ValueError when the assignment itself does not fit the model (the server's own mistake).
    """
    spec = assignment.spec
    shapes: dict[str, tuple[int, int]] = {}
    for unit in sorted(assignment.units):
        for target in unit_modules(unit, spec.targets):
            module = manifest.module(target)
            if module is None or unit.layer >= manifest.layers:
                raise ValueError(f"{manifest.name} has no module {target!r} in layer {unit.layer + 1}")
            if spec.upload is not Factors.B:
                shapes[key(unit.layer, target, "A")] = (spec.rank, module.d_in)
            if spec.upload is not Factors.A:
                shapes[key(unit.layer, target, "B")] = (module.d_out, spec.rank)
    return shapes


def update_bytes_limit(assignment: Assignment, manifest: ModelManifest) -> int:
    """More bytes than any honest update of this assignment has: its tensors and a generous header."""
    shapes = expected_shapes(assignment, manifest)
    return sum(4 * rows * columns for rows, columns in shapes.values()) + 256 * len(shapes) + (64 << 10)


def norm_limit(*limits: float | None) -> float:
    """The lowest of what operator and run allow; never above what float32 can sum."""
    return min([REPRESENTABLE, *(limit for limit in limits if limit is not None)])


def starting_points(start: Start, adapter: Iterable[UnitObject], path: Callable[[str], Path]) -> dict[int, Path]:
    """Layer -> the broadcast file whose top components a device continues; none where it begins with B = 0.

    `path`: where an object with this digest is (`ObjectStore.path`).
    """
    return {unit.layer: path(unit.ref.digest) for unit in adapter} if start is Start.GLOBAL else {}


class Starts:
    """The factors that modules trained at this rank started with (`starting_points`); open files until closed."""

    def __init__(self, rank: int, manifest: ModelManifest, files: Mapping[int, Path]) -> None:
        self._rank, self._manifest, self._paths = rank, manifest, files
        self._open: dict[int, TensorFile] = {}
        self._stack = ExitStack()

    def of(self, layer: int, module: str) -> Product:
        """The top r components of the broadcast, rank 0 where there are none. Raises StorageError for a damaged file."""
        if layer in self._paths and layer not in self._open:
            self._open[layer] = self._stack.enter_context(open_ledger(self._paths[layer]))
        shape = self._manifest.module(module)
        assert shape is not None, "the assignment was made from this manifest"
        found = read_delta(self._open.get(layer), layer, shape)
        assert isinstance(found, Factored), "a broadcast holds factors"
        top = found.first(self._rank)
        return Product(top.a, top.b)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def check_update(
    path: Path,
    assignment: Assignment,
    manifest: ModelManifest,
    max_norm: float | None = None,
    starts: Mapping[int, Path] | None = None,
) -> None:
    """Raise UpdateRejected, naming the tensor, unless the file is exactly what was assigned.

    Checked: a well-formed file, the exact key set, shapes, dtype F32, every value finite and at most `aggregation.ENTRY`, and
    per module that little of B·A cancels (`CANCELLING`), and that the Frobenius norm of (α/r)·B·A less what the device started
    with (`starting_points`) is at most `max_norm`. That bounds what one device can move in the ledger, as a weight w is at
    most 1. One module's factors are in memory at a time; the product never is. Raises StorageError when a starting point's
    file is damaged.
    """
    expected = expected_shapes(assignment, manifest)
    try:
        file = TensorFile(path, HEADER_LIMIT)
    except ModelError as error:
        raise UpdateRejected(f"the update can't be read: {str(error).removeprefix(f'{path}: ')}") from None
    with file, ExitStack() as stack:
        _check_header(file, expected)
        given = Starts(assignment.spec.rank, manifest, starts or {})
        stack.callback(given.close)
        scale, limit = assignment.spec.alpha / assignment.spec.rank, norm_limit(max_norm)
        factors: dict[str, FloatArray] = {}
        for name in expected:
            tensor = file.float32(name)
            layer, module, factor = parse_key(name)
            if why := too_large(factor, tensor, scale):
                raise UpdateRejected(f"tensor {name!r} {why}")
            factors[factor] = tensor
            if len(factors) < 2:
                continue
            trained, start = Product(factors["A"], factors["B"]), given.of(layer, module)
            factors.clear()
            size = _check_cancelling(name, scale, trained)
            if len(start.a):
                size = moved(scale, trained, start).norm
            if not size <= limit:
                away = " away from where it started" if starts else ""
                raise UpdateRejected(f"tensor {name!r}: the update's norm is {size:.4g}{away}, at most {limit:.4g} counts")


def _check_cancelling(name: str, scale: float, trained: Product) -> float:
    """‖scale·B·A‖. Raises UpdateRejected when it is what is left of something far larger."""
    size, spread = scale * reduced(trained).norm, scale * trained.spread
    if spread > max(NOTHING, CANCELLING * size):
        raise UpdateRejected(
            f"tensor {name!r}: the update's components cancel: they have a norm of {spread:.4g}, and their sum {size:.4g}; "
            f"at most {CANCELLING:.0e} times as much counts"
        )
    return size


def check_metrics(metrics: UpdateMetrics, units: int) -> None:
    """Raise UpdateRejected, naming the figure, for what can't have been measured: status shows and averages these, and the log
    keeps them. `units`: of the assignment."""
    if len(metrics.unit_fidelity) > units:
        raise UpdateRejected(f"the update's unit_fidelity has {len(metrics.unit_fidelity)} values, for {units} units")
    for name in ("tokens_per_second", "seconds", "predicted_step_seconds", "step_seconds"):
        if not 0 <= (value := getattr(metrics, name)) <= LARGEST:
            raise UpdateRejected(f"the update's {name} is {value:.4g}, it must lie between 0 and {LARGEST:.0e}")
    for name in ("loss_first", "loss_last"):
        if (value := getattr(metrics, name)) is not None and not abs(value) <= LARGEST:
            raise UpdateRejected(f"the update's {name} is {value:.4g}, at most {LARGEST:.0e} counts")
    cosines = () if metrics.fidelity is None else (metrics.fidelity,)
    for value in (*cosines, *metrics.unit_fidelity):
        if not abs(value) <= 1.01:  # rounding may take a cosine a little over 1
            raise UpdateRejected(f"the update's fidelity is {value:.4g}, a cosine lies between -1 and 1")


def _check_header(file: TensorFile, expected: dict[str, tuple[int, int]]) -> None:
    for name in sorted(file.tensors.keys() - expected.keys()):
        raise UpdateRejected(f"tensor {name[:120]!r} was not assigned to this device")
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UpdateRejected(f"tensor {name!r} is missing")
        info = file.tensors[name]
        if info.dtype != "F32":
            raise UpdateRejected(f"tensor {name!r} is {info.dtype}, expected F32")
        if info.shape != shape:
            raise UpdateRejected(f"tensor {name!r} has shape {info.shape}, expected {shape}")
