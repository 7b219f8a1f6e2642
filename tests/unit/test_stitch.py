"""Surrogates of gaps against slow twins: np.linalg.lstsq on the rows that weights and ridge amount to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.types import Stitch
from fp_client.stitch import Surrogate, fit, inverse_norms

TALL, WIDE, FEW = (60, 12), (20, 24), (9, 24)
"""(n, d): more tokens than features, fewer, and so few that the factors of the dual are the smaller form."""


def states(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, outputs and weights of a noisy map, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    n, d = shape
    inputs = torch.randn((n, d), generator=generator) + 2
    matrix = torch.randn((d, d), generator=generator) / d**0.5
    outputs = inputs + inputs @ matrix + 0.3 * torch.randn((n, d), generator=generator) - 1
    return inputs, outputs, torch.rand(n, generator=generator) + 0.1


def twin(
    inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, ridge: float, rank: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(M, shift) by least squares on weighted, centred rows and one row √λ·e_i a feature; rank by the SVD of its fit."""
    x, y, w = (tensor.double().numpy() for tensor in (inputs, outputs - inputs, weights))
    w = w / w.sum()
    mx, my = w @ x, w @ y
    xs, ys = np.sqrt(w)[:, None] * (x - mx), np.sqrt(w)[:, None] * (y - my)
    d = x.shape[1]
    penalty = ridge * np.trace(xs.T @ xs) / d
    rows = np.vstack([xs, np.sqrt(penalty) * np.eye(d)])
    matrix = np.linalg.lstsq(rows, np.vstack([ys, np.zeros((d, d))]), rcond=None)[0]
    if rank is not None:
        right = np.linalg.svd(rows @ matrix)[2][:rank]
        matrix = matrix @ right.T @ right
    return matrix, my - mx @ matrix


@pytest.mark.parametrize("shape", [TALL, WIDE, FEW])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize(("kind", "rank"), [(Stitch.AFFINE, None), (Stitch.LOW_RANK, 3)])
def test_equals_least_squares(shape: tuple[int, int], ridge: float, kind: Stitch, rank: int | None) -> None:
    inputs, outputs, weights = states(shape)
    matrix, shift = twin(inputs, outputs, weights, ridge, rank)
    surrogate = fit(kind, inputs, outputs, rank=rank or 64, ridge=ridge, weights=weights)
    fresh = torch.randn((2, 5, shape[1]), generator=torch.Generator().manual_seed(9))
    expected = fresh.double().numpy() @ (np.eye(shape[1]) + matrix) + shift
    np.testing.assert_allclose(surrogate(fresh, "mask", use_cache=False).numpy(), expected, atol=2e-5)
    if kind is Stitch.LOW_RANK:
        assert surrogate.down is not None and surrogate.down.shape == (shape[1], 3)
        assert surrogate.nbytes == 4 * (2 * 3 * shape[1] + shape[1])


def test_a_rank_beyond_the_data_is_the_affine_map() -> None:
    for shape in (TALL, WIDE, FEW):
        inputs, outputs, _ = states(shape, seed=1)
        low, full = (fit(kind, inputs, outputs, rank=100) for kind in (Stitch.LOW_RANK, Stitch.AFFINE))
        torch.testing.assert_close(low(inputs), full(inputs), atol=2e-5, rtol=0)


def test_shift_is_the_weighted_mean_change() -> None:
    inputs, outputs, weights = states(TALL)
    surrogate = fit(Stitch.SHIFT, inputs, outputs, weights=weights)
    expected = np.average((outputs - inputs).numpy(), axis=0, weights=weights.numpy())
    np.testing.assert_allclose(surrogate(inputs).numpy(), inputs.numpy() + expected, atol=1e-5)
    assert surrogate.nbytes == 4 * TALL[1]


def test_a_strong_ridge_leads_to_the_shift_and_a_weak_one_to_the_map_that_is_there() -> None:
    inputs, _, _ = states(TALL, seed=2)
    matrix = torch.randn((TALL[1], TALL[1]), generator=torch.Generator().manual_seed(3))
    outputs = inputs @ matrix + 4
    shift = fit(Stitch.SHIFT, inputs, outputs)
    torch.testing.assert_close(fit(Stitch.AFFINE, inputs, outputs, ridge=1e9)(inputs), shift(inputs), atol=1e-3, rtol=0)
    unseen = states(TALL, seed=4)[0]
    torch.testing.assert_close(fit(Stitch.AFFINE, inputs, outputs, ridge=1e-8)(unseen), unseen @ matrix + 4, atol=1e-2, rtol=0)


def test_a_sink_token_does_not_decide_the_map() -> None:
    inputs, outputs, _ = states(TALL, seed=5)
    sunk_in, sunk_out = inputs.clone(), outputs.clone()
    sunk_in[0], sunk_out[0] = inputs[0] * 3, torch.full((TALL[1],), 1e5)
    clean = fit(Stitch.SHIFT, inputs[1:], outputs[1:])(inputs) - inputs
    default = fit(Stitch.SHIFT, sunk_in, sunk_out)(inputs) - inputs
    equal = fit(Stitch.SHIFT, sunk_in, sunk_out, weights=torch.ones(TALL[0]))(inputs) - inputs
    assert (equal - clean).norm() > 100 * (default - clean).norm()
    np.testing.assert_allclose(inverse_norms(sunk_out)[0], 1 / (1e5 * TALL[1] ** 0.5), rtol=1e-5)


def test_few_tokens_keep_factors_and_take_less_memory() -> None:
    few, wide = (fit(Stitch.AFFINE, *states(shape)[:2]) for shape in (FEW, WIDE))
    assert few.up is not None and few.nbytes == 4 * (2 * FEW[0] * FEW[1] + FEW[1])
    assert wide.up is None and wide.nbytes == 4 * (WIDE[1] ** 2 + WIDE[1])


@pytest.mark.parametrize("kind", list(Stitch))
def test_frozen_and_differentiable(kind: Stitch) -> None:
    inputs, outputs, _ = states(WIDE)
    surrogate = fit(kind, inputs, outputs, rank=4)
    assert not list(surrogate.parameters()) and not any(buffer.requires_grad for buffer in surrogate.buffers())
    hidden = torch.randn((1, 3, WIDE[1]), requires_grad=True)
    surrogate(hidden).sum().backward()
    change = (surrogate(torch.eye(WIDE[1])) - surrogate(torch.zeros(1, WIDE[1]))).sum(1)  # (I + M)·1
    torch.testing.assert_close(hidden.grad, change.expand(1, 3, -1), atol=1e-4, rtol=0)
    assert surrogate(hidden.bfloat16()).dtype is torch.bfloat16


def test_same_map_after_saving() -> None:
    inputs, outputs, _ = states(WIDE)
    first = fit(Stitch.LOW_RANK, inputs, outputs, rank=4)
    assert first.down is not None and first.up is not None
    again = Surrogate(*(torch.zeros_like(buffer) for buffer in (first.shift, first.down, first.up)))
    again.load_state_dict(first.state_dict())
    assert torch.equal(first(inputs), again(inputs))


def test_wrong_input_is_refused() -> None:
    inputs, outputs, _ = states(TALL)
    with pytest.raises(DataError, match="at least 2 token positions, the probe batch gave 1"):
        fit(Stitch.SHIFT, inputs[:1], outputs[:1])
    with pytest.raises(DataError, match="not finite"):
        fit(Stitch.AFFINE, inputs, outputs * float("inf"))
    with pytest.raises(ValueError, match=r"both be \(n, d\), got \(60, 12\) and \(59, 12\)"):
        fit(Stitch.AFFINE, inputs, outputs[:-1])
    for wrong in ({"ridge": 0.0}, {"ridge": float("nan")}, {"rank": 0}, {"weights": torch.zeros(60)}, {"weights": torch.ones(3)}):
        with pytest.raises(ValueError, match=r"ridge must be|weights must be"):
            fit(Stitch.AFFINE, inputs, outputs, **wrong)
    with pytest.raises(ValueError, match="width 12 can't"):
        Surrogate(torch.zeros(12), torch.zeros(12, 3))
    with pytest.raises(ValueError, match="width 12 can't"):
        Surrogate(torch.zeros(12), torch.zeros(12, 3), torch.zeros(3, 11))
