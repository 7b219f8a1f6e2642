"""The server half of FedPruner: fitting draws, redraws, reductions, weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from common.errors import BudgetError
from fp_server.methods import METHODS, PlanInputs
from fp_server.methods.base import REDRAWS
from fp_server.methods.fedpruner import FedPruner
from fp_server.pruning.grouping import group
from fp_server.pruning.selection import draw, probabilities

METHOD = METHODS["fedpruner"]


def inputs(units: int = 12, capacity: int = 4, limit: int | None = None, sizes: tuple[int, ...] | None = None) -> PlanInputs:
    rng = np.random.default_rng(3)
    s = rng.uniform(0.2, 1, (units, units)).astype(np.float32)
    return PlanInputs((s + s.T) / 2, rng.uniform(0, 1, units).astype(np.float32), capacity, sizes or (10,) * units, limit)


def test_the_method_is_registered_under_its_name() -> None:
    assert isinstance(METHOD, FedPruner) and METHOD.name == "fedpruner" and METHOD.probes


def test_without_a_tight_limit_a_plan_is_fdlo_then_ials() -> None:
    """Twin: the two algorithms called one after the other."""
    given = inputs(limit=40)
    rng = np.random.default_rng(9)
    groups = group(given.similarity, 4, rng)
    chances = probabilities(given.in_out, groups)
    units = draw(groups, chances, rng)
    got = METHOD.plan(given, np.random.default_rng(9))
    assert (got.groups, got.probabilities, got.units, got.redraws, got.reductions) == (groups, chances, units, 0, 0)
    assert got == METHOD.plan(dataclasses.replace(given, limit_bytes=None), np.random.default_rng(9))


def test_eigenvectors_option_reaches_the_grouping() -> None:
    given = dataclasses.replace(inputs(), eigenvectors="k-1")
    assert METHOD.plan(given, np.random.default_rng(9)).groups == group(given.similarity, 4, np.random.default_rng(9), "k-1")


def test_group_sizes_option_reaches_the_grouping() -> None:
    given = dataclasses.replace(inputs(), group_sizes="even")
    groups = METHOD.plan(given, np.random.default_rng(9)).groups
    assert groups == group(given.similarity, 4, np.random.default_rng(9), sizes="even")
    assert groups != METHOD.plan(inputs(), np.random.default_rng(9)).groups


def test_a_capacity_beyond_the_model_takes_all_of_it() -> None:
    assert METHOD.plan(inputs(units=5, capacity=9), np.random.default_rng(0)).units == (0, 1, 2, 3, 4)


def test_draws_that_do_not_fit_are_redrawn_and_counted() -> None:
    sizes = (10, 30) * 6
    seen = set()
    for seed in range(40):
        got = METHOD.plan(inputs(limit=60, sizes=sizes), np.random.default_rng(seed))
        assert sum(sizes[unit] for unit in got.units) <= 60
        assert len(got.units) == len(got.groups) == 4 - got.reductions
        assert got == METHOD.plan(inputs(limit=60, sizes=sizes), np.random.default_rng(seed))
        seen.add(got.redraws)
    assert len(seen) > 1 and max(seen) >= 1


def test_groups_are_reduced_when_redrawing_can_not_help() -> None:
    """Four units of 10 never fit in 25: after 32 redraws each, 4 and 3 groups give way to 2."""
    got = METHOD.plan(inputs(limit=25), np.random.default_rng(0))
    assert (len(got.units), got.reductions, got.redraws) == (2, 2, 2 * REDRAWS)


def test_a_rare_unit_that_alone_fits_is_found() -> None:
    given = dataclasses.replace(inputs(units=40, capacity=1, limit=10, sizes=(*(99,) * 39, 10)), in_out=np.zeros(40))
    units = {METHOD.plan(given, np.random.default_rng(seed)).units for seed in range(10)}
    assert units == {(39,)}


def test_nothing_fits_names_the_smallest_that_would() -> None:
    with pytest.raises(BudgetError, match="smallest takes 10") as caught:
        METHOD.plan(inputs(limit=9), np.random.default_rng(0))
    assert caught.value.smallest == 10


def test_inputs_of_different_models_are_refused() -> None:
    with pytest.raises(ValueError, match="do not describe the same units"):
        METHOD.plan(dataclasses.replace(inputs(), in_out=np.zeros(11)), np.random.default_rng(0))


def test_weights_are_shares_of_the_samples_of_the_holders() -> None:
    weights = METHOD.weights({"b": 300, "a": 100})
    assert weights == {"a": 0.25, "b": 0.75} and list(weights) == ["a", "b"]
    assert METHOD.weights({}) == {}
    assert sum(METHOD.weights({f"d{i}": i + 1 for i in range(97)}).values()) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="'a' has 0 samples"):
        METHOD.weights({"a": 0})
