"""The JSON form of the shared types."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from common.codec import from_json, to_json
from common.types import (
    Assignment,
    ObjectRef,
    ProbeReport,
    ProbeSpec,
    ProbeTask,
    RunSpec,
    TaskKey,
    TrainSpec,
    UnitId,
    UnitObject,
    layer_units,
)

KEY = TaskKey("run-1", 2, 0)
SPEC = TrainSpec(5, 4, 128, 1e-4, 8, 16.0, ("mlp.up_proj", "self_attn.q_proj"), 7)
ASSIGNMENT = Assignment(
    KEY, layer_units(2), ((UnitId(0), UnitId(1)),), ((0.25, 0.75),), SPEC, (UnitObject(1, ObjectRef("ab" * 32, 12)),), 2, True
)


@pytest.mark.parametrize(
    "value",
    [
        KEY,
        SPEC,
        ASSIGNMENT,
        ProbeTask(KEY, ProbeSpec(), (), False),
        RunSpec("r", "m", "f", "x", UnitId(0).part, SPEC, ProbeSpec(), 16, 3),
    ],
)
def test_round_trip(value: Any) -> None:
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


def test_arrays_keep_their_bits() -> None:
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    report = ProbeReport(KEY, array, array[0], 2.5, 10, 20, 0.5)
    found = from_json(ProbeReport, json.loads(json.dumps(to_json(report))))
    assert found.similarity.tobytes() == array.tobytes() and found.similarity.dtype == np.float32
    assert found.in_out.shape == (5,) and found.loss == 2.5
    assert found.similarity.flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "5"}, "TrainSpec.steps: expected int, found str"),
        ({"steps": True}, "TrainSpec.steps: expected int, found bool"),
        ({"speed": 1}, "TrainSpec: unknown key 'speed'"),
        ({"gradient": "magic"}, r"TrainSpec.gradient: 'magic' is not one of \['submodel'"),
        ({"targets": [1]}, r"TrainSpec.targets\[0\]: expected str"),
        ({"targets": None}, "TrainSpec.targets: expected list"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(TrainSpec, {**to_json(SPEC), **change})
    with pytest.raises(ValueError, match="key 'steps' is missing"):
        from_json(TrainSpec, {k: v for k, v in to_json(SPEC).items() if k != "steps"})


def test_a_short_array_is_refused() -> None:
    good = to_json(ProbeReport(KEY, np.zeros((2, 2), np.float32), np.zeros(2, np.float32), 0.0, 0, 0, 0.0))
    good["similarity"]["shape"] = [2, 3]
    with pytest.raises(ValueError, match=r"ProbeReport.similarity: 16 bytes do not fill shape \(2, 3\)"):
        from_json(ProbeReport, good)
    with pytest.raises(TypeError, match="no JSON form for object"):
        to_json(object())
