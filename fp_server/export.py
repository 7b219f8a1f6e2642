"""The ledger as a PEFT adapter directory, written without torch.

Any reader of PEFT's LoRA format loads it on the untouched base model: ΔW = (alpha/r)·B·A with
alpha = r for every module, so that all scaling sits in B.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

from common.blocks import block_names, key, read_block, write_blocks
from common.errors import ConfigError, ModelError, NotFound, StorageError
from common.faults import fault
from common.tensorfile import TensorFile, TensorWriter, parse_header
from common.types import LoraBlock, ModelManifest
from fp_server.ledger import open_ledger, read_delta
from fp_server.lowrank import lossless, recompress


class _Held(TensorFile):
    """A ledger that is open already; whoever opened that file closes it."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._fd = path, os.dup(file.fileno())
        try:
            self.tensors, self.metadata = parse_header(path, self._fd, os.fstat(self._fd).st_size)
        except BaseException as error:
            self.close()
            if isinstance(error, ModelError):
                raise StorageError(f"damaged ledger: {error}") from None
            raise


def export_peft(
    ledgers: Mapping[int, Path],
    manifest: ModelManifest,
    out_dir: Path,
    base_model_name: str,
    rank: int | None = None,
    held: Mapping[int, FileIO] | None = None,
) -> dict[str, float]:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `out_dir`, which appears whole or not at all.

    `ledgers`: 0-based layer -> ledger file. `rank`: at most so many components a module (best approximation);
    None keeps ΔW to float32 rounding. `held`: those of the ledgers that are open already: they may have no name any more.
    One layer's factors are in memory at a time. Returns the part of each module's
    energy that was dropped, by full module name. Raises NotFound when nothing has been trained, ConfigError when
    `out_dir` exists or `rank` < 1, StorageError when a ledger is damaged or the disk is full.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"export rank {rank}: must be at least 1")
    if out_dir.exists():
        raise ConfigError(f"{out_dir}: exists already; name a directory that does not")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        try:
            dropped = _export(ledgers, manifest, work, base_model_name, rank, held or {})
            work.chmod(0o755)
            fault("server.export.written")
            work.rename(out_dir)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        fault("server.export.renamed")
        _sync(out_dir.parent)
    except OSError as error:
        raise StorageError(f"{out_dir}: the export could not be written: {error.strerror}") from None
    return dropped


def _export(
    ledgers: Mapping[int, Path],
    manifest: ModelManifest,
    work: Path,
    base_model_name: str,
    rank: int | None,
    held: Mapping[int, FileIO],
) -> dict[str, float]:
    """Factor layer by layer into scratch files, then join those: the ranks come before the header, the header before data."""
    dropped: dict[str, float] = {}
    scratch: dict[int, Path] = {}
    ranks: dict[tuple[int, str], int] = {}
    for layer in sorted(ledgers):
        blocks: list[LoraBlock] = []
        with _Held(ledgers[layer], held[layer]) if layer in held else open_ledger(ledgers[layer]) as file:
            for module in manifest.modules:
                delta = read_delta(file, layer, module)
                factors, lost = (lossless(delta), 0.0) if rank is None else recompress(delta, rank)
                if factors.rank:
                    blocks.append(LoraBlock(layer, module.name, factors.a, factors.b))
                    ranks[layer, module.name] = factors.rank
                    dropped[module_name(layer, module.name)] = lost
        scratch[layer] = work / f"layer-{layer}.safetensors"
        write_blocks(scratch[layer], blocks)
        fault("server.export.layer")
    if not ranks:
        raise NotFound("nothing to export: no layer has been trained yet")
    _join(scratch, work / "adapter_model.safetensors")
    for path in scratch.values():
        path.unlink()
    fault("server.export.joined")
    config = work / "adapter_config.json"
    config.write_text(json.dumps(adapter_config(ranks, base_model_name), indent=2, sort_keys=True) + "\n")
    _sync(config)
    _sync(work)
    return dropped


def module_name(layer: int, module: str) -> str:
    """A module's full name in the Hugging Face model."""
    return f"model.layers.{layer}.{module}"


def adapter_config(ranks: Mapping[tuple[int, str], int], base_model_name: str) -> dict[str, object]:
    """PEFT's configuration for modules of these ranks.

    Modules are named in full: PEFT matches a target as the whole name or a dotted end of it, and a rank pattern as a
    regular expression at the name's end, so a bare ``q_proj`` would reach the layers nobody trained.
    """
    names = {module_name(layer, module): rank for (layer, module), rank in sorted(ranks.items())}
    default = max(names.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "target_modules": list(names),
        "r": default,
        "lora_alpha": default,
        "rank_pattern": names,
        "alpha_pattern": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _join(scratch: Mapping[int, Path], out: Path) -> None:
    """One adapter file from the layers' files, one block in memory at a time."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in scratch.values():
        with TensorFile(path) as file:
            for layer, module in block_names(file):
                for factor in ("A", "B"):
                    shapes[_peft_key(layer, module, factor)] = file.info(key(layer, module, factor)).shape
    with TensorWriter(out, shapes, {"format": "pt"}) as writer:
        for path in scratch.values():
            with TensorFile(path) as file:
                for layer, module in block_names(file):
                    block = read_block(file, layer, module)
                    writer.write(_peft_key(layer, module, "A"), block.a)
                    writer.write(_peft_key(layer, module, "B"), block.b)


def _peft_key(layer: int, module: str, factor: str) -> str:
    return f"base_model.model.{module_name(layer, module)}.lora_{factor}.weight"


def _sync(path: Path) -> None:
    """fsync of a file or directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
