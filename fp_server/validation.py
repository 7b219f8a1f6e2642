"""An uploaded update against its assignment, before it counts.

Everything expected comes from the assignment and the model's manifest, never from the upload.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common.blocks import key
from common.errors import ModelError, UpdateRejected
from common.tensorfile import TensorFile
from common.types import Assignment, Factors, FloatArray, ModelManifest, UpdateMetrics, unit_modules
from fp_server.lowrank import Float64

HEADER_LIMIT = 8 << 20
"""Bytes an update's header may take: some fifty thousand tensors."""
LARGEST = 1e12
"""No honest loss, time or speed comes near."""
REPRESENTABLE = 1e30
"""No update may be larger in norm, operator's limit or not: sums of them must stay finite in float32."""


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


def check_update(path: Path, assignment: Assignment, manifest: ModelManifest, max_norm: float | None = None) -> None:
    """Raise UpdateRejected, naming the tensor, unless the file is exactly what was assigned.

    Checked: a well-formed file, the exact key set, shapes, dtype F32, every value finite, and per module the Frobenius
    norm of (α/r)·B·A at most `max_norm`. One module's factors are in memory at a time; the product never is.
    """
    expected = expected_shapes(assignment, manifest)
    try:
        file = TensorFile(path, HEADER_LIMIT)
    except ModelError as error:
        raise UpdateRejected(f"the update can't be read: {str(error).removeprefix(f'{path}: ')}") from None
    with file:
        _check_header(file, expected)
        scale = assignment.spec.alpha / assignment.spec.rank
        grams: dict[str, Float64] = {}
        for name in expected:
            tensor = file.float32(name)
            if not np.isfinite(tensor).all():
                place = np.argwhere(~np.isfinite(tensor))[0].tolist()
                raise UpdateRejected(f"tensor {name!r} holds {tensor[tuple(place)]} at {place}: every value must be finite")
            module, factor = name.rsplit(".lora_", 1)
            grams[factor] = _gram(tensor if factor == "A" else tensor.T)
            del tensor
            if len(grams) == 2:
                # ‖BA‖² = tr(BᵀB · AAᵀ)
                norm = abs(scale) * math.sqrt(max(0.0, float((grams["A"] * grams["B"]).sum())))
                grams.clear()
                limit = REPRESENTABLE if max_norm is None else min(max_norm, REPRESENTABLE)
                if not norm <= limit:
                    raise UpdateRejected(
                        f"tensor {module + '.lora_B'!r}: the update's norm is {norm:.4g}, at most {limit:.4g} counts"
                    )


def check_metrics(metrics: UpdateMetrics) -> None:
    """Raise UpdateRejected, naming the figure, for what can't have been measured: status shows and averages these."""
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


def _gram(x: FloatArray) -> Float64:
    """X Xᵀ (r, r) in float64."""
    x64 = x.astype(np.float64)
    product: Float64 = x64 @ x64.T
    return product


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
