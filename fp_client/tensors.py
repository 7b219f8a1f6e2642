"""Checkpoint tensors read by offset into torch tensors, cast a few megabytes at a time; never memory-mapped."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from common.checkpoint import Checkpoint
from common.errors import ModelError
from common.tensorfile import TensorFile

CHUNK = 1 << 22
"""Elements cast or quantized at a time: bounds the extra memory to about 16 MiB."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype a weight is stored in. Raises ModelError when it is not a floating-point type we read."""
    info = checkpoint.info(name)
    if info.dtype not in DTYPES:
        raise ModelError(f"{checkpoint.file(name).path}: tensor {name!r} is {info.dtype}; weights must be F32, BF16 or F16")
    return DTYPES[info.dtype]


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_into_tensor(file: TensorFile, name: str, out: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Fill a contiguous CPU tensor with stored bytes from byte `offset` on; dtypes must already agree."""
    file.read_into(name, bytes_view(out), offset)
    return out


def chunks(checkpoint: Checkpoint, name: str, elements: int = CHUNK) -> Iterator[torch.Tensor]:
    """A tensor flattened, `elements` at a time, as fp32."""
    stored, total = stored_dtype(checkpoint, name), math.prod(checkpoint.info(name).shape)
    for start in range(0, total, elements):
        part = torch.empty(min(elements, total - start), dtype=stored)
        yield read_into_tensor(checkpoint.file(name), name, part, start * stored.itemsize).float()


def read_tensor(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One whole tensor on `device` in `dtype`; the extra memory is one chunk."""
    return read_rows(checkpoint, name, 0, None, device, dtype)


def read_rows(
    checkpoint: Checkpoint, name: str, first: int, last: int | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Rows [first, last) of a tensor (all of them when `last` is None) on `device` in `dtype`."""
    stored, shape, file = stored_dtype(checkpoint, name), checkpoint.info(name).shape, checkpoint.file(name)
    last = shape[0] if last is None else min(last, shape[0])
    width = math.prod(shape[1:])
    out = torch.empty((last - first, *shape[1:]), dtype=dtype, device=device)
    if stored == dtype and device.type == "cpu":
        return read_into_tensor(file, name, out, first * width * stored.itemsize)
    flat = out.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = torch.empty(min(CHUNK, flat.numel() - start), dtype=stored)
        read_into_tensor(file, name, part, (first * width + start) * stored.itemsize)
        flat[start : start + part.numel()].copy_(part)
    return out
