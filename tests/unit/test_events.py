"""Every event comes back from its JSON as it was."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest

from common.errors import StorageError
from common.types import (
    Capacity,
    Gradient,
    ModelManifest,
    ModuleShape,
    ObjectRef,
    Part,
    PlanReport,
    TaskKey,
    UnitId,
    UpdateMetrics,
)
from fp_server import events as e

KEY = TaskKey("r", 3, 1)
REF = ObjectRef("ab" * 32, 2**40)
ALL = [
    e.RunStarted("r", "[run]\nname = 'ü'", ModelManifest("m", "llama", 2, 4, 8, (ModuleShape("a.b", 4, 4),), "cd" * 32)),
    e.PlanReceived(
        "r", "d", PlanReport("r", 5, "x", (Capacity(Gradient.STREAMED, 2, 1, False, 2**40),), (1, 2**40), 7, "no", 9), 4
    ),
    e.RoundOpened("r", KEY, ("a", "b"), ("a",), {"b": "too small"}, True),
    e.ProbeReceived(
        "r", KEY, "d", np.array([[1, 0.1], [1 / 3, 1]], np.float32), np.array([0.5, 1e-30], np.float32), 2.5, 7, 8, 0.1
    ),
    e.ProbeReceived("r", KEY, "d", np.empty((0, 0), np.float32), np.empty(0, np.float32), 2.5, 7, 8, 0.1),
    e.Assigned("r", KEY, "d", (UnitId(1), UnitId(2, Part.FFN)), ((UnitId(0), UnitId(1)),), ((0.1, 0.9),), 3, 1, 2, True),
    e.UpdateAccepted("r", KEY, "d", REF, UpdateMetrics(3.0, 2.0, 0.1, 2**40, 1, 0.3)),
    e.DeviceDropped("r", KEY, "d", "WorkerError", "it 'broke' [bold]"),
    e.RoundClosed("r", KEY, False, "why"),
    e.RoundCommitted("r", KEY, (e.UnitCommit(1, REF, REF, ("a", "b"), 0.25),), (4,), {"a": 10**12}, 1, 2),
    e.RoundCommitted(
        "r",
        KEY,
        (e.UnitCommit(1, REF, REF, ("a", "b"), 0.25, (e.UnitHolders(UnitId(1, Part.FFN), ("a",)),)),),
        (4,),
        {"a": 10**12},
        1,
        2,
        (UnitId(4, Part.ATTENTION),),
    ),
    e.RunPaused("r", "x"),
    e.RunResumed("r"),
    e.RunEnded("r", "finished", "y"),
]


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_round_trip(event):
    kind, body = e.encode(event)
    again = e.decode(kind, body)
    assert kind == type(event).__name__ == type(again).__name__
    for field in dataclasses.fields(event):
        before, after = getattr(event, field.name), getattr(again, field.name)
        if isinstance(before, np.ndarray):
            assert after.dtype == np.float32 and before.shape == after.shape and before.tobytes() == after.tobytes()
        else:
            assert before == after and type(before) is type(after), field.name


def test_no_event_is_left_out():
    assert {type(event) for event in ALL} == set(typing.get_args(e.Event))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("Nothing", "{}"),
        ("RunPaused", "{}"),
        ("RunPaused", "x"),
        ("ProbeReceived", "{}"),
        ("ProbeReceived", "[]"),
        ("RunPaused", "[1]"),
    ],
)
def test_what_is_no_event_is_a_storage_error_that_names_its_kind(kind, body):
    with pytest.raises(StorageError, match=kind):
        e.decode(kind, body)
