"""Centred kernel alignment between the residual streams of a model's units (paper Eq. 1 and 4).

h_0 is the embedding output, h_i the residual stream after unit i. Every state is sampled at the same n token
positions, so what is kept is one centred n×n Gram matrix a unit: (U+1)·n² numbers, whatever the model's width.
"""

from __future__ import annotations

import numpy as np
import torch

from common.errors import DataError
from common.types import FloatArray, Kernel, Positions

SINK_POSITIONS = 1
"""Leading tokens that CLEAN drops: the attention sink's huge activation would drive every CKA to 1."""


def sample_positions(attention_mask: torch.Tensor, count: int, sample: Positions, seed: int) -> torch.Tensor:
    """The token positions that the CKA sees, the same for every unit.

    attention_mask (B, T), right-padded -> (n, 2) rows of (sequence, position), n ≤ count, in order. CLEAN leaves out
    padding and the first `SINK_POSITIONS` tokens of each sequence; RAW samples from everything.
    Raises DataError when fewer than two positions are left.
    """
    allowed = torch.ones_like(attention_mask, dtype=torch.bool)
    if sample is Positions.CLEAN:
        allowed = attention_mask.bool().clone()
        allowed[:, :SINK_POSITIONS] = False
    where = allowed.nonzero().cpu()
    if len(where) < 2:
        raise DataError("the probe batch has fewer than two usable token positions; it needs longer texts")
    if len(where) > count:
        drawn = np.random.default_rng(seed).choice(len(where), count, replace=False)
        where = where[torch.from_numpy(np.sort(drawn))]
    return where


def _squared_distances(gram: torch.Tensor) -> torch.Tensor:
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min_(0)


class CkaAccumulator:
    """Takes one unit's states at a time; gives the whole CKA matrix at the end."""

    def __init__(self, states: int, positions: int, kernel: Kernel = Kernel.LINEAR, sample: Positions = Positions.CLEAN) -> None:
        """`states`: U + 1 residual streams; `positions`: n sampled tokens."""
        self.kernel, self.sample = kernel, sample
        self._grams = torch.zeros((states, positions * positions), dtype=torch.float32)
        self._count = 0

    def add(self, states: torch.Tensor) -> None:
        """The next residual stream at the sampled positions, (n, d).

        CLEAN scales every token vector to unit length. RBF is exp(−‖x−y‖²/2σ²) with σ² the median of the squared
        distances between different tokens (the median heuristic, so that it needs no tuning a layer).
        """
        x = states.detach().cpu().double()
        if self.sample is Positions.CLEAN:
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        gram = x @ x.T
        if self.kernel is Kernel.RBF:
            squared = _squared_distances(gram)
            pairs = squared[~torch.eye(len(squared), dtype=torch.bool)]
            gram = torch.exp(-squared / (2 * pairs.median().clamp_min(1e-12)))
        gram = gram - gram.mean(dim=0, keepdim=True)  # HKH: centred over rows and columns
        gram = gram - gram.mean(dim=1, keepdim=True)
        norm = gram.norm()
        # HSIC(X,X)=‖HKH‖²: dividing now makes Eq. 1 one inner product, and keeps fp32 from overflowing.
        self._grams[self._count] = (gram / norm if norm > 0 else gram).reshape(-1).float()
        self._count += 1

    def matrix(self) -> FloatArray:
        """CKA between all added states, (U+1, U+1), symmetric with a unit diagonal."""
        grams = self._grams[: self._count]
        inner: FloatArray = (grams @ grams.T).numpy()
        out: FloatArray = np.clip((inner + inner.T) / 2, 0.0, 1.0).astype(np.float32)
        np.fill_diagonal(out, 1.0)
        return out


def split(full: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The (U+1, U+1) matrix as S between unit outputs (U, U) and s_l, each unit's input with its output (U,) (Eq. 3)."""
    return np.ascontiguousarray(full[1:, 1:]), np.ascontiguousarray(np.diagonal(full, offset=1))


def cka(states: list[torch.Tensor], kernel: Kernel = Kernel.LINEAR, sample: Positions = Positions.CLEAN) -> FloatArray:
    """CKA between residual streams given as (n, d) each: (U+1, U+1)."""
    accumulator = CkaAccumulator(len(states), len(states[0]), kernel, sample)
    for one in states:
        accumulator.add(one)
    return accumulator.matrix()
