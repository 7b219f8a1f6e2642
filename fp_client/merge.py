"""Merging an exported PEFT adapter into a full-precision checkpoint: a merged model directory, tensor by tensor.

The output has the shards of the input, byte for byte, but for the weights the adapter touches: those become
``W + scale · B A``, computed in fp32 a few rows at a time and rounded to the stored dtype.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.checkpoint import Checkpoint
from common.errors import ConfigError, ModelError, StorageError
from common.files import disk_full
from common.tensorfile import TensorFile
from fp_client.messages import OnProgress
from fp_client.tensors import CHUNK, DTYPES, bytes_view, read_into_tensor, stored_dtype

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class _Pair:
    """The adapter's tensors for one weight; ΔW = scale · B A."""

    a: str
    b: str
    scale: float


def _pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    # peft matches a pattern's key as a regular expression against the end of the module's name.
    for key, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
            return value
    return default


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{adapter}: has no adapter_config.json; is it a PEFT adapter directory?") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: unreadable: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged")
    for option in ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "megatron_config", "trainable_token_indices"):
        if config.get(option):
            raise ConfigError(f"{path}: {option} is set; merging it is not supported")
    return config


def _pairs(file: TensorFile, checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, _Pair]:
    """Weight name in the checkpoint -> the adapter's pair, shapes checked."""
    found: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if match is None:
            raise ModelError(f"{file.path}: tensor {name!r} is not a LoRA factor; merging it is not supported")
        found.setdefault(match[1], {})[match[2]] = name
    out = {}
    for module, factors in sorted(found.items()):
        weight = f"{module}.weight"
        if set(factors) != {"A", "B"}:
            raise ModelError(f"{file.path}: module {module!r} lacks one of its two LoRA factors")
        if weight not in checkpoint:
            raise ModelError(
                f"{file.path}: the base model {checkpoint.directory} has no weight {weight!r}; is it another model's?"
            )
        a, b, shape = file.info(factors["A"]).shape, file.info(factors["B"]).shape, checkpoint.info(weight).shape
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shape or a[0] != b[1]:
            raise ModelError(f"{file.path}: module {module!r}: A {a} and B {b} do not fit the base weight {shape}")
        rank = _pattern(config.get("rank_pattern") or {}, module, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
        if rank != a[0]:
            raise ModelError(f"{file.path}: module {module!r} has rank {a[0]}, adapter_config.json says {rank}")
        out[weight] = _Pair(factors["A"], factors["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return out


def _factor(file: TensorFile, name: str) -> torch.Tensor:
    info = file.info(name)
    if info.dtype not in DTYPES:
        raise ModelError(f"{file.path}: tensor {name!r} is {info.dtype}, expected a floating-point type")
    return read_into_tensor(file, name, torch.empty(info.shape, dtype=DTYPES[info.dtype])).float()


def _write_merged(out: BinaryIO, checkpoint: Checkpoint, weight: str, adapter: TensorFile, pair: _Pair) -> None:
    stored, (rows, width) = stored_dtype(checkpoint, weight), checkpoint.info(weight).shape
    a, b = _factor(adapter, pair.a), _factor(adapter, pair.b)
    step = max(1, CHUNK // width)
    for first in range(0, rows, step):
        part = torch.empty((min(step, rows - first), width), dtype=stored)
        read_into_tensor(checkpoint.file(weight), weight, part, first * width * stored.itemsize)
        merged = part.float().addmm_(b[first : first + step], a, alpha=pair.scale)
        out.write(bytes_view(merged.to(stored).contiguous()))


def _write_shard(path: Path, source: TensorFile, checkpoint: Checkpoint, adapter: TensorFile, pairs: dict[str, _Pair]) -> None:
    infos = sorted(source.tensors.values(), key=lambda info: (info.start, info.size))
    with path.open("wb") as out:
        with source.path.open("rb") as raw:  # header as it is: names, dtypes and offsets do not change
            out.write(raw.read(infos[0].start if infos else source.path.stat().st_size))
        for info in infos:
            if info.name in pairs:
                _write_merged(out, checkpoint, info.name, adapter, pairs[info.name])
            else:
                for chunk in source.chunks(info.name, 4 << 20):
                    out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def merge(checkpoint_dir: Path, adapter_dir: Path, out_dir: Path, progress: OnProgress | None = None) -> int:
    """Write the base with the adapter merged in; returns the number of weights that changed.

    `out_dir` must not exist; it appears whole or not at all. Everything else of the base directory (configuration,
    tokenizer) is copied. Raises ConfigError, ModelError naming what does not fit, StorageError when the disk is full.
    """
    if out_dir.exists():
        raise ConfigError(f"{out_dir}: already exists; name a new directory")
    config = _read_config(adapter_dir)
    checkpoint = Checkpoint(checkpoint_dir)
    try:
        with TensorFile(adapter_dir / "adapter_model.safetensors") as adapter:
            pairs = _pairs(adapter, checkpoint, config)
            shards = sorted({checkpoint.file(name).path for name in checkpoint.names})
            out_dir.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as scratch:
                target = Path(scratch) / "merged"
                target.mkdir()
                for done, shard in enumerate(shards):
                    with TensorFile(shard) as source:
                        _write_shard(target / shard.name, source, checkpoint, adapter, pairs)
                    if progress is not None:
                        progress("merge", done + 1, len(shards))
                for other in sorted(checkpoint_dir.iterdir()):
                    if other.is_file() and other.suffix not in (".safetensors", ".bin", ".gguf", ".pt", ".pth"):
                        shutil.copyfile(other, target / other.name)
                target.rename(out_dir)
    except OSError as error:
        advice = "; free some space" if disk_full(error) else ""
        raise StorageError(f"{out_dir}: can't be written: {error.strerror}{advice}") from None
    finally:
        checkpoint.close()
    return len(pairs)
