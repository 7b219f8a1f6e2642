"""A small server for the device's tests: real mTLS gRPC, scripted sessions, objects that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from fake_ca import FakeCa

from common.errors import FedPrunerError, TokenError
from common.pb import enroll_pb2, enroll_pb2_grpc, objects_pb2, objects_pb2_grpc, session_pb2, session_pb2_grpc
from common.token import JoinToken
from common.transport import tls, wire

SECRET = "s" * 43


class FakeEnrollment(enroll_pb2_grpc.EnrollmentServicer):
    def __init__(self, ca: FakeCa, shown_ca: FakeCa) -> None:
        self.ca, self.shown = ca, shown_ca
        self.requests: list[enroll_pb2.EnrollRequest] = []
        self.error: FedPrunerError | None = None
        self.lose_replies = 0
        self.used_by: bytes | None = None

    async def GetCa(self, request, context):  # noqa: N802
        return enroll_pb2.GetCaReply(ca_pem=self.shown.pem.decode())

    async def Enroll(self, request, context):  # noqa: N802
        self.requests.append(request)
        key = x509.load_pem_x509_csr(request.csr_pem.encode()).public_key()
        raw = key.public_bytes(tls.serialization.Encoding.DER, tls.serialization.PublicFormat.SubjectPublicKeyInfo)
        if self.error or request.secret != SECRET or self.used_by not in (None, raw):
            await wire.abort(context, self.error or TokenError("token unknown, used or expired"))
        self.used_by = raw
        if self.lose_replies:
            self.lose_replies -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        return enroll_pb2.EnrollReply(certificate_pem=self.ca.device("alice", key).decode(), name="alice", role="device")


class FakeRenewal(enroll_pb2_grpc.RenewalServicer):
    """`issue`: the certificate (PEM) for a caller and its key; `errors` are what it answers first."""

    def __init__(self, ca: FakeCa) -> None:
        self.issue = lambda peer, key: ca.device(peer.name, key)
        self.errors: list[FedPrunerError] = []
        self.asked: list[tls.Peer] = []

    async def Renew(self, request, context):  # noqa: N802
        peer = tls.peer_of(context.auth_context())
        self.asked.append(peer)
        if self.errors:
            await wire.abort(context, self.errors.pop(0))
        key = x509.load_pem_x509_csr(request.csr_pem.encode()).public_key()
        return enroll_pb2.EnrollReply(certificate_pem=self.issue(peer, key).decode(), name=peer.name, role=peer.role)


class FakeSessions(session_pb2_grpc.SessionsServicer):
    """Every session is announced in `opened`; what the device says is in `said`, what to tell it goes into `tell`."""

    def __init__(self) -> None:
        self.opened = self.live = 0
        self.said: asyncio.Queue[Any] = asyncio.Queue()
        self.tell: asyncio.Queue[Any] = asyncio.Queue()
        self.refuse: FedPrunerError | None = None
        self.schemas: list[str] = []
        self.serials: list[str] = []

    async def Open(self, requests, context):  # noqa: N802
        hello = await anext(aiter(requests))
        self.schemas.append(hello.hello.schema)
        if self.refuse:
            await wire.abort(context, self.refuse)
        self.opened += 1
        peer = tls.peer_of(context.auth_context())
        self.serials.append(peer.serial)
        yield session_pb2.ServerMessage(welcome=session_pb2.Welcome(device=peer.name, version="fake"))

        async def listen() -> None:
            async for message in requests:
                await self.said.put(message)

        self.live += 1
        listening = asyncio.create_task(listen())
        telling = asyncio.create_task(self.tell.get())
        try:
            while True:
                await asyncio.wait({listening, telling}, return_when=asyncio.FIRST_COMPLETED)
                if not telling.done() or (message := telling.result()) is None:
                    return
                if message == "cut":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                if isinstance(message, FedPrunerError):
                    await wire.abort(context, message)
                yield message
                telling = asyncio.create_task(self.tell.get())
        finally:
            listening.cancel()
            telling.cancel()
            self.live -= 1

    async def next(self, kind: str, skip: tuple[str, ...] = ("progress",)) -> Any:
        """The next message that is not of `skip`; it must be of `kind`."""
        async with asyncio.timeout(180):  # a worker's answer may take that long on a busy machine
            while True:
                message = await self.said.get()
                body = message.WhichOneof("body")
                if body not in skip or body == kind:
                    assert body == kind, message
                    return getattr(message, kind)


class FakeObjects(objects_pb2_grpc.ObjectsServicer):
    """`cuts`: after that many bytes in all, a transfer is cut, once each."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.offsets: list[int] = []
        self.cuts: list[int] = []
        self.received = bytearray()
        self.bytes_in = 0
        self.pushes = 0
        self.accepted: dict[str, bytes] = {}
        self.metrics: list[objects_pb2.UpdateMetrics] = []
        self.error: FedPrunerError | None = None
        self.fetch_errors: list[FedPrunerError] = []
        self.push_errors: list[FedPrunerError] = []
        self.lose_replies = 0
        self.forgets = self.empty = False
        """Hostile: takes a whole update and wants it again; sends pieces of nothing, without end."""

    def put(self, data: bytes) -> Any:
        from common.types import ObjectRef

        digest = hashlib.sha256(data).hexdigest()
        self.objects[digest] = data
        return ObjectRef(digest, len(data))

    async def Fetch(self, request, context):  # noqa: N802
        self.offsets.append(request.offset)
        if self.fetch_errors:
            await wire.abort(context, self.fetch_errors.pop(0))
        while self.empty:
            yield objects_pb2.Chunk()
        data = self.objects[request.digest]
        end = self.cuts.pop(0) if self.cuts else len(data)
        for start in range(request.offset, end, wire.CHUNK):
            yield objects_pb2.Chunk(data=data[start : min(start + wire.CHUNK, end)])
        if end < len(data):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def Offset(self, request, context):  # noqa: N802
        if self.error:
            await wire.abort(context, self.error)
        if request.ref.digest in self.accepted:
            return objects_pb2.OffsetReply(accepted=True)
        return objects_pb2.OffsetReply(offset=len(self.received))

    async def Push(self, requests, context):  # noqa: N802
        self.pushes += 1
        if self.push_errors:
            error = self.push_errors.pop(0)
            async for _ in requests:  # an answer in the middle of a write would be hidden
                pass
            await wire.abort(context, error)
        header = None
        cut = self.cuts.pop(0) if self.cuts else None
        async for message in requests:
            if message.WhichOneof("body") == "header":
                header = message.header
                assert header.offset == len(self.received)
                self.offsets.append(header.offset)
                continue
            data = message.chunk.data
            assert len(data) <= wire.CHUNK
            self.bytes_in += len(data)
            self.received += data if cut is None else data[: max(0, cut - len(self.received))]
            if cut is not None and len(self.received) >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        assert hashlib.sha256(self.received).hexdigest() == header.ref.digest
        if self.forgets:
            self.received.clear()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        self.accepted[header.ref.digest] = bytes(self.received)
        self.metrics.append(header.metrics)
        self.received.clear()
        if self.lose_replies:
            self.lose_replies -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        return objects_pb2.PushReply()


class Raw(grpc.aio.ServerInterceptor):
    """A servicer may answer bytes: they go out as they are, whether or not they are a message."""

    async def intercept_service(self, continuation, details):
        if (handler := await continuation(details)) is None:
            return None  # no such method here
        encode = handler.response_serializer
        return handler._replace(response_serializer=lambda m: m if isinstance(m, bytes) else encode(m))


class FakeServer:
    def __init__(self, ca: FakeCa, shown_ca: FakeCa | None = None) -> None:
        self.ca = ca
        self.enrollment = FakeEnrollment(ca, shown_ca or ca)
        self.sessions, self.objects, self.renewal = FakeSessions(), FakeObjects(), FakeRenewal(ca)
        self.port = self.enroll_port = 0
        self._server: Any = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def token(self, **changes: str) -> str:
        values = {"enroll": f"localhost:{self.enroll_port}", "server": self.address, "ca": self.ca.digest, "secret": SECRET}
        return JoinToken(**{**values, **changes}).encode()

    async def start(self) -> None:
        certificate, key = self.ca.server()
        self._server = grpc.aio.server(interceptors=[Raw()], options=wire.options(wire.SERVER_OPTIONS))
        enroll_pb2_grpc.add_EnrollmentServicer_to_server(self.enrollment, self._server)
        session_pb2_grpc.add_SessionsServicer_to_server(self.sessions, self._server)
        objects_pb2_grpc.add_ObjectsServicer_to_server(self.objects, self._server)
        enroll_pb2_grpc.add_RenewalServicer_to_server(self.renewal, self._server)
        mutual = grpc.ssl_server_credentials([(key, certificate)], self.ca.pem, require_client_auth=True)
        self.port = self._server.add_secure_port(f"localhost:{self.port}", mutual)
        self.enroll_port = self._server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)]))
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)


@contextlib.asynccontextmanager
async def serving(ca: FakeCa | None = None, shown_ca: FakeCa | None = None) -> AsyncIterator[FakeServer]:
    server = FakeServer(ca or FakeCa.make(), shown_ca)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
