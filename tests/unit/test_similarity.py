"""CKA: exact small cases, the twin by double sums (Eq. 4), invariances, the sample of positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.types import Kernel, Positions
from fp_client.similarity import CkaAccumulator, cka, sample_positions, split


def hsic_eq4(k: np.ndarray, other: np.ndarray) -> float:
    """Eq. 4 as it is written, expectations as means over all pairs."""
    return float((k * other).mean() + k.mean() * other.mean() - 2 * (k.mean(axis=1) * other.mean(axis=1)).mean())


def twin(states: list[torch.Tensor]) -> np.ndarray:
    grams = [(s.double() @ s.double().T).numpy() for s in states]
    return np.array([[hsic_eq4(k, m) / np.sqrt(hsic_eq4(k, k) * hsic_eq4(m, m)) for m in grams] for k in grams])


def test_equals_equation_4() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn((20, width), generator=generator) + 1 for width in (5, 8, 8, 30)]
    np.testing.assert_allclose(cka(states, sample=Positions.RAW), twin(states), atol=1e-6)


def test_same_up_to_rotation_scale_and_shift_is_one_and_order_matters() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((30, 6), generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn((6, 6), generator=generator))
    found = cka([x, 3 * x @ rotation + 2, x.flip(0)], sample=Positions.RAW)
    assert found[0, 1] == pytest.approx(1, abs=1e-6)
    assert found[0, 2] < 0.7


def test_one_huge_token_drives_raw_to_one_and_clean_not() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn((40, 16), generator=generator), torch.randn((40, 16), generator=generator)
    x[7] *= 1000
    y[7] *= 1000
    assert cka([x, y], sample=Positions.RAW)[0, 1] > 0.99
    assert cka([x, y], sample=Positions.CLEAN)[0, 1] < 0.6


def test_rbf_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn((15, 4), generator=generator) for _ in range(3)]

    def kernel(x: torch.Tensor) -> np.ndarray:
        squared = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
        pairs = squared[~torch.eye(len(x), dtype=torch.bool)]
        return torch.exp(-squared / (2 * pairs.median())).numpy()

    grams = [kernel(x) for x in states]
    expected = [[hsic_eq4(k, m) / np.sqrt(hsic_eq4(k, k) * hsic_eq4(m, m)) for m in grams] for k in grams]
    np.testing.assert_allclose(cka(states, Kernel.RBF, Positions.RAW), expected, atol=1e-5)


def test_constant_states_are_unlike_everything_but_themselves() -> None:
    found = cka([torch.ones((10, 3)), torch.randn((10, 3))])
    assert found.tolist() == [[1, 0], [0, 1]]


def test_split_gives_outputs_and_in_out() -> None:
    full = np.arange(16, dtype=np.float32).reshape(4, 4)
    outputs, in_out = split(full)
    assert outputs.tolist() == full[1:, 1:].tolist()
    assert in_out.tolist() == [1, 6, 11]


def test_positions_clean_leaves_out_sinks_and_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert sample_positions(mask, 100, Positions.CLEAN, 0).tolist() == [[0, 1], [0, 2], [1, 1]]
    assert len(sample_positions(mask, 100, Positions.RAW, 0)) == 8


def test_positions_are_seeded_distinct_and_bounded() -> None:
    mask = torch.ones((8, 100), dtype=torch.long)
    first = sample_positions(mask, 50, Positions.CLEAN, 7)
    assert torch.equal(first, sample_positions(mask, 50, Positions.CLEAN, 7))
    assert not torch.equal(first, sample_positions(mask, 50, Positions.CLEAN, 8))
    assert len({tuple(row) for row in first.tolist()}) == 50


def test_accumulator_memory_is_bounded_by_positions_not_width() -> None:
    accumulator = CkaAccumulator(states=3, positions=10)
    for width in (4, 4000, 8):
        accumulator.add(torch.randn((10, width)))
    assert accumulator._grams.numel() == 3 * 100
    assert accumulator.matrix().shape == (3, 3)
