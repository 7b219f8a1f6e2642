from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetCaRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCaReply(_message.Message):
    __slots__ = ("ca_pem",)
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    ca_pem: str
    def __init__(self, ca_pem: _Optional[str] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("secret", "csr_pem", "role")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    secret: str
    csr_pem: str
    role: str
    def __init__(self, secret: _Optional[str] = ..., csr_pem: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("certificate_pem", "name", "role")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: str
    name: str
    role: str
    def __init__(self, certificate_pem: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr_pem",)
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    csr_pem: str
    def __init__(self, csr_pem: _Optional[str] = ...) -> None: ...
