"""Reading safetensors with plain reads instead of a memory map.

The safetensors library maps the file, and mapped pages count as the process's memory until released.
Where a process promises a memory bound, tensors are read by offset instead; the header is checked as
strictly as the library does before any offset is trusted.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from common.errors import ModelError

MAX_HEADER = 100 << 20
"""The format's own limit on a header, in bytes."""
DIMENSIONS, LARGEST = 16, 1 << 48
"""What a tensor has at most; a number of elements, or a place in the file."""

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `size` in bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def parse_header(path: Path, fd: int, file_size: int, limit: int = MAX_HEADER) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of an open safetensors file.

    Raises ModelError naming the file when the header is damaged, a tensor overlaps another or lies
    outside the file, or bytes are left over.
    """

    def bad(why: str) -> ModelError:
        return ModelError(f"{path}: not a usable safetensors file: {why}")

    raw = os.pread(fd, 8, 0)
    if len(raw) < 8:
        raise bad("shorter than a header")
    (length,) = struct.unpack("<Q", raw)
    if length > min(limit, file_size - 8):
        raise bad(f"header of {length} bytes in a file of {file_size}: truncated or corrupt")
    try:
        header = json.loads(os.pread(fd, length, 8))
        metadata = header.pop("__metadata__", {})
        infos: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            # Bounded before anything is reckoned or said: a product of numbers of thousands of digits takes minutes.
            if not isinstance(dtype, str) or dtype not in ITEMSIZE:
                raise bad(f"tensor {name[:120]!r} has dtype {str(dtype)[:20]!r}")
            if len(shape) > DIMENSIONS or any(type(n) is not int or not 0 <= n <= LARGEST for n in (*shape, begin, end)):
                raise bad(f"tensor {name[:120]!r} has a shape or a place that no tensor can have")
            if end - begin != (needed := ITEMSIZE[dtype] * math.prod(shape)):
                raise bad(f"tensor {name[:120]!r} has {end - begin} bytes, its shape {list(shape)} needs {needed}")
            infos[name] = TensorInfo(name, dtype, shape, 8 + length + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(f"header unreadable ({type(error).__name__})") from None
    cursor = 8 + length
    for info in sorted(infos.values(), key=lambda i: (i.start, i.size)):
        if info.start != cursor:
            raise bad(f"tensor {info.name[:120]!r} overlaps another or leaves a gap")
        cursor += info.size
    if cursor != file_size:
        raise bad(f"tensors end at byte {cursor}, the file at {file_size}: truncated or corrupt")
    if not isinstance(metadata, dict):
        raise bad("metadata is not a table")
    return infos, {str(k): str(v) for k, v in metadata.items()}


class TensorFile:
    """One open safetensors file; nothing of it is held in memory but its header."""

    def __init__(self, path: Path, header_limit: int = MAX_HEADER) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path}: can't be opened: {error.strerror}") from None
        try:
            self.tensors, self.metadata = parse_header(path, self._fd, os.fstat(self._fd).st_size, header_limit)
        except BaseException:
            os.close(self._fd)
            raise

    def info(self, name: str) -> TensorInfo:
        """Raises ModelError when there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelError(f"{self.path}: has no tensor {name!r}") from None

    def read_into(self, name: str, buffer: memoryview, offset: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from byte `offset` on."""
        info = self.info(name)
        done = 0
        while done < len(buffer):
            got = os.preadv(self._fd, [buffer[done:]], info.start + offset + done)
            if got == 0:
                raise ModelError(f"{self.path}: ends inside tensor {name!r}")
            done += got

    def bytes_of(self, name: str) -> bytearray:
        """A tensor's bytes."""
        buffer = bytearray(self.info(name).size)
        self.read_into(name, memoryview(buffer))
        return buffer

    def chunks(self, name: str, size: int = 1 << 20) -> Iterator[memoryview]:
        """A tensor's bytes, `size` at a time, in one reused buffer."""
        info, buffer = self.info(name), memoryview(bytearray(size))
        for offset in range(0, info.size, size):
            part = buffer[: min(size, info.size - offset)]
            self.read_into(name, part, offset)
            yield part

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """An F32 tensor as an array of its shape. Raises ModelError for another dtype."""
        info = self.info(name)
        if info.dtype != "F32":
            raise ModelError(f"{self.path}: tensor {name!r} is {info.dtype}, expected F32")
        out = np.empty(info.shape, np.float32)
        self.read_into(name, out.reshape(-1).data.cast("B"))
        return out

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TensorWriter:
    """Writes one safetensors file of F32 tensors whose shapes are known beforehand, one tensor at a time, in any order.

    Tensors lie sorted by name; the same input gives the same bytes. A clean exit checks that every tensor was written
    and syncs the file; after an error the half-written file is removed. The caller renames it into place.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self._shapes, self._missing = path, dict(shapes), set(shapes)
        header: dict[str, object] = {}
        if metadata:
            header["__metadata__"] = dict(sorted(metadata.items()))
        self._offsets: dict[str, int] = {}
        offset = 0
        for name in sorted(shapes):
            size = math.prod(shapes[name]) * 4
            header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
            self._offsets[name] = offset
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._out = path.open("wb")
        self._out.write(struct.pack("<Q", len(text)))
        self._out.write(text)

    def write(self, name: str, tensor: npt.NDArray[np.float32]) -> None:
        """Write one tensor. Raises ValueError when its name or shape was not announced, or it was written before."""
        if tensor.shape != self._shapes.get(name) or name not in self._missing:
            raise ValueError(f"tensor {name!r} of shape {tensor.shape} was not announced, or is written twice")
        self._missing.remove(name)
        self._out.seek(self._base + self._offsets[name])
        # A memoryview of nothing can't be cast.
        if tensor.size:
            self._out.write(np.ascontiguousarray(tensor, dtype="<f4").reshape(-1).data.cast("B"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._out:
            if kind is None and not self._missing:
                self._out.flush()
                os.fsync(self._out.fileno())
                return
        self.path.unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"tensor {min(self._missing)!r} was announced but not written")


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]], metadata: Mapping[str, str] | None = None) -> None:
    """Write F32 tensors, sorted by name, one at a time; the same input gives the same bytes.

    The file is synced. The caller renames it into place.
    """
    with TensorWriter(path, {name: tensor.shape for name, tensor in tensors.items()}, metadata) as out:
        for name in sorted(tensors):
            out.write(name, tensors[name])
