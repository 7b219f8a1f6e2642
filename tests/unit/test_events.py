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
from fp_server.outliers import Score

KEY = TaskKey("r", 3, 1)
REF = ObjectRef("ab" * 32, 2**40)
SMALL = ObjectRef("ab" * 32, 9)
ALL = [
    e.RunStarted("r", "[run]\nname = 'ü'", ModelManifest("m", "llama", 2, 4, 8, (ModuleShape("a.b", 4, 4),), "cd" * 32), "{}"),
    e.PlanReceived(
        "r", "d", PlanReport("r", 5, "x", (Capacity(Gradient.STREAMED, 2, 1, False, 2**40),), (1, 2**40), 7, "no", 9), 4
    ),
    e.RoundOpened("r", KEY, ("a", "b"), ("a",), {"b": "too small"}, True),
    e.ProbeReceived(
        "r", KEY, "d", np.array([[1, 0.1], [1 / 3, 1]], np.float32), np.array([0.5, 1e-30], np.float32), 2.5, 7, 8, 0.1
    ),
    e.ProbeReceived("r", KEY, "d", np.empty((0, 0), np.float32), np.empty(0, np.float32), 2.5, 7, 8, 0.1),
    e.Assigned(
        "r",
        KEY,
        "d",
        (UnitId(1), UnitId(2, Part.FFN)),
        ((UnitId(0), UnitId(1)),),
        ((0.1, 0.9),),
        3,
        1,
        2,
        True,
        Gradient.STITCHED,
    ),
    e.UpdateAccepted("r", KEY, "d", REF, UpdateMetrics(3.0, 2.0, 0.1, 2**40, 1, 0.3)),
    e.UpdateAccepted("r", KEY, "d", REF, UpdateMetrics(3.0, 2.0, 0.1, 1, 1, 0.3, 1.5, 1.25, -0.125, (0.5, -1.0))),
    e.DeviceDropped("r", KEY, "d", "WorkerError", "it 'broke' [bold]"),
    e.UpdatesLost("r", KEY, {"d": "its bytes are not what was written"}),
    e.RoundClosed("r", KEY, False, "why"),
    e.UpdatesReviewed(
        "r", KEY, {"a": Score(3, 2, -0.25, 1.5), "b": Score(0, 0, None, None)}, {"a": "it 'points' elsewhere"}, True
    ),
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


OLD = {
    "RunStarted": (
        '{"run":"r","toml":"[run]","manifest":{"name":"m","family":"llama","layers":2,"hidden":4,"vocab":8,"modules":[{'
        '"name":"a.b","d_in":4,"d_out":4}],"fingerprint":"' + "cd" * 32 + '"}}',
        e.RunStarted("r", "[run]", ModelManifest("m", "llama", 2, 4, 8, (ModuleShape("a.b", 4, 4),), "cd" * 32), ""),
    ),
    "Assigned": (
        '{"run":"r","key":{"run":"r","round":3,"attempt":1},"device":"d","units":[{"layer":1,"part":"layer"}],'
        '"groups":[[{"layer":1,"part":"layer"}]],"probabilities":[[1.0]],"redraws":3,"reductions":1,"micro_batch":2,'
        '"checkpointing":true}',
        e.Assigned("r", KEY, "d", (UnitId(1),), ((UnitId(1),),), ((1.0,),), 3, 1, 2, True, Gradient.SUBMODEL),
    ),
    "PlanReceived": (
        '{"run":"r","device":"d","report":{"run":"r","samples":5,"fingerprint":"x","capacities":[{"gradient":"submodel",'
        '"units":2,"micro_batch":1,"checkpointing":false,"peak_bytes":9}],"unit_bytes":[1,2],"smallest_budget":7,'
        '"refusal":"","budget_bytes":9},"samples":4}',
        e.PlanReceived(
            "r", "d", PlanReport("r", 5, "x", (Capacity(Gradient.SUBMODEL, 2, 1, False, 9, 0.0),), (1, 2), 7, "", 9), 4
        ),
    ),
    "UpdateAccepted": (
        '{"run":"r","key":{"run":"r","round":3,"attempt":1},"device":"d","ref":{"digest":"' + "ab" * 32 + '","size":9},'
        '"metrics":{"loss_first":3.0,"loss_last":2.0,"tokens_per_second":0.1,"predicted_peak_bytes":7,"measured_peak_bytes":6,'
        '"seconds":0.3}}',
        e.UpdateAccepted("r", KEY, "d", SMALL, UpdateMetrics(3.0, 2.0, 0.1, 7, 6, 0.3, 0.0, 0.0, None, ())),
    ),
    "RoundCommitted": (
        '{"run":"r","key":{"run":"r","round":3,"attempt":1},"units":[{"layer":1,"ledger":{"digest":"' + "ab" * 32 + '","size":9},'
        '"broadcast":{"digest":"' + "ab" * 32 + '","size":9},"holders":["a","b"],"dropped":0.25}],"held_back":[4],'
        '"weights":{"a":3},"bytes_up":1,"bytes_down":2}',
        e.RoundCommitted(
            "r", KEY, (e.UnitCommit(1, SMALL, SMALL, ("a", "b"), 0.25, ()),), (4,), {"a": 3},
            1, 2, (),
        ),
    ),
}  # fmt: skip
"""Bodies as version 0.1 wrote them, before components and gradient modes, and what they mean."""


@pytest.mark.parametrize("kind", OLD)
def test_an_older_log_still_reads(kind):
    body, event = OLD[kind]
    assert e.decode(kind, body) == event
