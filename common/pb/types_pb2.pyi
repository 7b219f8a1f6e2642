from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Part(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PART_LAYER: _ClassVar[Part]
    PART_ATTENTION: _ClassVar[Part]
    PART_FFN: _ClassVar[Part]
PART_LAYER: Part
PART_ATTENTION: Part
PART_FFN: Part

class UnitId(_message.Message):
    __slots__ = ("layer", "part")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    layer: int
    part: Part
    def __init__(self, layer: _Optional[int] = ..., part: _Optional[_Union[Part, str]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("units", "probabilities")
    UNITS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    units: _containers.RepeatedCompositeFieldContainer[UnitId]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, units: _Optional[_Iterable[_Union[UnitId, _Mapping]]] = ..., probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class ObjectRef(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class UnitObject(_message.Message):
    __slots__ = ("layer", "ref")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    REF_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ref: ObjectRef
    def __init__(self, layer: _Optional[int] = ..., ref: _Optional[_Union[ObjectRef, _Mapping]] = ...) -> None: ...

class TaskKey(_message.Message):
    __slots__ = ("run", "round", "attempt")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class ProbeSpec(_message.Message):
    __slots__ = ("part", "positions", "kernel", "sample", "batch_size", "sequence_length", "seed")
    PART_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    part: Part
    positions: int
    kernel: str
    sample: str
    batch_size: int
    sequence_length: int
    seed: int
    def __init__(self, part: _Optional[_Union[Part, str]] = ..., positions: _Optional[int] = ..., kernel: _Optional[str] = ..., sample: _Optional[str] = ..., batch_size: _Optional[int] = ..., sequence_length: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class TrainSpec(_message.Message):
    __slots__ = ("steps", "batch_size", "sequence_length", "learning_rate", "rank", "alpha", "targets", "seed", "dropout", "gradient", "estimator", "start", "train", "upload", "fidelity")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    seed: int
    dropout: float
    gradient: str
    estimator: str
    start: str
    train: str
    upload: str
    fidelity: bool
    def __init__(self, steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., sequence_length: _Optional[int] = ..., learning_rate: _Optional[float] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., seed: _Optional[int] = ..., dropout: _Optional[float] = ..., gradient: _Optional[str] = ..., estimator: _Optional[str] = ..., start: _Optional[str] = ..., train: _Optional[str] = ..., upload: _Optional[str] = ..., fidelity: _Optional[bool] = ...) -> None: ...

class RunSpec(_message.Message):
    __slots__ = ("run", "model", "fingerprint", "method", "part", "train", "probe", "broadcast_rank", "rounds", "step_seconds", "update_bytes", "similarity")
    RUN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_RANK_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    run: str
    model: str
    fingerprint: str
    method: str
    part: Part
    train: TrainSpec
    probe: ProbeSpec
    broadcast_rank: int
    rounds: int
    step_seconds: float
    update_bytes: int
    similarity: bool
    def __init__(self, run: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., method: _Optional[str] = ..., part: _Optional[_Union[Part, str]] = ..., train: _Optional[_Union[TrainSpec, _Mapping]] = ..., probe: _Optional[_Union[ProbeSpec, _Mapping]] = ..., broadcast_rank: _Optional[int] = ..., rounds: _Optional[int] = ..., step_seconds: _Optional[float] = ..., update_bytes: _Optional[int] = ..., similarity: _Optional[bool] = ...) -> None: ...
