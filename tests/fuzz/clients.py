"""What whoever joins reads, and what a device reads besides its session: certificates, answers about objects, the adapter."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

import grpc
import grpc.aio
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.blocks import write_blocks
from common.errors import FedPrunerError, IdentityError, ModelError, ProtocolError
from common.pb import enroll_pb2, objects_pb2
from common.token import JoinToken
from common.transport import enroll, tls, wire
from common.types import LoraBlock, ObjectRef, UpdateReady
from fp_client.adapter_files import AdapterFiles
from fp_client.messages import AdapterFile
from fp_client.rpc_objects import Transfer
from fp_client.work import check_ranks
from fuzz.base import KEY, METRICS, File, Target, as_seeds, message_of, patched, shared_memory
from fuzz.source import Source

# -- certificates ---------------------------------------------------------------------------------

CA_KEY, DEVICE_KEY = (ec.derive_private_key(n, ec.SECP256R1()) for n in (11, 12))  # the same corpus fits every process
SIGNING = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


def _certificate(key: ec.EllipticCurvePrivateKey, *names: x509.GeneralName) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fuzz")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(5)
    made = made.not_valid_before(datetime(2024, 1, 1, tzinfo=UTC)).not_valid_after(datetime(2124, 1, 1, tzinfo=UTC))
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return made.sign(CA_KEY, hashes.SHA256(), ecdsa_deterministic=True)


CA = _certificate(CA_KEY)
CA_PEM = CA.public_bytes(serialization.Encoding.PEM).decode()
DEVICE = _certificate(DEVICE_KEY, x509.UniformResourceIdentifier("fedpruner://device/alice"))
TOKEN = JoinToken("h:1", "h:2", tls.ca_digest(CA_PEM), "s" * 43)
CA_REPLIES = [enroll_pb2.GetCaReply(ca_pem=CA_PEM)]
REPLIES = [
    enroll_pb2.EnrollReply(certificate_pem=DEVICE.public_bytes(serialization.Encoding.PEM).decode(), name="alice", role="device")
]


def _pem(der: bytes) -> str:
    return "-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der).decode() + "-----END CERTIFICATE-----\n"


def _long(size: int) -> bytes:
    """A length as DER writes it."""
    return bytes((size,)) if size < 128 else b"\x82" + size.to_bytes(2, "big")


def _signed(content: bytes) -> bytes:
    """Whatever it is, as a certificate that the CA has signed."""
    signature = b"\0" + CA_KEY.sign(content, SIGNING)
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    body = content + algorithm + b"\x03" + _long(len(signature)) + signature
    return b"\x30" + _long(len(body)) + body


def _ca_reply(reply: enroll_pb2.GetCaReply | None) -> None:
    with contextlib.suppress(ProtocolError, IdentityError):
        assert tls.ca_digest(enroll.ca_of(reply, TOKEN)) == TOKEN.ca, "another CA than the token's"


def _reply(reply: enroll_pb2.EnrollReply | None) -> None:
    try:
        pem, certificate = enroll.certificate_of(reply, CA_PEM, DEVICE_KEY, "fuzz")
        tls.identity_of(certificate)
    except (ProtocolError, IdentityError):
        return
    again = tls.parse_certificate(pem.encode(), "fuzz")
    assert again.public_key() == DEVICE_KEY.public_key() and again == certificate
    tls.renewable_from(again)


def certificates(data: bytes) -> None:
    """What enrollment and renewal reply: messages, and certificates of any bytes, signed and not."""
    kind, rest = data[:1], data[1:]
    match kind[0] % 5 if kind else 0:
        case 0:
            _ca_reply(message_of(enroll_pb2.GetCaReply, CA_REPLIES, rest))
        case 1:
            _reply(message_of(enroll_pb2.EnrollReply, REPLIES, rest))
        case 2:
            _ca_reply(enroll_pb2.GetCaReply(ca_pem=_pem(patched(rest, CA.public_bytes(serialization.Encoding.DER)))))
        case 3:
            signed = _signed(patched(rest, DEVICE.tbs_certificate_bytes)[:60_000])
            _reply(enroll_pb2.EnrollReply(certificate_pem=_pem(signed)))
        case 4:
            with contextlib.suppress(IdentityError):
                pem = _pem(patched(rest, DEVICE.public_bytes(serialization.Encoding.DER)))
                tls.identity_of(tls.parse_certificate(pem.encode(), "fuzz"))


def certificate_seeds() -> list[bytes]:
    plain = [bytes((n,)) + one for n, replies in enumerate((CA_REPLIES, REPLIES)) for one in as_seeds(replies)]
    whole, content = DEVICE.public_bytes(serialization.Encoding.DER), DEVICE.tbs_certificate_bytes
    return [*plain, b"\2\0" + CA.public_bytes(serialization.Encoding.DER), b"\3\0" + content, b"\3\1", b"\4\0" + whole, b"\4\1"]


# -- objects --------------------------------------------------------------------------------------

CONTENT = bytes(range(40))
REF = ObjectRef(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
FAILURE = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "cut")


class _Chunks:
    """The chunks of a Fetch; what doesn't decode is None, as it is of gRPC."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __aiter__(self) -> AsyncIterator[Any]:
        while self._source.left:
            if self._source.below(8) == 7:
                raise FAILURE
            yield message_of(objects_pb2.Chunk, CHUNKS, self._source.bytes(60))

    def cancel(self) -> None:
        pass


class _Server:
    """A connection and a stub in one, whose answers are the source's."""

    address, backoff = "fuzz", wire.Backoff(0.0, 0.0, attempts=3)

    def __init__(self, source: Source) -> None:
        self._source = source

    @contextlib.asynccontextmanager
    async def using(self) -> AsyncIterator[Any]:
        yield self

    async def translate(self, raw: grpc.aio.AioRpcError, channel: Any) -> FedPrunerError:
        return wire.from_rpc_error(raw, self.address)

    def Fetch(self, request: Any) -> _Chunks:  # noqa: N802
        return _Chunks(self._source)

    async def Offset(self, request: Any, timeout: float) -> Any:  # noqa: N802
        return self._answer(objects_pb2.OffsetReply, OFFSETS)

    async def Push(self, pieces: Any) -> Any:  # noqa: N802
        async for _ in pieces:
            pass
        return self._answer(objects_pb2.PushReply, PUSHED)

    def _answer(self, kind: Any, seeds: list[Any]) -> Any:
        if self._source.below(8) == 7:
            raise FAILURE
        return message_of(kind, seeds, self._source.bytes(20))


CHUNKS = [objects_pb2.Chunk(data=CONTENT), objects_pb2.Chunk(data=CONTENT[:7])]
OFFSETS = [objects_pb2.OffsetReply(offset=7), objects_pb2.OffsetReply(accepted=True)]
PUSHED = [objects_pb2.PushReply(), objects_pb2.PushReply(duplicate=True)]


class _FuzzedTransfer(Transfer):
    def _stub(self, channel: Any) -> Any:
        return channel


async def _transfer(source: Source) -> None:
    directory = shared_memory("fuzz-transfer-")
    transfer = _FuzzedTransfer(_Server(source))  # type: ignore[arg-type]
    target, update = directory / "object", directory / "update"
    try:
        if source.below(2):
            update.write_bytes(CONTENT)
            with contextlib.suppress(FedPrunerError):
                await transfer.push(UpdateReady(KEY, REF, METRICS), update)
        else:
            try:
                await transfer.fetch(REF, target)
                assert target.read_bytes() == CONTENT, "other bytes than were announced"
            except FedPrunerError:
                assert not target.exists()
            for part in directory.glob("*.part"):
                assert part.stat().st_size <= REF.size, "more bytes than were announced"
    finally:
        shutil.rmtree(directory)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def transfer(data: bytes) -> None:
    _loop().run_until_complete(_transfer(Source(data)))


def transfer_seeds() -> list[bytes]:
    def piece(message: Any) -> bytes:
        raw = b"\0" + message.SerializeToString()
        return bytes((0, len(raw))) + raw

    fetched = [b"\0" + piece(CHUNKS[0]), b"\0" + piece(CHUNKS[1]) + b"\7" + piece(objects_pb2.Chunk(data=CONTENT[7:]))]
    pushed = [b"\1" + piece(offset) + piece(done) for offset in OFFSETS for done in PUSHED]
    return [*fetched, *pushed, bytes((0, 0, 3, 0, 255, 255)), bytes((1, 0, 3, 0, 255, 255))]


# -- the adapter ----------------------------------------------------------------------------------


@cache
def _adapter() -> bytes:
    directory = shared_memory("fuzz-")
    a, b = np.ones((3, 4), np.float32), np.ones((5, 3), np.float32)
    try:
        write_blocks(directory / "layer", [LoraBlock(2, module, a, b) for module in ("mlp.down_proj", "self_attn.q_proj")])
        return (directory / "layer").read_bytes()
    finally:
        shutil.rmtree(directory)


def adapter(data: bytes) -> None:
    """A layer of the broadcast adapter: what the daemon lets pass, a worker can read."""
    with File(patched(data, _adapter())) as file:
        files = (AdapterFile(2, str(file.path)),)
        try:
            check_ranks(files, 8)
        except (ProtocolError, ModelError):
            return
        read = AdapterFiles(files)
        assert read.rank((2,)) <= 8 and read.layer_bytes <= file.size
        for block in read[2]:
            assert block.a.shape[0] == block.b.shape[1] <= 8


TARGETS: dict[str, Target] = {
    "enrollment and renewal reply": Target(certificates, certificate_seeds),
    "object's reply": Target(transfer, transfer_seeds, 600),
    "adapter object": Target(adapter, lambda: [b"\0" + _adapter(), bytes((1, 0, 0, 0, 8)), bytes((1, 3, 0, 20, 0, 4, 48, 48))]),
}
