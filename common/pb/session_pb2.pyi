from common.pb import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeviceMessage(_message.Message):
    __slots__ = ("hello", "plan", "probe", "progress", "failed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    plan: PlanReport
    probe: ProbeReport
    progress: Progress
    failed: TaskFailed
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., plan: _Optional[_Union[PlanReport, _Mapping]] = ..., probe: _Optional[_Union[ProbeReport, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., failed: _Optional[_Union[TaskFailed, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "plan", "probe", "assignment", "cancel", "ended")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    plan: PlanRequest
    probe: ProbeTask
    assignment: Assignment
    cancel: Cancel
    ended: RunEnded
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., plan: _Optional[_Union[PlanRequest, _Mapping]] = ..., probe: _Optional[_Union[ProbeTask, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ended: _Optional[_Union[RunEnded, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("schema", "version")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    schema: str
    version: str
    def __init__(self, schema: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("device", "version")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    device: str
    version: str
    def __init__(self, device: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: _types_pb2.RunSpec
    def __init__(self, spec: _Optional[_Union[_types_pb2.RunSpec, _Mapping]] = ...) -> None: ...

class Capacity(_message.Message):
    __slots__ = ("gradient", "units", "micro_batch", "checkpointing", "peak_bytes", "step_seconds")
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    gradient: str
    units: int
    micro_batch: int
    checkpointing: bool
    peak_bytes: int
    step_seconds: float
    def __init__(self, gradient: _Optional[str] = ..., units: _Optional[int] = ..., micro_batch: _Optional[int] = ..., checkpointing: _Optional[bool] = ..., peak_bytes: _Optional[int] = ..., step_seconds: _Optional[float] = ...) -> None: ...

class PlanReport(_message.Message):
    __slots__ = ("run", "samples", "fingerprint", "capacities", "unit_bytes", "smallest_budget", "refusal", "budget_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CAPACITIES_FIELD_NUMBER: _ClassVar[int]
    UNIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SMALLEST_BUDGET_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    samples: int
    fingerprint: str
    capacities: _containers.RepeatedCompositeFieldContainer[Capacity]
    unit_bytes: _containers.RepeatedScalarFieldContainer[int]
    smallest_budget: int
    refusal: str
    budget_bytes: int
    def __init__(self, run: _Optional[str] = ..., samples: _Optional[int] = ..., fingerprint: _Optional[str] = ..., capacities: _Optional[_Iterable[_Union[Capacity, _Mapping]]] = ..., unit_bytes: _Optional[_Iterable[int]] = ..., smallest_budget: _Optional[int] = ..., refusal: _Optional[str] = ..., budget_bytes: _Optional[int] = ...) -> None: ...

class ProbeTask(_message.Message):
    __slots__ = ("key", "spec", "adapter", "similarity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    spec: _types_pb2.ProbeSpec
    adapter: _containers.RepeatedCompositeFieldContainer[_types_pb2.UnitObject]
    similarity: bool
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., spec: _Optional[_Union[_types_pb2.ProbeSpec, _Mapping]] = ..., adapter: _Optional[_Iterable[_Union[_types_pb2.UnitObject, _Mapping]]] = ..., similarity: _Optional[bool] = ...) -> None: ...

class ProbeReport(_message.Message):
    __slots__ = ("key", "units", "similarity", "in_out", "loss", "tokens", "peak_bytes", "seconds")
    KEY_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    IN_OUT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    units: int
    similarity: _containers.RepeatedScalarFieldContainer[float]
    in_out: _containers.RepeatedScalarFieldContainer[float]
    loss: float
    tokens: int
    peak_bytes: int
    seconds: float
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., units: _Optional[int] = ..., similarity: _Optional[_Iterable[float]] = ..., in_out: _Optional[_Iterable[float]] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("key", "units", "groups", "spec", "adapter", "micro_batch", "checkpointing", "redraws", "reductions")
    KEY_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    REDRAWS_FIELD_NUMBER: _ClassVar[int]
    REDUCTIONS_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    units: _containers.RepeatedCompositeFieldContainer[_types_pb2.UnitId]
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.Group]
    spec: _types_pb2.TrainSpec
    adapter: _containers.RepeatedCompositeFieldContainer[_types_pb2.UnitObject]
    micro_batch: int
    checkpointing: bool
    redraws: int
    reductions: int
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., units: _Optional[_Iterable[_Union[_types_pb2.UnitId, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.Group, _Mapping]]] = ..., spec: _Optional[_Union[_types_pb2.TrainSpec, _Mapping]] = ..., adapter: _Optional[_Iterable[_Union[_types_pb2.UnitObject, _Mapping]]] = ..., micro_batch: _Optional[int] = ..., checkpointing: _Optional[bool] = ..., redraws: _Optional[int] = ..., reductions: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("key", "phase", "done", "total")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    phase: str
    done: int
    total: int
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., phase: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class TaskFailed(_message.Message):
    __slots__ = ("key", "error", "message")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    error: str
    message: str
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., error: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    reason: str
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class RunEnded(_message.Message):
    __slots__ = ("run", "outcome")
    RUN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    run: str
    outcome: str
    def __init__(self, run: _Optional[str] = ..., outcome: _Optional[str] = ...) -> None: ...
