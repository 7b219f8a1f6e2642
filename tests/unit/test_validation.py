"""An upload against its assignment: everything that must be refused, and the tensor each refusal names."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from common.blocks import key, write_blocks
from common.errors import StorageError, UpdateRejected
from common.tensorfile import TensorFile, write_tensors
from common.types import (
    Assignment,
    Factors,
    LoraBlock,
    ModelManifest,
    ModuleShape,
    ObjectRef,
    Start,
    TaskKey,
    TrainSpec,
    UnitId,
    UnitObject,
    UpdateMetrics,
)
from fp_server.products import Product, reduced
from fp_server.validation import CANCELLING, check_metrics, check_update, expected_shapes, norm_limit, starting_points

MODULES = (ModuleShape("mlp.up_proj", 40, 24), ModuleShape("self_attn.k_proj", 8, 24), ModuleShape("self_attn.q_proj", 24, 24))
MANIFEST = ModelManifest("tiny", "llama", 6, 24, 100, MODULES, "f" * 64)
SPEC = TrainSpec(5, 4, 128, 1e-4, 4, 8.0, ("mlp.up_proj", "self_attn.q_proj"), 0)
UNITS = (UnitId(1), UnitId(4))
ASSIGNMENT = Assignment(TaskKey("run", 0, 0), UNITS, ((UnitId(1),), (UnitId(4),)), ((1.0,), (1.0,)), SPEC, (), 1, True)


def good() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"mlp.up_proj": (40, 24), "self_attn.q_proj": (24, 24)}
    out: dict[str, np.ndarray] = {}
    for layer in (1, 4):
        for name, (d_out, d_in) in shapes.items():
            out[f"layers.{layer}.{name}.lora_A"] = rng.standard_normal((4, d_in), np.float32)
            out[f"layers.{layer}.{name}.lora_B"] = rng.standard_normal((d_out, 4), np.float32)
    return out


def check(tmp_path: Path, tensors: dict[str, np.ndarray], max_norm: float | None = None) -> None:
    write_tensors(tmp_path / "update", tensors)
    check_update(tmp_path / "update", ASSIGNMENT, MANIFEST, max_norm)


def test_what_was_assigned_passes(tmp_path: Path) -> None:
    check(tmp_path, good())
    assert set(expected_shapes(ASSIGNMENT, MANIFEST)) == set(good())


A, B = "layers.4.self_attn.q_proj.lora_A", "layers.4.self_attn.q_proj.lora_B"


@pytest.mark.parametrize("key", ["layers.2.self_attn.q_proj.lora_A", "layers.4.self_attn.k_proj.lora_B", "../../etc/passwd"])
def test_a_tensor_that_was_not_assigned_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(UpdateRejected, match=f"'{key}' was not assigned"):
        check(tmp_path, good() | {key: np.zeros((4, 24), np.float32)})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = good()
    del tensors[B]
    with pytest.raises(UpdateRejected, match=f"'{B}' is missing"):
        check(tmp_path, tensors)


@pytest.mark.parametrize("shape", [(8, 24), (4, 23), (24, 4), (96,), (0, 24)])
def test_a_wrong_shape_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UpdateRejected, match=f"'{A}' has shape") as caught:
        check(tmp_path, good() | {A: np.zeros(shape, np.float32)})
    assert "expected (4, 24)" in str(caught.value)


def test_a_wrong_dtype_is_named(tmp_path: Path) -> None:
    path = tmp_path / "update"
    write_tensors(path, good())
    data = path.read_bytes()
    # Same bytes, claimed to be integers of the same width.
    at = data.index(A.encode())
    path.write_bytes(data[:at] + data[at:].replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(UpdateRejected, match=f"'{A}' is I32, expected F32"):
        check_update(path, ASSIGNMENT, MANIFEST)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [A, B])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    tensors = good()
    tensors[name][2, 3] = value
    with pytest.raises(UpdateRejected, match=rf"'{name}' holds {value} at \[2, 3\]"):
        check(tmp_path, tensors)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "update"
    write_tensors(path, good())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UpdateRejected, match="can't be read"):
        check_update(path, ASSIGNMENT, MANIFEST)


def test_the_norm_is_that_of_the_scaled_product(tmp_path: Path) -> None:
    """Twin: the dense product. α/r = 2."""
    tensors = good()
    tensors[B] = tensors[B] * np.float32(50)
    norm = float(np.linalg.norm(2.0 * tensors[B].astype(np.float64) @ tensors[A].astype(np.float64)))
    check(tmp_path, tensors, norm * (1 + 1e-9))
    with pytest.raises(UpdateRejected, match=rf"'{B}': the update's norm is {norm:.4g}"):
        check(tmp_path, tensors, norm * (1 - 1e-9))


def test_a_norm_that_would_overflow_the_ledger_in_time_is_refused_without_a_limit_too(tmp_path: Path) -> None:
    tensors = good()
    tensors[A], tensors[B] = np.full((4, 24), 1e10, np.float32), np.full((24, 4), 1e10, np.float32)
    with pytest.raises(UpdateRejected, match=f"'{B}': the update's norm is .*, at most 1e[+]12 counts"):
        check(tmp_path, tensors)


@pytest.mark.parametrize(("name", "value", "limit"), [(A, 3e38, "1e[+]15"), (B, -3e38, "5e[+]14"), (B, 6e14, "5e[+]14")])
def test_an_entry_that_can_not_be_stacked_is_named_however_small_the_product(
    tmp_path: Path, name: str, value: float, limit: str
) -> None:
    """α/r = 2, which is folded into B."""
    tensors = good()
    other = A if name == B else B
    tensors[name] = np.full_like(tensors[name], value)
    tensors[other] = np.full_like(tensors[other], 1e-38)
    with pytest.raises(UpdateRejected, match=rf"'{name}' holds .* at \[0, 0\], at most {limit} counts"):
        check(tmp_path, tensors)


def cancelling(size: float) -> dict[str, np.ndarray]:
    """Two equal columns of B, two rows of A that cancel but for one ulp."""
    tensors = good()
    a, b = np.zeros_like(tensors[A]), np.zeros_like(tensors[B])
    a[0] = np.abs(tensors[A][0]) + 1
    a[1] = -np.nextafter(a[0], np.float32(np.inf), dtype=np.float32)
    b[:, 0] = b[:, 1] = tensors[B][:, 0]
    return tensors | {A: a * np.float32(size), B: b * np.float32(size)}


@pytest.mark.parametrize("size", [1.0, 1e3, 1e10])
def test_components_that_cancel_are_refused(tmp_path: Path, size: float) -> None:
    tensors = cancelling(size)
    true = float(np.linalg.norm(2.0 * tensors[B].astype(np.float64) @ tensors[A].astype(np.float64)))
    with pytest.raises(
        UpdateRejected, match=f"'{B}': the update's components cancel: they have .*, and their sum {re.escape(f'{true:.4g}')}"
    ):
        check(tmp_path, tensors, max_norm=1e9)


def test_what_hardly_moved_may_cancel(tmp_path: Path) -> None:
    """A module with B = 0, or with no more than noise; and denormals, which are nothing."""
    check(tmp_path, good() | {B: np.zeros((24, 4), np.float32)}, 1e3)
    check(tmp_path, cancelling(1e-5), 1e3)
    check(tmp_path, good() | {A: np.full((4, 24), 1e-45, np.float32), B: np.full((24, 4), 1e-45, np.float32)}, 1e3)


def test_honest_factors_cancel_by_far_less_than_what_is_refused(tmp_path: Path) -> None:
    """LoRA's start (a random A, B = 0) after a gradient of any kind, the worst of them against A's smallest direction."""
    rng = np.random.default_rng(1)
    for rank, d_in in ((4, 24), (16, 64), (64, 576)):
        a = rng.uniform(-1, 1, (rank, d_in)) / np.sqrt(d_in)
        u, _, _ = np.linalg.svd(a, full_matrices=False)
        gradient, signs = rng.standard_normal((32, d_in)), np.sign(rng.standard_normal((32, rank)))
        for b in (gradient @ a.T, signs, np.outer(np.ones(32), u[:, -1])):
            one = Product(a, b)
            assert one.spread < CANCELLING / 100 * reduced(one).norm


def test_the_norm_is_measured_from_what_the_device_started_with(tmp_path: Path) -> None:
    """Twin: the dense difference. Of the broadcast's six components the device continued the first four."""
    rng = np.random.default_rng(5)
    given: dict[int, Path] = {}
    for layer in (1, 4):
        given[layer] = tmp_path / f"broadcast-{layer}"
        shapes = {"mlp.up_proj": (40, 24), "self_attn.q_proj": (24, 24)} if layer == 4 else {"mlp.up_proj": (40, 24)}
        blocks = [
            LoraBlock(layer, name, rng.standard_normal((6, d_in), np.float32), 50 * rng.standard_normal((d_out, 6), np.float32))
            for name, (d_out, d_in) in shapes.items()
        ]
        write_blocks(given[layer], blocks)
        start = {block.module: block for block in blocks}
    tensors = good()
    tensors[A], tensors[B] = start["self_attn.q_proj"].a[:4], start["self_attn.q_proj"].b[:, :4] / 2 + tensors[B]
    for layer, name in ((1, "mlp.up_proj"), (4, "mlp.up_proj")):  # these have not moved
        with TensorFile(given[layer]) as file:
            tensors[key(layer, name, "A")] = file.float32(key(layer, name, "A"))[:4]
            tensors[key(layer, name, "B")] = file.float32(key(layer, name, "B"))[:, :4] / 2
    for factor in "AB":  # the broadcast has nothing of this one: it began with B = 0
        tensors[key(1, "self_attn.q_proj", factor)] *= np.float32(0.1)
    first = start["self_attn.q_proj"]
    top = first.b[:, :4].astype(np.float64) @ first.a[:4].astype(np.float64)
    distance = float(np.linalg.norm(2.0 * tensors[B].astype(np.float64) @ tensors[A].astype(np.float64) - top))
    assert distance < np.linalg.norm(top) / 5, "the update itself is far larger"
    assignment = dataclasses.replace(ASSIGNMENT, spec=dataclasses.replace(SPEC, start=Start.GLOBAL))
    write_tensors(tmp_path / "update", tensors)
    check_update(tmp_path / "update", assignment, MANIFEST, distance * (1 + 1e-6), given)
    with pytest.raises(UpdateRejected, match=rf"'{B}': the update's norm is {distance:.4g} away from where it started"):
        check_update(tmp_path / "update", assignment, MANIFEST, distance * (1 - 1e-6), given)
    given[4].write_bytes(b"x" * 100)
    with pytest.raises(StorageError, match="damaged"):
        check_update(tmp_path / "update", assignment, MANIFEST, 1e9, given)


def test_only_a_global_start_has_starting_points() -> None:
    adapter = (UnitObject(1, ObjectRef("ab" * 32, 1)), UnitObject(4, ObjectRef("cd" * 32, 1)))
    assert starting_points(Start.FRESH, adapter, Path) == {}
    assert starting_points(Start.GLOBAL, adapter, Path) == {1: Path("ab" * 32), 4: Path("cd" * 32)}


def test_the_lower_limit_holds() -> None:
    assert norm_limit(None, None) == 1e12
    assert norm_limit(5.0, None) == norm_limit(None, 5.0) == norm_limit(7.0, 5.0) == norm_limit(5.0, 1e40) == 5.0


@pytest.mark.parametrize("upload", [Factors.A, Factors.B])
def test_only_the_factors_to_be_uploaded_are_expected(tmp_path: Path, upload: Factors) -> None:
    assignment = dataclasses.replace(ASSIGNMENT, spec=dataclasses.replace(SPEC, upload=upload))
    write_tensors(tmp_path / "update", {name: t for name, t in good().items() if name.endswith(upload.value)})
    check_update(tmp_path / "update", assignment, MANIFEST, 1.0)
    write_tensors(tmp_path / "update", good())
    with pytest.raises(UpdateRejected, match="was not assigned"):
        check_update(tmp_path / "update", assignment, MANIFEST)


def test_an_assignment_that_does_not_fit_the_model_is_the_servers_mistake(tmp_path: Path) -> None:
    wrong = dataclasses.replace(ASSIGNMENT, units=(UnitId(6),))
    with pytest.raises(ValueError, match="layer 7"):
        check_update(tmp_path / "update", wrong, MANIFEST)


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        (UpdateMetrics(step_seconds=1e300), "step_seconds is 1e[+]300"),
        (UpdateMetrics(predicted_step_seconds=-1.0), "predicted_step_seconds is -1"),
        (UpdateMetrics(seconds=math.nan), "seconds is nan"),
        (UpdateMetrics(loss_last=-1e40), "loss_last is -1e[+]40"),
        (UpdateMetrics(fidelity=1e300), "fidelity is 1e[+]300"),
        (UpdateMetrics(fidelity=0.5, unit_fidelity=(0.5, -3.0)), "fidelity is -3"),
        (UpdateMetrics(unit_fidelity=(0.5,) * 4), "unit_fidelity has 4 values, for 3 units"),
    ],
)
def test_figures_that_no_device_can_have_measured_are_named(metrics: UpdateMetrics, named: str) -> None:
    with pytest.raises(UpdateRejected, match=named):
        check_metrics(metrics, 3)


def test_measured_figures_pass() -> None:
    check_metrics(UpdateMetrics(11.5, -0.0, 1e6, 1, 1, 1e5, 0.0, 3e3, 1.0 + 1e-6, (-1.0, 0.0, 1.0)), 3)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "place"),
    [
        ("x", "F32", ", ".join(["9" * 4000] * 300), "0, 4"),
        ("x", "F32", ", ".join(["1"] * 100_000), "0, 4"),
        ("x", "F32", "1", "0, " + "9" * 4000),
        ("x" * 500_000, "F32", "2", "0, 4"),
        ("x" * 500_000, "X", "1", "0, 4"),
        ("x", "X" * 500_000, "1", "0, 4"),
        ("x" * 500_000, "F32", "1", "4, 8"),
    ],
)
def test_a_header_that_is_made_to_cost_time_or_to_fill_the_log_does_neither(
    tmp_path: Path, name: str, dtype: str, shape: str, place: str
) -> None:
    """A product of numbers of 4,000 digits takes minutes, in which nothing else of the process runs."""
    header = f'{{"{name}": {{"dtype": "{dtype}", "shape": [{shape}], "data_offsets": [{place}]}}}}'.encode()
    (tmp_path / "update").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    begun = time.process_time()
    with pytest.raises(UpdateRejected) as refused:
        check_update(tmp_path / "update", ASSIGNMENT, MANIFEST)
    assert time.process_time() - begun < 2 and len(str(refused.value)) < 400
