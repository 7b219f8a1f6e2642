"""Domain values <-> protobuf, and nothing else.

Decoding checks what the wire can't express: enumerations, sizes, finite numbers, names. A message that
does not decode raises ProtocolError naming the field.
"""

from __future__ import annotations

import hashlib
import math
import re
from enum import StrEnum
from typing import TypeVar

import numpy as np

from common import types as t
from common.errors import ProtocolError
from common.pb import admin_pb2, enroll_pb2, objects_pb2, session_pb2, types_pb2

MAX_UNITS = 4096
"""More units than any model has; bounds the U x U matrix a device may send."""
MAX_TARGETS = 1024
"""More modules than any layer has."""
TEXT = 512
"""Characters of a name or of a device's refusal, which stands in the log of every round it is left out of."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTS = {
    t.Part.LAYER: types_pb2.PART_LAYER,
    t.Part.ATTENTION: types_pb2.PART_ATTENTION,
    t.Part.FFN: types_pb2.PART_FFN,
}
_PART_OF = {number: part for part, number in _PARTS.items()}

E = TypeVar("E", bound=StrEnum)


def schema() -> str:
    """sha256 of the schema this build speaks; two builds that differ in any field refuse each other."""
    digest = hashlib.sha256()
    for module in (types_pb2, session_pb2, objects_pb2, enroll_pb2, admin_pb2):
        digest.update(module.DESCRIPTOR.serialized_pb)
    return digest.hexdigest()


def _enum(kind: type[E], value: str, field: str) -> E:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ProtocolError(f"{field}: unknown value {value[:60]!r} (known: {known})") from None


def _name(value: str, field: str) -> str:
    if t.NAME.fullmatch(value) is None:
        raise ProtocolError(f"{field}: {value[:80]!r} is not a name (a-z, 0-9, '.', '_', '-'; at most 63)")
    return value


def run_name(value: str, field: str) -> str:
    """A run's name where it stands alone in a message: it becomes a file's name."""
    return _name(value, field)


def _text(value: str, field: str) -> str:
    if len(value) > TEXT:
        raise ProtocolError(f"{field}: {len(value)} characters, at most {TEXT} are read")
    return value


def _digest(value: str, field: str) -> str:
    if _DIGEST.fullmatch(value) is None:
        raise ProtocolError(f"{field}: {value[:80]!r} is not a sha256 digest")
    return value


def _finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise ProtocolError(f"{field}: {value} is not finite")
    return value


def _positive(value: int, field: str) -> int:
    if value < 1:
        raise ProtocolError(f"{field}: {value} must be at least 1")
    return value


def _part(value: types_pb2.Part, field: str) -> t.Part:
    if value not in _PART_OF:
        raise ProtocolError(f"{field}: unknown value {value}")
    return _PART_OF[value]


def unit_to_pb(unit: t.UnitId) -> types_pb2.UnitId:
    """UnitId -> message."""
    return types_pb2.UnitId(layer=unit.layer, part=_PARTS[unit.part])


def unit_from_pb(message: types_pb2.UnitId) -> t.UnitId:
    """Message -> UnitId."""
    if message.layer >= MAX_UNITS:
        raise ProtocolError(f"unit.layer: {message.layer} is more than any model has")
    return t.UnitId(message.layer, _part(message.part, "unit.part"))


def key_to_pb(key: t.TaskKey) -> types_pb2.TaskKey:
    """TaskKey -> message."""
    return types_pb2.TaskKey(run=key.run, round=key.round, attempt=key.attempt)


def key_from_pb(message: types_pb2.TaskKey) -> t.TaskKey:
    """Message -> TaskKey."""
    return t.TaskKey(_name(message.run, "key.run"), message.round, message.attempt)


def ref_to_pb(ref: t.ObjectRef) -> types_pb2.ObjectRef:
    """ObjectRef -> message."""
    return types_pb2.ObjectRef(digest=ref.digest, size=ref.size)


def ref_from_pb(message: types_pb2.ObjectRef) -> t.ObjectRef:
    """Message -> ObjectRef."""
    return t.ObjectRef(_digest(message.digest, "ref.digest"), message.size)


def _adapter_to_pb(adapter: tuple[t.UnitObject, ...]) -> list[types_pb2.UnitObject]:
    return [types_pb2.UnitObject(layer=o.layer, ref=ref_to_pb(o.ref)) for o in adapter]


def _adapter_from_pb(messages: list[types_pb2.UnitObject]) -> tuple[t.UnitObject, ...]:
    if len(messages) > MAX_UNITS:
        raise ProtocolError(f"adapter: {len(messages)} objects is more than any model has layers")
    if len({m.layer for m in messages}) < len(messages) or any(m.layer >= MAX_UNITS for m in messages):
        raise ProtocolError("adapter: two objects of one layer, or one of a layer no model has")
    return tuple(t.UnitObject(m.layer, ref_from_pb(m.ref)) for m in messages)


def probe_spec_to_pb(spec: t.ProbeSpec) -> types_pb2.ProbeSpec:
    """ProbeSpec -> message."""
    return types_pb2.ProbeSpec(
        part=_PARTS[spec.part], positions=spec.positions, kernel=spec.kernel, sample=spec.sample,
        batch_size=spec.batch_size, sequence_length=spec.sequence_length, seed=spec.seed,
    )  # fmt: skip


def probe_spec_from_pb(m: types_pb2.ProbeSpec) -> t.ProbeSpec:
    """Message -> ProbeSpec."""
    return t.ProbeSpec(
        part=_part(m.part, "probe.part"),
        positions=m.positions,
        kernel=_enum(t.Kernel, m.kernel, "probe.kernel"),
        sample=_enum(t.Positions, m.sample, "probe.sample"),
        batch_size=m.batch_size,
        sequence_length=m.sequence_length,
        seed=m.seed,
    )


def train_spec_to_pb(spec: t.TrainSpec) -> types_pb2.TrainSpec:
    """TrainSpec -> message."""
    return types_pb2.TrainSpec(
        steps=spec.steps, batch_size=spec.batch_size, sequence_length=spec.sequence_length,
        learning_rate=spec.learning_rate, rank=spec.rank, alpha=spec.alpha, targets=spec.targets,
        seed=spec.seed, dropout=spec.dropout, gradient=spec.gradient, estimator=spec.estimator,
        start=spec.start, train=spec.train, upload=spec.upload, fidelity=spec.fidelity,
    )  # fmt: skip


def train_spec_from_pb(m: types_pb2.TrainSpec) -> t.TrainSpec:
    """Message -> TrainSpec."""
    if len(m.targets) > MAX_TARGETS:
        raise ProtocolError(f"train.targets: {len(m.targets)} modules is more than any layer has")
    return t.TrainSpec(
        steps=m.steps,
        batch_size=m.batch_size,
        sequence_length=m.sequence_length,
        learning_rate=_finite(m.learning_rate, "train.learning_rate"),
        rank=m.rank,
        alpha=_finite(m.alpha, "train.alpha"),
        targets=tuple(_text(name, "train.targets") for name in m.targets),
        seed=m.seed,
        dropout=_finite(m.dropout, "train.dropout"),
        gradient=_enum(t.Gradient, m.gradient, "train.gradient"),
        estimator=_enum(t.Estimator, m.estimator, "train.estimator"),
        start=_enum(t.Start, m.start, "train.start"),
        train=_enum(t.Factors, m.train, "train.train"),
        upload=_enum(t.Factors, m.upload, "train.upload"),
        fidelity=m.fidelity,
    )


def run_spec_to_pb(spec: t.RunSpec) -> types_pb2.RunSpec:
    """RunSpec -> message."""
    return types_pb2.RunSpec(
        run=spec.run, model=spec.model, fingerprint=spec.fingerprint, method=spec.method, part=_PARTS[spec.part],
        train=train_spec_to_pb(spec.train), probe=probe_spec_to_pb(spec.probe),
        broadcast_rank=spec.broadcast_rank, rounds=spec.rounds, step_seconds=spec.step_seconds,
        update_bytes=spec.update_bytes, similarity=spec.similarity,
    )  # fmt: skip


def run_spec_from_pb(m: types_pb2.RunSpec) -> t.RunSpec:
    """Message -> RunSpec."""
    return t.RunSpec(
        run=_name(m.run, "spec.run"),
        model=_text(m.model, "spec.model"),
        fingerprint=_digest(m.fingerprint, "spec.fingerprint"),
        method=_text(m.method, "spec.method"),
        part=_part(m.part, "spec.part"),
        train=train_spec_from_pb(m.train),
        probe=probe_spec_from_pb(m.probe),
        broadcast_rank=m.broadcast_rank,
        rounds=m.rounds,
        step_seconds=_finite(m.step_seconds, "spec.step_seconds"),
        update_bytes=m.update_bytes,
        similarity=m.similarity,
    )


def plan_report_to_pb(report: t.PlanReport) -> session_pb2.PlanReport:
    """PlanReport -> message."""
    return session_pb2.PlanReport(
        run=report.run, samples=report.samples, fingerprint=report.fingerprint,
        capacities=[
            session_pb2.Capacity(gradient=c.gradient, units=c.units, micro_batch=c.micro_batch,
                                 checkpointing=c.checkpointing, peak_bytes=c.peak_bytes, step_seconds=c.step_seconds)
            for c in report.capacities
        ],
        unit_bytes=report.unit_bytes, smallest_budget=report.smallest_budget, refusal=report.refusal,
        budget_bytes=report.budget_bytes,
    )  # fmt: skip


def plan_report_from_pb(m: session_pb2.PlanReport) -> t.PlanReport:
    """Message -> PlanReport."""
    if len(m.unit_bytes) > MAX_UNITS or len(m.capacities) > len(t.Gradient):
        raise ProtocolError("plan: more units or capacities than there can be")
    return t.PlanReport(
        run=_name(m.run, "plan.run"),
        samples=m.samples,
        fingerprint=m.fingerprint[:64],
        capacities=tuple(
            t.Capacity(
                _enum(t.Gradient, c.gradient, "plan.gradient"),
                c.units,
                c.micro_batch,
                c.checkpointing,
                c.peak_bytes,
                _finite(c.step_seconds, "plan.step_seconds"),
            )
            for c in m.capacities
        ),
        unit_bytes=tuple(m.unit_bytes),
        smallest_budget=m.smallest_budget,
        refusal=m.refusal[:TEXT],
        budget_bytes=m.budget_bytes,
    )


def probe_task_to_pb(task: t.ProbeTask) -> session_pb2.ProbeTask:
    """ProbeTask -> message."""
    return session_pb2.ProbeTask(
        key=key_to_pb(task.key),
        spec=probe_spec_to_pb(task.spec),
        adapter=_adapter_to_pb(task.adapter),
        similarity=task.similarity,
    )


def probe_task_from_pb(m: session_pb2.ProbeTask) -> t.ProbeTask:
    """Message -> ProbeTask."""
    return t.ProbeTask(key_from_pb(m.key), probe_spec_from_pb(m.spec), _adapter_from_pb(list(m.adapter)), m.similarity)


def probe_report_to_pb(report: t.ProbeReport) -> session_pb2.ProbeReport:
    """ProbeReport -> message."""
    return session_pb2.ProbeReport(
        key=key_to_pb(report.key), units=report.similarity.shape[0],
        similarity=report.similarity.reshape(-1).tolist(), in_out=report.in_out.tolist(), loss=report.loss,
        tokens=report.tokens, peak_bytes=report.peak_bytes, seconds=report.seconds,
    )  # fmt: skip


def probe_report_from_pb(m: session_pb2.ProbeReport) -> t.ProbeReport:
    """Message -> ProbeReport."""
    units = m.units
    if units > MAX_UNITS or len(m.similarity) != units * units or len(m.in_out) != units:
        raise ProtocolError(f"probe.similarity: {len(m.similarity)} values and {len(m.in_out)} in_out for {units} units")
    similarity = np.array(m.similarity, np.float32).reshape(units, units)
    in_out = np.array(m.in_out, np.float32)
    if not (np.isfinite(similarity).all() and np.isfinite(in_out).all()):
        raise ProtocolError("probe.similarity: has NaN or infinite values")
    return t.ProbeReport(
        key_from_pb(m.key), similarity, in_out, _finite(m.loss, "probe.loss"), m.tokens, m.peak_bytes,
        _finite(m.seconds, "probe.seconds"),
    )  # fmt: skip


def assignment_to_pb(a: t.Assignment) -> session_pb2.Assignment:
    """Assignment -> message."""
    return session_pb2.Assignment(
        key=key_to_pb(a.key),
        units=[unit_to_pb(u) for u in a.units],
        groups=[
            types_pb2.Group(units=[unit_to_pb(u) for u in group], probabilities=probabilities)
            for group, probabilities in zip(a.groups, a.probabilities, strict=True)
        ],
        spec=train_spec_to_pb(a.spec),
        adapter=_adapter_to_pb(a.adapter),
        micro_batch=a.micro_batch,
        checkpointing=a.checkpointing,
        redraws=a.redraws,
        reductions=a.reductions,
    )


def assignment_from_pb(m: session_pb2.Assignment) -> t.Assignment:
    """Message -> Assignment."""
    if len(m.units) > MAX_UNITS or len(m.groups) > MAX_UNITS:
        raise ProtocolError("assignment: more units or groups than any model has")
    # No unit is in two groups. Empty groups hold nothing, and their number is bounded.
    if sum(len(g.units) for g in m.groups) > MAX_UNITS or sum(len(g.probabilities) for g in m.groups) > MAX_UNITS:
        raise ProtocolError("assignment.groups: more units or probabilities than any model has units")
    units = tuple(unit_from_pb(u) for u in m.units)
    if not units or list(units) != sorted(set(units)):
        raise ProtocolError("assignment.units: must be at least one, in model order, without repeats")
    return t.Assignment(
        key=key_from_pb(m.key),
        units=units,
        groups=tuple(tuple(unit_from_pb(u) for u in g.units) for g in m.groups),
        probabilities=tuple(tuple(g.probabilities) for g in m.groups),
        spec=train_spec_from_pb(m.spec),
        adapter=_adapter_from_pb(list(m.adapter)),
        micro_batch=_positive(m.micro_batch, "assignment.micro_batch"),
        checkpointing=m.checkpointing,
        redraws=m.redraws,
        reductions=m.reductions,
    )


def progress_to_pb(p: t.Progress) -> session_pb2.Progress:
    """Progress -> message."""
    return session_pb2.Progress(key=key_to_pb(p.key), phase=p.phase, done=p.done, total=p.total)


def progress_from_pb(m: session_pb2.Progress) -> t.Progress:
    """Message -> Progress."""
    return t.Progress(key_from_pb(m.key), m.phase[:16], m.done, m.total)


def failed_to_pb(f: t.TaskFailed) -> session_pb2.TaskFailed:
    """TaskFailed -> message."""
    return session_pb2.TaskFailed(key=key_to_pb(f.key), error=f.error, message=f.message)


def failed_from_pb(m: session_pb2.TaskFailed) -> t.TaskFailed:
    """Message -> TaskFailed."""
    return t.TaskFailed(key_from_pb(m.key), m.error[:64], m.message[:4096])


def ready_to_pb(ready: t.UpdateReady, offset: int) -> objects_pb2.PushHeader:
    """UpdateReady -> the header of a push that goes on from `offset`."""
    x = ready.metrics
    return objects_pb2.PushHeader(
        key=key_to_pb(ready.key), ref=ref_to_pb(ready.ref), offset=offset,
        metrics=objects_pb2.UpdateMetrics(
            loss_first=x.loss_first, loss_last=x.loss_last, tokens_per_second=x.tokens_per_second,
            predicted_peak_bytes=x.predicted_peak_bytes, measured_peak_bytes=x.measured_peak_bytes, seconds=x.seconds,
            predicted_step_seconds=x.predicted_step_seconds, step_seconds=x.step_seconds, fidelity=x.fidelity,
            unit_fidelity=x.unit_fidelity,
        ),
    )  # fmt: skip


def ready_from_pb(m: objects_pb2.PushHeader) -> t.UpdateReady:
    """The header of a push -> UpdateReady."""
    x = m.metrics
    metrics = t.UpdateMetrics(
        _finite(x.loss_first, "metrics.loss_first") if x.HasField("loss_first") else None,
        _finite(x.loss_last, "metrics.loss_last") if x.HasField("loss_last") else None,
        _finite(x.tokens_per_second, "metrics.tokens_per_second"), x.predicted_peak_bytes, x.measured_peak_bytes,
        _finite(x.seconds, "metrics.seconds"), _finite(x.predicted_step_seconds, "metrics.predicted_step_seconds"),
        _finite(x.step_seconds, "metrics.step_seconds"),
        _finite(x.fidelity, "metrics.fidelity") if x.HasField("fidelity") else None,
        tuple(_finite(value, "metrics.unit_fidelity") for value in x.unit_fidelity[: 2 * MAX_UNITS]),
    )  # fmt: skip
    return t.UpdateReady(key_from_pb(m.key), ref_from_pb(m.ref), metrics)
