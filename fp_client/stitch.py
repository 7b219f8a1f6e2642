"""Frozen surrogates of pruned gaps, fitted in closed form to hidden states of the full model.

A surrogate maps the residual stream before a gap to the one after it: h + shift + h M. M is a weighted ridge regression
of the CHANGE over the gap on the state before it, so a stronger ridge leads to the mean change, not to zero. Fitted
either on the d×d normal equations or, for fewer tokens than d, in the dual on n×n: at d=4096 and n=1024 the dual holds
8 MiB a Gram matrix in place of 128 MiB.

A long gap is far from linear. On SmolLM2-135M at 8 of 30 layers FDLO and IALS leave one gap of 10–23 layers, where these
maps raise the gradient's cosine from 0.01 to 0.10–0.16, whatever the kind; adding the full model's own change token by
token (`fp_client.anchor`) reaches 0.75. These cost no pass of the full model over the training rows; that is their case.
"""

from __future__ import annotations

import torch
from torch import nn

from common.errors import DataError
from common.types import Stitch

_CHUNK = 512
"""Columns taken to double precision at a time."""


class Surrogate(nn.Module):
    """Stands in a gap: h + shift + h·down·up, with no parameter to train. Without `up`, `down` is the whole M."""

    def __init__(self, shift: torch.Tensor, down: torch.Tensor | None = None, up: torch.Tensor | None = None) -> None:
        """`shift` (d,); `down` (d, d), or (d, r) with `up` (r, d). Raises ValueError when the shapes do not fit."""
        super().__init__()
        width = shift.numel()
        inner = width if up is None else up.shape[0]
        if (down is None and up is not None) or (down is not None and down.shape != (width, inner)):
            raise ValueError(f"a map of width {width} can't have factors {_shape(down)} and {_shape(up)}")
        if up is not None and up.shape != (inner, width):
            raise ValueError(f"a map of width {width} can't end in a factor {_shape(up)}")
        self.shift: torch.Tensor
        self.down: torch.Tensor | None
        self.up: torch.Tensor | None
        for name, value in (("shift", shift), ("down", down), ("up", up)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The residual stream (B, T, d) after the gap, in its own dtype; what a decoder layer is also given is ignored."""
        dtype = hidden_states.dtype
        out = hidden_states + self.shift.to(dtype)
        if self.down is None:
            return out
        change = hidden_states @ self.down.to(dtype)
        return out + (change if self.up is None else change @ self.up.to(dtype))

    @property
    def nbytes(self) -> int:
        """Memory of the map in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def inverse_norms(states: torch.Tensor) -> torch.Tensor:
    """1/‖h‖ of each token, (n, d) -> (n,): the residual stream's error counts relative to its size, and a sink's huge
    activation does not decide the map."""
    norms: torch.Tensor = torch.linalg.vector_norm(states.float(), dim=1)
    return norms.clamp_min(1e-12).reciprocal()


def fit(
    kind: Stitch,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    *,
    rank: int = 64,
    ridge: float = 1.0,
    weights: torch.Tensor | None = None,
) -> Surrogate:
    """The surrogate of a gap from sampled states before and after it, (n, d) each; buffers in fp32.

    `rank`: of a low-rank map, the best one of that rank for the same penalty. `ridge`: the penalty, in units of the mean
    variance of the inputs. `weights` (n,): of the tokens, by default the inverse norms of the outputs. An affine map
    from fewer than d/2 tokens stays in factors of n. Raises DataError for fewer than two tokens or states that are not
    finite, ValueError for shapes that disagree and for a ridge, rank or weight that is not positive.
    """
    if inputs.ndim != 2 or inputs.shape != outputs.shape:
        raise ValueError(f"states before and after the gap must both be (n, d), got {_shape(inputs)} and {_shape(outputs)}")
    if not ridge > 0 or rank < 1:
        raise ValueError(f"ridge must be above 0 and rank at least 1, got {ridge} and {rank}")
    tokens, width = inputs.shape
    if tokens < 2:
        raise DataError(f"a surrogate needs at least 2 token positions, the probe batch gave {tokens}; give it longer texts")
    before, change = inputs.detach().float(), outputs.detach().float() - inputs.detach().float()
    if not (bool(before.isfinite().all()) and bool(change.isfinite().all())):
        raise DataError("the probe's hidden states are not finite, so no surrogate can be fitted; check the model and its dtype")
    found = inverse_norms(outputs) if weights is None else weights.detach().float()
    if found.shape != (tokens,) or not bool((found > 0).all()):
        raise ValueError(f"weights must be {tokens} positive numbers")
    share = (found / found.sum())[:, None]
    mean_before, mean_change = (share * before).sum(0), (share * change).sum(0)
    if kind is Stitch.SHIFT:
        return Surrogate(mean_change)
    x, y = share.sqrt() * (before - mean_before), share.sqrt() * (change - mean_change)
    penalty = max(ridge * float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 / width, 1e-30)
    bound = rank if kind is Stitch.LOW_RANK else None
    down, up = _dual(x, y, penalty, bound) if tokens < width else _primal(x, y, penalty, bound)
    moved = mean_before @ down if up is None else mean_before @ down @ up
    return Surrogate(mean_change - moved, down, up)


def _primal(x: torch.Tensor, y: torch.Tensor, penalty: float, rank: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """M = (XᵀX + λ)⁻¹XᵀY. Of rank r: M V Vᵀ, V the leading eigenvectors of Mᵀ(XᵀX + λ)M = MᵀXᵀY (reduced-rank regression
    on the rows that the ridge adds)."""
    cross = _products(x.T, y.T)
    values, vectors = torch.linalg.eigh(_products(x.T, x.T))
    full = vectors @ ((vectors.T @ cross) / (values.clamp_min(0) + penalty)[:, None])
    if rank is None:
        return full.float(), None
    leading = torch.linalg.eigh(full.T @ cross).eigenvectors[:, -rank:]
    return (full @ leading).float(), leading.T.float()


def _dual(x: torch.Tensor, y: torch.Tensor, penalty: float, rank: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same M as Xᵀα, α = (XXᵀ + λ)⁻¹Y. With XXᵀ = Q diag(k) Qᵀ, MᵀXᵀY = ZᵀZ for Z = diag(√(k/(k + λ))) QᵀY, whose
    right singular vectors come from ZZᵀ: nothing d×d is made but M itself, and that only where it is the smaller form."""
    tokens, width = x.shape
    values, vectors = torch.linalg.eigh(_products(x, x))
    values = values.clamp_min(0)
    alpha = ((vectors / (values + penalty)) @ vectors.T).float() @ y
    if rank is None:
        return (x.T, alpha) if 2 * tokens < width else (x.T @ alpha, None)
    turned = vectors * (values / (values + penalty)).sqrt()
    squares, basis = torch.linalg.eigh(turned.T @ _products(y, y) @ turned)
    squares, basis = squares[-rank:], basis[:, -rank:]
    real = squares > squares[-1].clamp_min(1e-30) * 1e-12
    leading = ((turned @ basis[:, real]) / squares[real].sqrt()).float().T @ y
    return x.T @ (alpha @ leading.T), leading


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a bᵀ in double precision, (n, m) and (k, m) -> (n, k), without double copies of either."""
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], _CHUNK):
        out += a[:, start : start + _CHUNK].double() @ b[:, start : start + _CHUNK].double().T
    return out


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
