from common.pb import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class OffsetRequest(_message.Message):
    __slots__ = ("key", "ref")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REF_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    ref: _types_pb2.ObjectRef
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., ref: _Optional[_Union[_types_pb2.ObjectRef, _Mapping]] = ...) -> None: ...

class OffsetReply(_message.Message):
    __slots__ = ("offset", "accepted")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    offset: int
    accepted: bool
    def __init__(self, offset: _Optional[int] = ..., accepted: _Optional[bool] = ...) -> None: ...

class UpdateMetrics(_message.Message):
    __slots__ = ("loss_first", "loss_last", "tokens_per_second", "predicted_peak_bytes", "measured_peak_bytes", "seconds", "predicted_step_seconds", "step_seconds", "fidelity", "unit_fidelity")
    LOSS_FIRST_FIELD_NUMBER: _ClassVar[int]
    LOSS_LAST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIDELITY_FIELD_NUMBER: _ClassVar[int]
    loss_first: float
    loss_last: float
    tokens_per_second: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    seconds: float
    predicted_step_seconds: float
    step_seconds: float
    fidelity: float
    unit_fidelity: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, loss_first: _Optional[float] = ..., loss_last: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., predicted_peak_bytes: _Optional[int] = ..., measured_peak_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., predicted_step_seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., fidelity: _Optional[float] = ..., unit_fidelity: _Optional[_Iterable[float]] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("key", "ref", "offset", "metrics")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REF_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.TaskKey
    ref: _types_pb2.ObjectRef
    offset: int
    metrics: UpdateMetrics
    def __init__(self, key: _Optional[_Union[_types_pb2.TaskKey, _Mapping]] = ..., ref: _Optional[_Union[_types_pb2.ObjectRef, _Mapping]] = ..., offset: _Optional[int] = ..., metrics: _Optional[_Union[UpdateMetrics, _Mapping]] = ...) -> None: ...

class PushMessage(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    chunk: Chunk
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("duplicate",)
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    duplicate: bool
    def __init__(self, duplicate: _Optional[bool] = ...) -> None: ...
