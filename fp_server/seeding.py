"""Seeded choices: every random draw of a run comes from (run seed, round, device, purpose).

A generator depends on those four alone, never on the order of events, so that a restarted or repeated
run draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def rng_for(seed: int, round_index: int, device: str, purpose: str) -> np.random.Generator:
    """The generator of one purpose.

    `seed`: the run's; `round_index`: 0-based; `device`: its id, empty for what concerns no single device;
    `purpose`: a short word such as ``plan`` or ``sample``. Other parts give an independent stream.
    """
    parts = (str(seed), str(round_index), device, purpose)
    # A length before each part keeps ("ab", "c") and ("a", "bc") apart.
    text = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    words = np.frombuffer(hashlib.sha256(text).digest(), dtype=">u4").astype(np.uint32)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words.tolist())))


def draw_devices(eligible: Sequence[str], count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`count` different devices, uniformly, in id order; all of them when there are no more than `count`.

    The order of `eligible` does not matter. Raises ValueError when `count` < 1 or a name stands twice.
    """
    names = sorted(eligible)
    if count < 1:
        raise ValueError(f"can't draw {count} devices: at least 1")
    if len(set(names)) != len(names):
        raise ValueError("a device stands twice among the eligible ones")
    if len(names) <= count:
        return tuple(names)
    chosen = rng.permutation(len(names))[:count]
    return tuple(names[index] for index in sorted(chosen.tolist()))
