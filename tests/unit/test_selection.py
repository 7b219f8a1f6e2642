"""IALS (Eq. 3): exact probabilities, frequencies by χ², stability; and the seeded draws around it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fp_server.pruning.selection import draw, probabilities
from fp_server.seeding import draw_devices, rng_for


def test_probabilities_follow_the_equation() -> None:
    s = np.array([0.9, 0.1, 0.5, 0.99])
    groups = ((0, 2), (1,), (3,))
    got = probabilities(s, groups)
    e0, e2 = math.exp(1 - 0.9), math.exp(1 - 0.5)
    assert got[0] == pytest.approx((e0 / (e0 + e2), e2 / (e0 + e2)), abs=1e-15)
    assert got[1:] == ((1.0,), (1.0,))
    assert got[0][1] > got[0][0], "the unit that changes its input more is the likelier"


def test_probabilities_are_stable_far_from_zero() -> None:
    got = probabilities(np.array([-5000.0, -5001.0, 5000.0]), ((0, 1, 2),))[0]
    assert sum(got) == pytest.approx(1.0)
    assert got[1] / got[0] == pytest.approx(math.e)


def test_frequencies_match_the_equation() -> None:
    """χ² over 20,000 draws, each group a multinomial of its own."""
    rng = np.random.default_rng(11)
    s = rng.uniform(0, 1, 30)
    bounds = [0, 1, 3, 7, 12, 14, 20, 30]
    groups = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds))
    chances = probabilities(s, groups)
    counts = np.zeros(30)
    for _ in range(20_000):
        counts[list(draw(groups, chances, rng))] += 1
    statistic = sum(
        float(((counts[list(g)] - 20_000 * np.array(p)) ** 2 / (20_000 * np.array(p))).sum())
        for g, p in zip(groups, chances, strict=True)
    )
    freedom = sum(len(g) - 1 for g in groups)
    print(f"chi2 {statistic:.1f} at {freedom} degrees of freedom, p = {stats.chi2.sf(statistic, freedom):.3f}")
    assert stats.chi2.sf(statistic, freedom) > 0.01
    # The test can tell: uniform draws would fail it.
    uniform = sum(float(((counts[list(g)] - 20_000 / len(g)) ** 2 / (20_000 / len(g))).sum()) for g in groups)
    assert stats.chi2.sf(uniform, freedom) < 1e-12


def test_a_draw_is_in_model_order_one_of_each_group() -> None:
    groups = ((0, 5), (1, 2, 7), (3, 4, 6))
    chances = probabilities(np.zeros(8), groups)
    for seed in range(50):
        drawn = draw(groups, chances, np.random.default_rng(seed))
        assert list(drawn) == sorted(drawn)
        assert [sum(unit in g for unit in drawn) for g in groups] == [1, 1, 1]
        assert drawn == draw(groups, chances, np.random.default_rng(seed))


def test_bad_similarities_and_groups_are_named() -> None:
    with pytest.raises(ValueError, match="unit 2 is inf"):
        probabilities(np.array([0.0, np.inf]), ((0, 1),))
    with pytest.raises(ValueError, match=r"expected \(U,\)"):
        probabilities(np.zeros((2, 2)), ((0,),))
    for groups in (((0,), ()), ((0,), (2,))):
        with pytest.raises(ValueError, match="group 2"):
            probabilities(np.zeros(2), groups)


def test_generators_depend_on_every_part_and_on_nothing_else() -> None:
    base = rng_for(1, 2, "ada", "plan").integers(1 << 60)
    assert base == rng_for(1, 2, "ada", "plan").integers(1 << 60)
    others = [rng_for(*parts) for parts in ((2, 2, "ada", "plan"), (1, 3, "ada", "plan"), (1, 2, "bob", "plan"))]
    others += [rng_for(1, 2, "ada", "sample"), rng_for(1, 2, "adap", "lan"), rng_for(12, 2, "ada", "plan")]
    assert len({base, *(rng.integers(1 << 60) for rng in others)}) == 7
    # A fixed value: another derivation would change every recorded run.
    assert rng_for(0, 0, "", "sample").integers(1 << 32) == 2373692280


def test_devices_are_drawn_uniformly_whatever_their_order() -> None:
    names = [f"d{i}" for i in range(10)]
    first = draw_devices(names, 3, rng_for(0, 0, "", "sample"))
    assert first == draw_devices(names[::-1], 3, rng_for(0, 0, "", "sample"))
    assert len(first) == 3 and list(first) == sorted(first)
    counts = dict.fromkeys(names, 0)
    for round_index in range(2000):
        for name in draw_devices(names, 3, rng_for(0, round_index, "", "sample")):
            counts[name] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert draw_devices(["b", "a"], 5, np.random.default_rng(0)) == ("a", "b")
    assert draw_devices([], 1, np.random.default_rng(0)) == ()
    with pytest.raises(ValueError, match="at least 1"):
        draw_devices(names, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="twice"):
        draw_devices(["a", "a"], 1, np.random.default_rng(0))
