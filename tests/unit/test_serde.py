"""Every message that carries a value round-trips; a malformed field is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common import types as t
from common.errors import ProtocolError
from common.pb import objects_pb2, session_pb2, types_pb2
from common.transport import serde

KEY = t.TaskKey("run-1", 3, 2)
REF = t.ObjectRef("ab" * 32, 2**40)
SPEC = t.TrainSpec(
    5, 4, 128, 1e-4, 8, 16.0, ("a", "b"), 2**62, 0.1, t.Gradient.STREAMED, t.Estimator.FORWARD, t.Start.GLOBAL, t.Factors.B,
    t.Factors.A,
)  # fmt: skip
PROBE = t.ProbeSpec(t.Part.FFN, 64, t.Kernel.RBF, t.Positions.RAW, 2, 32, 2**61)
OBJECTS = (t.UnitObject(0, REF), t.UnitObject(7, t.ObjectRef("cd" * 32, 1)))
UNITS = (t.UnitId(0), t.UnitId(3, t.Part.ATTENTION))
CASES = {
    "unit": (serde.unit_to_pb, serde.unit_from_pb, t.UnitId(5, t.Part.FFN)),
    "key": (serde.key_to_pb, serde.key_from_pb, KEY),
    "ref": (serde.ref_to_pb, serde.ref_from_pb, REF),
    "probe spec": (serde.probe_spec_to_pb, serde.probe_spec_from_pb, PROBE),
    "train spec": (serde.train_spec_to_pb, serde.train_spec_from_pb, SPEC),
    "run spec": (
        serde.run_spec_to_pb, serde.run_spec_from_pb,
        t.RunSpec("run-1", "m", "ab" * 32, "fedpruner", t.Part.LAYER, SPEC, PROBE, 64, 10),
    ),
    "plan": (
        serde.plan_report_to_pb, serde.plan_report_from_pb,
        t.PlanReport("run-1", 2**33, "ab" * 32, (t.Capacity(t.Gradient.SUBMODEL, 3, 2, True, 2**40),), (1, 2**41), 7, "why", 9),
    ),
    "probe task": (serde.probe_task_to_pb, serde.probe_task_from_pb, t.ProbeTask(KEY, PROBE, OBJECTS, False)),
    "assignment": (
        serde.assignment_to_pb, serde.assignment_from_pb,
        t.Assignment(KEY, UNITS, ((UNITS[0], t.UnitId(1)), (UNITS[1],)), ((0.25, 0.75), (1.0,)), SPEC, OBJECTS, 2, True, 4, 1),
    ),
    "progress": (serde.progress_to_pb, serde.progress_from_pb, t.Progress(KEY, "train", 3, 2**40)),
    "failed": (serde.failed_to_pb, serde.failed_from_pb, t.TaskFailed(KEY, "WorkerError", "it broke")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_round_trip_over_bytes(case):
    to_pb, from_pb, value = CASES[case]
    message = to_pb(value)
    assert from_pb(type(message).FromString(message.SerializeToString())) == value


@pytest.mark.parametrize("units", [0, 3])
def test_a_probe_report_round_trips_bit_for_bit(units):
    rng = np.random.default_rng(0)
    similarity, in_out = rng.random((units, units), np.float32), rng.random(units, np.float32)
    report = t.ProbeReport(KEY, similarity, in_out, 2.5, 2**40, 2**41, 0.1)
    again = serde.probe_report_from_pb(session_pb2.ProbeReport.FromString(serde.probe_report_to_pb(report).SerializeToString()))
    assert again.similarity.tobytes() == similarity.tobytes() and again.similarity.shape == (units, units)
    assert again.in_out.tobytes() == in_out.tobytes() and again.in_out.dtype == np.float32
    assert (again.key, again.loss, again.tokens, again.peak_bytes, again.seconds) == (KEY, 2.5, 2**40, 2**41, 0.1)


def test_a_push_header_round_trips():
    ready = t.UpdateReady(KEY, REF, t.UpdateMetrics(3.0, 2.0, 10.5, 2**40, 2**41, 1.5))
    message = objects_pb2.PushHeader.FromString(serde.ready_to_pb(ready, 17).SerializeToString())
    assert serde.ready_from_pb(message) == ready and message.offset == 17
    untold = replace(ready, metrics=replace(ready.metrics, loss_first=None, loss_last=None))
    message = objects_pb2.PushHeader.FromString(serde.ready_to_pb(untold, 0).SerializeToString())
    assert serde.ready_from_pb(message) == untold, "a loss that is not told is not 0"


def changed(case, path, value):
    to_pb, from_pb, good = CASES[case]
    message = to_pb(good)
    *parents, last = path.split(".")
    target = message
    for parent in parents:
        target = getattr(target, parent)
    setattr(target, last, value)
    return from_pb, message


@pytest.mark.parametrize(
    ("case", "path", "value", "said"),
    [
        ("key", "run", "../etc", "key.run: '../etc' is not a name"),
        ("key", "run", "", "key.run"),
        ("ref", "digest", "AB" * 32, "ref.digest"),
        ("ref", "digest", "../../x", "ref.digest: '../../x' is not a sha256 digest"),
        ("unit", "part", 9, "unit.part: unknown value 9"),
        ("unit", "layer", 4096, "unit.layer"),
        ("probe spec", "kernel", "cubic", "probe.kernel: unknown value 'cubic' (known: linear, rbf)"),
        ("probe spec", "sample", "x", "probe.sample"),
        ("probe spec", "part", 9, "probe.part: unknown value 9"),
        ("train spec", "learning_rate", float("nan"), "train.learning_rate: nan is not finite"),
        ("train spec", "alpha", float("inf"), "train.alpha"),
        ("train spec", "dropout", float("nan"), "train.dropout"),
        ("train spec", "gradient", "magic", "train.gradient: unknown value 'magic'"),
        ("train spec", "estimator", "", "train.estimator"),
        ("train spec", "start", "cold", "train.start"),
        ("train spec", "train", "C", "train.train"),
        ("train spec", "upload", "C", "train.upload"),
        ("run spec", "fingerprint", "zz", "spec.fingerprint"),
        ("run spec", "run", "A", "spec.run"),
        ("run spec", "part", 9, "spec.part: unknown value 9"),
        ("plan", "run", "A B", "plan.run"),
        ("assignment", "key.run", "", "key.run"),
        ("assignment", "spec.start", "x", "train.start"),
        ("assignment", "micro_batch", 0, "assignment.micro_batch: 0 must be at least 1"),
        ("progress", "key.run", "/", "key.run"),
        ("failed", "key.run", "/", "key.run"),
    ],
)
def test_a_malformed_field_is_named(case, path, value, said):
    from_pb, message = changed(case, path, value)
    with pytest.raises(ProtocolError) as caught:
        from_pb(message)
    assert said in str(caught.value)


def test_sizes_and_orders_that_cannot_be():
    plan = serde.plan_report_to_pb(CASES["plan"][2])
    plan.unit_bytes.extend([1] * 5000)
    probe = session_pb2.ProbeReport(key=serde.key_to_pb(KEY), units=2, similarity=[1.0] * 3, in_out=[1.0] * 2)
    nan = session_pb2.ProbeReport(key=serde.key_to_pb(KEY), units=1, similarity=[float("nan")], in_out=[1.0])
    huge = session_pb2.ProbeReport(key=serde.key_to_pb(KEY), units=2**32 - 1)
    empty = session_pb2.Assignment(key=serde.key_to_pb(KEY))
    twice = serde.assignment_to_pb(CASES["assignment"][2])
    twice.units.append(types_pb2.UnitId(layer=0))
    crowded, chancy = (serde.assignment_to_pb(CASES["assignment"][2]) for _ in range(2))
    for group in crowded.groups:
        group.units.extend([types_pb2.UnitId(layer=9)] * 2048)
    for group in chancy.groups:
        group.probabilities.extend([0.5] * 2048)
    for decode, message, said in [
        (serde.plan_report_from_pb, plan, "plan: more units"), (serde.probe_report_from_pb, probe, "probe.similarity"),
        (serde.probe_report_from_pb, nan, "probe.similarity: has NaN"), (serde.probe_report_from_pb, huge, "probe.similarity"),
        (serde.assignment_from_pb, empty, "assignment.units"), (serde.assignment_from_pb, twice, "assignment.units"),
        (serde.assignment_from_pb, crowded, "assignment.groups: more units"),
        (serde.assignment_from_pb, chancy, "assignment.groups: more units or probabilities"),
    ]:  # fmt: skip
        with pytest.raises(ProtocolError, match=said):
            decode(message)


def test_every_unit_of_the_largest_model_may_be_in_a_group():
    groups = tuple((t.UnitId(layer),) for layer in range(serde.MAX_UNITS))
    largest = replace(CASES["assignment"][2], groups=groups, probabilities=((1.0,),) * len(groups))
    assert serde.assignment_from_pb(serde.assignment_to_pb(largest)) == largest


def test_long_texts_are_cut():
    message = session_pb2.TaskFailed(key=serde.key_to_pb(KEY), error="x" * 999, message="y" * 99_999)
    failed = serde.failed_from_pb(message)
    assert len(failed.error) == 64 and len(failed.message) == 4096
    assert len(serde.progress_from_pb(session_pb2.Progress(key=serde.key_to_pb(KEY), phase="z" * 99)).phase) == 16


def test_the_schema_is_stable_within_a_build():
    assert serde.schema() == serde.schema() and len(serde.schema()) == 64
