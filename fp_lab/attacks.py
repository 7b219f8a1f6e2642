"""What a row's attackers do to the update they have honestly trained, before it is checked and counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.blocks import read_blocks, write_blocks
from common.types import LoraBlock
from fp_lab.experiment import Attack, Row


def attackers(row: Row, names: tuple[str, ...]) -> frozenset[str]:
    """The row's attackers: the first devices."""
    return frozenset(names[: row.attackers])


def spoil(path: Path, row: Row) -> None:
    """Rewrite an update file as the row's attack has it."""
    write_blocks(path, [_spoilt(block, row.attack, row.strength) for block in read_blocks(path)])


def _spoilt(block: LoraBlock, attack: Attack, strength: float) -> LoraBlock:
    """Turned round and as many times as long, only longer, or of one value that is no number. B alone is touched, or A."""
    if attack == "nan":
        a = block.a.copy()
        a[0, 0] = np.nan
        return replace(block, a=a)
    return replace(block, b=block.b * np.float32(-strength if attack == "sign-flip" else strength))
