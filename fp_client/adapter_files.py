"""The broadcast adapter as a worker gets it: a file a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from common.blocks import block_names, key, read_block
from common.errors import UpdateRejected
from common.tensorfile import TensorFile
from common.types import LoraBlock
from fp_client.messages import AdapterFile

HEADER = 1 << 20
"""Bytes the header of a layer's file may have: a dozen or two of tensors. Parsing one takes many times its size."""


class AdapterFiles(Mapping[int, Sequence[LoraBlock]]):
    """The broadcast adapter by layer, each layer read when it is asked for and not kept."""

    def __init__(self, files: Sequence[AdapterFile]) -> None:
        self._paths = {file.layer: Path(file.path) for file in files}

    def __getitem__(self, layer: int) -> Sequence[LoraBlock]:
        with TensorFile(self._paths[layer], HEADER) as file:
            return [read_block(file, *name) for name in block_names(file) if name[0] == layer]

    def _sizes(self, layer: int) -> tuple[int, int]:
        with TensorFile(self._paths[layer], HEADER) as file:
            ranks = [_rank(file, *name) for name in block_names(file) if name[0] == layer]
            return max(ranks, default=0), sum(info.size for info in file.tensors.values())

    def rank(self, layers: Collection[int]) -> int:
        """The largest rank among those layers' blocks; 0 where ΔW is still nothing. Raises UpdateRejected where A and B are no
        factors of one matrix, ModelError when a file is damaged."""
        return max((self._sizes(layer)[0] for layer in self._paths if layer in layers), default=0)

    @property
    def layer_bytes(self) -> int:
        """The size of the largest layer."""
        return max((self._sizes(layer)[1] for layer in self._paths), default=0)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._paths))

    def __len__(self) -> int:
        return len(self._paths)


def _rank(file: TensorFile, layer: int, module: str) -> int:
    a, b = (file.info(key(layer, module, factor)) for factor in "AB")
    fit = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and max(*a.shape, *b.shape) < 1 << 31
    if not fit or {a.dtype, b.dtype} != {"F32"}:
        raise UpdateRejected(f"{module}: A {a.dtype} {a.shape} and B {b.dtype} {b.shape} are no factors of one matrix")
    return a.shape[0]
