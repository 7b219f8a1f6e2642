"""Norms and inner products from factors, against the products themselves."""

from __future__ import annotations

import numpy as np
import pytest

from fp_server import products
from fp_server.products import Product, inner_products, moved, reduced


def product(seed: int, rank: int, d_out: int = 12, d_in: int = 9) -> Product:
    rng = np.random.default_rng(seed)
    return Product(rng.standard_normal((rank, d_in), np.float32), rng.standard_normal((d_out, rank), np.float32))


def dense(one: Product) -> np.ndarray:
    return one.b.astype(np.float64) @ one.a.astype(np.float64)


NOTHING = Product(np.empty((0, 9), np.float32), np.empty((12, 0), np.float32))


def cancelling(seed: int, size: float) -> Product:
    """Two columns of B that are equal, and rows of A that cancel but for an ulp of an entry. ‖B·A‖ is some 10⁻⁸ of its parts'."""
    one = product(seed, 2)
    row = (np.abs(one.a[0]) + 1) * np.float32(size)
    other = row.copy()
    other[0] = np.nextafter(row[0], np.float32(np.inf))
    return Product(np.stack([row, -other]), np.repeat(one.b[:, :1], 2, axis=1) * np.float32(size))


@pytest.mark.parametrize("rank", [1, 4, 9, 30])
def test_the_norm_is_the_products(rank: int) -> None:
    one = product(rank, rank)
    small = reduced(one)
    assert small.norm == pytest.approx(np.linalg.norm(dense(one)), rel=1e-12)
    assert dense(small) == pytest.approx(dense(one), abs=1e-12)
    assert small.a @ small.a.T == pytest.approx(np.eye(min(rank, 9)), abs=1e-14)


def test_what_moved_is_the_scaled_product_less_the_start() -> None:
    trained, start = product(1, 4), product(2, 3)
    assert dense(moved(0.5, trained, start)) == pytest.approx(0.5 * dense(trained) - dense(start), abs=1e-12)
    # Nearly all of it cancels, and what is left is still right.
    near = Product(start.a, start.b * np.float32(2 * (1 + 1e-4)))
    assert moved(0.5, near, start).norm == pytest.approx(1e-4 * np.linalg.norm(dense(start)), rel=2e-3)
    assert moved(2.0, trained, NOTHING).norm == pytest.approx(2 * np.linalg.norm(dense(trained)), rel=1e-12)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e12])
def test_factors_that_cancel_hide_nothing(size: float) -> None:
    """Norms, inner products and cosines are the dense products', where the Gram matrices of the factors say 0 or anything."""
    honest = [Product(one.a * np.float32(size), one.b * np.float32(size)) for one in (product(1, 2), product(2, 2))]
    ones = [cancelling(3, size), *honest, cancelling(4, size)]
    twins = [dense(one) for one in ones]
    for one, twin in zip(ones, twins, strict=True):
        assert moved(1.0, one, NOTHING).norm == pytest.approx(np.linalg.norm(twin), rel=1e-6)
    attack = ones[0]
    assert attack.spread > 1e6 * np.linalg.norm(twins[0]) > 0
    b, a = attack.b.astype(np.float64), attack.a.astype(np.float64)
    assert not np.isclose(abs(float(((b.T @ b) * (a @ a.T)).sum())), np.linalg.norm(twins[0]) ** 2, rtol=0.01, atol=0)
    made = [moved(1.0, one, NOTHING) for one in ones]
    found = inner_products(len(made), made.__getitem__)
    norms = np.array([np.linalg.norm(twin) for twin in twins])
    expected = np.array([[float((x * y).sum()) for y in twins] for x in twins])
    assert found / np.outer(norms, norms) == pytest.approx(expected / np.outer(norms, norms), abs=1e-6)


def test_the_spread_is_the_sum_of_the_components_norms() -> None:
    one = product(5, 4)
    parts = [np.linalg.norm(dense(Product(one.a[k : k + 1], one.b[:, k : k + 1]))) for k in range(4)]
    assert one.spread == pytest.approx(sum(parts), rel=1e-12) and one.spread >= np.linalg.norm(dense(one))
    assert NOTHING.spread == 0.0


@pytest.mark.parametrize("at_once", [1, 2, 3, 16])
def test_inner_products_whatever_the_ranks_and_how_many_are_read_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "AT_ONCE", at_once)
    all_of_them = [product(seed, rank) for seed, rank in enumerate((2, 5, 1, 3, 4, 2, 7))]
    found = inner_products(len(all_of_them), lambda index: reduced(all_of_them[index]))
    twin = [[float((dense(x) * dense(y)).sum()) for y in all_of_them] for x in all_of_them]
    assert found == pytest.approx(np.array(twin), rel=1e-10, abs=1e-10)
    assert np.array_equal(found, found.T) or np.allclose(found, found.T, rtol=1e-12)
