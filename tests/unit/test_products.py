"""Norms and inner products from factors, against the products themselves."""

from __future__ import annotations

import numpy as np
import pytest

from fp_server import products
from fp_server.products import Product, inner_products, moved, norm


def product(seed: int, rank: int, d_out: int = 12, d_in: int = 9) -> Product:
    rng = np.random.default_rng(seed)
    return Product(rng.standard_normal((rank, d_in), np.float32), rng.standard_normal((d_out, rank), np.float32))


def dense(one: Product) -> np.ndarray:
    return one.b.astype(np.float64) @ one.a.astype(np.float64)


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_the_norm_is_the_products(rank: int) -> None:
    one = product(rank, rank)
    assert norm(one) == pytest.approx(np.linalg.norm(dense(one)), rel=1e-12)


def test_what_moved_is_the_scaled_product_less_the_start() -> None:
    trained, start = product(1, 4), product(2, 3)
    assert dense(moved(0.5, trained, start)) == pytest.approx(0.5 * dense(trained) - dense(start), abs=1e-12)
    # Nearly all of it cancels, and what is left is still right.
    near = Product(start.a, start.b * np.float32(2 * (1 + 1e-4)))
    assert norm(moved(0.5, near, start)) == pytest.approx(1e-4 * np.linalg.norm(dense(start)), rel=2e-3)
    nothing = Product(np.empty((0, 9), np.float32), np.empty((12, 0), np.float32))
    assert norm(moved(2.0, trained, nothing)) == pytest.approx(2 * norm(trained), rel=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, 3, 16])
def test_inner_products_whatever_the_ranks_and_how_many_are_read_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "AT_ONCE", at_once)
    all_of_them = [product(seed, rank) for seed, rank in enumerate((2, 5, 1, 3, 4, 2, 7))]
    found = inner_products(len(all_of_them), all_of_them.__getitem__)
    twin = [[float((dense(x) * dense(y)).sum()) for y in all_of_them] for x in all_of_them]
    assert found == pytest.approx(np.array(twin), rel=1e-10, abs=1e-10)
    assert np.array_equal(found, found.T) or np.allclose(found, found.T, rtol=1e-12)
