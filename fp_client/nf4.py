"""NF4 units on the device's disk: a layer's linear weights are quantized once, reading them back is a copy.

One safetensors file a layer, keyed by base fingerprint and format, with the sha256 of its data in the metadata.
The 4-bit codes and block scales are bitsandbytes' own (block size 64, no second quantization of the scales), made
a few megabytes at a time so that quantizing needs no room for a whole matrix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.checkpoint import Checkpoint
from common.errors import ModelError, StorageError
from common.faults import fault
from common.files import disk_full, sync_directory
from common.tensorfile import TensorFile
from fp_client.tensors import CHUNK, chunks, read_into_tensor

log = logging.getLogger(__name__)

BLOCK = 64
"""Weights that share a scale (QLoRA's)."""
FORMAT = "nf4-64-1"
_ABANDONED = 3600.0
"""Seconds after which a temporary file that nobody has written to is nobody's, whoever has its pid now."""
_IDLE = 60.0
"""The same, where nobody here has its pid."""
_ZERO_DIGEST = "0" * 64


def hush_bitsandbytes() -> None:
    """Call before the first import of bitsandbytes (peft imports it too).

    On CPUs with AVX512-BF16 it logs a warning about an optional kernel package that only serves inference in eval
    mode, which is never used here.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _bitsandbytes() -> Any:
    hush_bitsandbytes()
    import bitsandbytes

    return bitsandbytes


class Nf4Store:
    """Quantized layers of one base model under `directory`."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, fingerprint: str) -> None:
        """`fingerprint`: the base model's; another base never reads this one's entries."""
        self.directory = directory / fingerprint[:32] / FORMAT
        self.checkpoint = checkpoint
        self._verified: set[Path] = set()

    def path(self, layer: int) -> Path:
        """Where a layer's entry lies."""
        return self.directory / f"layer-{layer:05d}.safetensors"

    def holds(self, layer: int, modules: Sequence[str]) -> bool:
        """Whether the layer's entry is there and undamaged."""
        path = self.path(layer)
        if path not in self._verified or not path.exists():
            self._verified.discard(path)
            try:
                with TensorFile(path) as file:
                    if _intact(file, modules):
                        self._verified.add(path)
            except ModelError:  # missing, or not such a file
                return False
        return path in self._verified

    def open(self, layer: int, modules: Sequence[str]) -> TensorFile:
        """The layer's entry, quantized now if missing or damaged. `modules`: its linear modules, sorted.

        Raises StorageError when the entry can't be written.
        """
        path = self.path(layer)
        if path.exists():
            try:
                file = TensorFile(path)
                if path in self._verified or _intact(file, modules):
                    self._verified.add(path)
                    return file
                file.close()
                why = "its contents do not match their digest"
            except ModelError as error:
                why = str(error)
            log.warning("quantized layer %d is damaged (%s); quantizing it again", layer + 1, why)
        self.build(layer, modules)
        self._verified.add(path)
        return TensorFile(path)

    def build(self, layer: int, modules: Sequence[str]) -> None:
        """Quantize one layer to disk, atomically. Raises StorageError when the disk is full."""
        path = self.path(layer)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep(layer)
            fault("worker.store.write")
            self._write(temporary, layer, modules)
            fault("worker.store.written")
            temporary.replace(path)
            sync_directory(self.directory)
        except OSError as error:
            full = disk_full(error)
            advice = "free some space, or point the device's data directory elsewhere" if full else "check the directory"
            raise StorageError(f"{path}: can't store the quantized layer: {error.strerror}; {advice}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self, layer: int) -> None:
        """Remove the layer's temporaries that killed processes have left; another process may be writing one right now."""
        for path in self.directory.glob(f"{self.path(layer).stem}.*.tmp"):
            with suppress(OSError):
                idle = time.time() - path.stat().st_mtime
                # A process of another container has a pid that says nothing here, but it goes on writing.
                if idle > _ABANDONED or (idle > _IDLE and not _alive(path.name.split(".")[1])):
                    path.unlink()

    def _write(self, path: Path, layer: int, modules: Sequence[str]) -> None:
        functional = _bitsandbytes().functional
        header: dict[str, object] = {"__metadata__": {"format": FORMAT, "sha256": _ZERO_DIGEST}}
        offset = 0
        for module in modules:
            count = _elements(self.checkpoint, layer, module)
            for kind, dtype, length, size in (("packed", "U8", (count + 1) // 2, 1), ("absmax", "F32", -(-count // BLOCK), 4)):
                header[f"{module}.{kind}"] = {"dtype": dtype, "shape": [length], "data_offsets": [offset, offset + length * size]}
                offset += length * size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for module in modules:
                scales = []
                name = f"model.layers.{layer}.{module}.weight"
                for values in chunks(self.checkpoint, name, CHUNK // BLOCK * BLOCK):
                    packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
                    data = packed.view(-1).numpy().data
                    digest.update(data)
                    out.write(data)
                    scales.append(state.absmax)
                data = torch.cat(scales).view(torch.uint8).numpy().data
                digest.update(data)
                out.write(data)
            out.seek(8 + text.index(_ZERO_DIGEST.encode()))
            out.write(digest.hexdigest().encode())
            out.flush()
            os.fsync(out.fileno())


def _alive(pid: str) -> bool:
    """Whether another process has this pid. One of ours is left from before: in a container pids repeat."""
    try:
        if int(pid) == os.getpid():
            return False
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def _elements(checkpoint: Checkpoint, layer: int, module: str) -> int:
    count = 1
    for size in checkpoint.info(f"model.layers.{layer}.{module}.weight").shape:
        count *= size
    return count


def _intact(file: TensorFile, modules: Sequence[str]) -> bool:
    if sorted(file.tensors) != sorted(f"{m}.{kind}" for m in modules for kind in ("packed", "absmax")):
        return False
    digest = hashlib.sha256()
    for info in sorted(file.tensors.values(), key=lambda i: i.start):
        for chunk in file.chunks(info.name, CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == file.metadata.get("sha256")


def read_linear(file: TensorFile, module: str, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes `Linear4bit` with the stored codes; `linear` gives the shape, its bias is set by the caller.

    `dtype` is the compute dtype, bf16 or fp32.
    """
    bnb = _bitsandbytes()
    packed, absmax = (
        read_into_tensor(file, f"{module}.{kind}", torch.empty(file.info(f"{module}.{kind}").shape, dtype=kind_dtype)).to(device)
        for kind, kind_dtype in (("packed", torch.uint8), ("absmax", torch.float32))
    )
    state = bnb.functional.QuantState(
        absmax=absmax,
        shape=torch.Size((linear.out_features, linear.in_features)),
        code=bnb.functional.get_4bit_type("nf4", device=device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    out: nn.Module = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype, quant_type="nf4",
        compress_statistics=False, device="meta",
    )  # fmt: skip
    out.weight = bnb.nn.Params4bit(
        packed.view(-1, 1), requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=False,
        quant_type="nf4", bnb_quantized=True, module=out,
    )  # fmt: skip
    out.quant_state = state
    return out
