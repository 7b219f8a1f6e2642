"""Every error this project raises on purpose, and what it becomes outside the process.

The tree::

    FedPrunerError                    exit 1   INTERNAL
    ├── ConfigError                   exit 2   INVALID_ARGUMENT     a file or flag the person wrote
    ├── ModelError                    exit 3   FAILED_PRECONDITION  missing or damaged checkpoint
    │   ├── UnknownFamilyError        exit 3   FAILED_PRECONDITION  a model family we do not stream
    │   └── FingerprintError          exit 3   FAILED_PRECONDITION  other base weights than the run's
    ├── DataError                     exit 4   FAILED_PRECONDITION  training data that can't be used
    ├── BudgetError                   exit 5   RESOURCE_EXHAUSTED   memory budget too small
    ├── IdentityError                 exit 6   PERMISSION_DENIED    certificates and roles
    │   └── TokenError                exit 6   PERMISSION_DENIED    join tokens
    ├── UnreachableError              exit 7   UNAVAILABLE          the other side does not answer
    ├── ProtocolError                 exit 8   FAILED_PRECONDITION  other schema, unexpected message
    │   ├── UpdateRejected            exit 8   INVALID_ARGUMENT     an upload that fails its assignment
    │   ├── AlreadyDone               exit 8   ALREADY_EXISTS       a second, different upload
    │   ├── TooLate                   exit 8   FAILED_PRECONDITION  the round has moved on
    │   ├── OffsetError               exit 8   ABORTED              a push that begins at another byte than is expected
    │   └── DigestError               exit 8   DATA_LOSS            bytes that are not what they claim
    ├── NotFound                      exit 9   NOT_FOUND            a run, object or device unknown here
    ├── PolicyError                   exit 10  PERMISSION_DENIED    the device's policy file says no
    ├── StorageError                  exit 11  RESOURCE_EXHAUSTED   disk full, or the directory can't be used
    │   └── DamagedError              exit 11  DATA_LOSS            stored bytes are not what was written
    ├── InUseError                    exit 12  FAILED_PRECONDITION  port or data directory taken
    ├── WorkerError                   exit 13  ABORTED              a task's process died or failed
    └── LimitError                    exit 14  RESOURCE_EXHAUSTED   more than the other side allows; later it may do

Domain code raises; only command lines exit. A message says what is wrong, where, and what to do.
Exit code 2 is also what the command-line parser uses for a wrong flag.
"""

from __future__ import annotations


class FedPrunerError(Exception):
    """Base of every error raised on purpose. `exit_code` and `status` are stable."""

    exit_code: int = 1
    status: str = "INTERNAL"


class ConfigError(FedPrunerError):
    """A configuration file or flag is wrong; the message names file and key."""

    exit_code = 2
    status = "INVALID_ARGUMENT"


class ModelError(FedPrunerError):
    """A checkpoint is missing, incomplete or damaged."""

    exit_code = 3
    status = "FAILED_PRECONDITION"


class UnknownFamilyError(ModelError):
    """The checkpoint's `model_type` is not one this project knows how to stream."""


class FingerprintError(ModelError):
    """The device's base weights are not the run's."""


class DataError(FedPrunerError):
    """Training data is empty, malformed or does not fit the window; names file and line."""

    exit_code = 4
    status = "FAILED_PRECONDITION"


class BudgetError(FedPrunerError):
    """The memory budget is too small. `smallest` is the least that would do, in bytes."""

    exit_code = 5
    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, smallest: int = 0) -> None:
        super().__init__(message)
        self.smallest = smallest


class IdentityError(FedPrunerError):
    """A certificate is missing, expired, revoked or of the wrong role."""

    exit_code = 6
    status = "PERMISSION_DENIED"


class TokenError(IdentityError):
    """A join token is malformed, unknown, used or expired."""


class UnreachableError(FedPrunerError):
    """The other side does not answer within the bounded retries."""

    exit_code = 7
    status = "UNAVAILABLE"


class ProtocolError(FedPrunerError):
    """The peer speaks another schema, or said something out of place."""

    exit_code = 8
    status = "FAILED_PRECONDITION"


class UpdateRejected(ProtocolError):
    """An uploaded update does not match its assignment; the message names the tensor."""

    status = "INVALID_ARGUMENT"


class AlreadyDone(ProtocolError):
    """A different update was already accepted for this run, round and device."""

    status = "ALREADY_EXISTS"


class TooLate(ProtocolError):
    """The round this belongs to is closed."""


class OffsetError(ProtocolError):
    """A push begins at another byte than the server expects; asking for the offset again mends it."""

    status = "ABORTED"


class DigestError(ProtocolError):
    """Received bytes do not have the digest or length announced."""

    status = "DATA_LOSS"


class NotFound(FedPrunerError):
    """No such run, object or device here, or not for this caller."""

    exit_code = 9
    status = "NOT_FOUND"


class PolicyError(FedPrunerError):
    """The device's own policy file refuses what the server asks."""

    exit_code = 10
    status = "PERMISSION_DENIED"


class StorageError(FedPrunerError):
    """Writing failed (disk full), or a data directory can't be used."""

    exit_code = 11
    status = "RESOURCE_EXHAUSTED"


class DamagedError(StorageError):
    """The event log or a stored object is not what was written; the message names it and says what to do."""

    status = "DATA_LOSS"


class InUseError(FedPrunerError):
    """A port or a data directory is already in use by another process."""

    exit_code = 12
    status = "FAILED_PRECONDITION"


class WorkerError(FedPrunerError):
    """A task's worker process failed or was killed."""

    exit_code = 13
    status = "ABORTED"


class LimitError(FedPrunerError):
    """More calls, bytes, sessions or tokens than the other side allows; the message says which limit."""

    exit_code = 14
    status = "RESOURCE_EXHAUSTED"


def _tree(cls: type[FedPrunerError]) -> list[type[FedPrunerError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _tree(child))]


BY_NAME: dict[str, type[FedPrunerError]] = {cls.__name__: cls for cls in _tree(FedPrunerError)}
"""Class name -> class; the name travels in gRPC trailing metadata and in worker replies."""
