"""safetensors <-> LoRA blocks. Keys carry GLOBAL layer indices, whatever the device kept.

A key is ``layers.<0-based layer>.<module>.lora_A`` (r, d_in) or ``….lora_B`` (d_out, r). Both a
device's update (one object for all its units) and the server's broadcast (one object a layer) use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import UpdateRejected
from common.tensorfile import TensorFile, write_tensors
from common.types import FloatArray, LoraBlock

_KEY = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)\.lora_([AB])")


def key(layer: int, module: str, factor: str) -> str:
    """The canonical key; `factor` is ``A`` or ``B``."""
    return f"layers.{layer}.{module}.lora_{factor}"


def parse_key(name: str) -> tuple[int, str, str]:
    """(layer, module, factor) of a canonical key. Raises UpdateRejected on anything else."""
    match = _KEY.fullmatch(name)
    if match is None:
        raise UpdateRejected(f"tensor {name[:120]!r}: not a LoRA key (expected layers.<n>.<module>.lora_A or .lora_B)")
    return int(match[1]), match[2], match[3]


def write_blocks(path: Path, blocks: Iterable[LoraBlock], metadata: dict[str, str] | None = None) -> None:
    """Write blocks as one safetensors file, synced, the same bytes for the same blocks."""
    tensors: dict[str, FloatArray] = {}
    for block in blocks:
        tensors[key(block.layer, block.module, "A")] = block.a
        tensors[key(block.layer, block.module, "B")] = block.b
    write_tensors(path, tensors, metadata)


def block_names(file: TensorFile) -> list[tuple[int, str]]:
    """The (layer, module) pairs in a file, sorted. Raises UpdateRejected when a factor lacks its partner."""
    factors: dict[tuple[int, str], set[str]] = {}
    for name in file.tensors:
        layer, module, factor = parse_key(name)
        factors.setdefault((layer, module), set()).add(factor)
    for (layer, module), present in factors.items():
        if present != {"A", "B"}:
            missing = next(iter({"A", "B"} - present))
            raise UpdateRejected(f"tensor {key(layer, module, missing)!r} is missing")
    return sorted(factors)


def read_block(file: TensorFile, layer: int, module: str) -> LoraBlock:
    """One module's block, read alone."""
    return LoraBlock(layer, module, file.float32(key(layer, module, "A")), file.float32(key(layer, module, "B")))


def read_blocks(path: Path) -> Iterator[LoraBlock]:
    """All blocks of a file, one at a time, sorted by layer and module."""
    with TensorFile(path) as file:
        for layer, module in block_names(file):
            yield read_block(file, layer, module)
