"""The baseline: uniform draws of units, with the device's limits and nothing measured."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from test_rounds import Shell, kinds

from common.errors import BudgetError
from fp_server import commands as c
from fp_server import events as e
from fp_server.methods import METHODS, PlanInputs
from fp_server.methods.base import REDRAWS
from fp_server.work import choose_units

METHOD = METHODS["random"]
NOTHING = np.empty((0, 0), np.float32), np.empty(0, np.float32)


def inputs(capacity: int, sizes: tuple[int, ...], limit: int | None = None) -> PlanInputs:
    return PlanInputs(*NOTHING, capacity, sizes, limit)


def test_every_set_of_units_is_as_likely_as_any_other():
    """10 sets of 2 of 5: 4,000 draws, 400 expected of each; 5 standard deviations are 95."""
    rng = np.random.default_rng(0)
    seen = Counter(METHOD.plan(inputs(2, (1,) * 5), rng).units for _ in range(4000))
    assert set(seen) == set(combinations(range(5), 2))
    assert all(abs(count - 400) < 95 for count in seen.values()), seen


def test_only_sets_that_fit_are_drawn_and_those_equally():
    """Sizes 1 1 1 3: of the 6 pairs the 3 without the last unit fit in 3 bytes."""
    rng = np.random.default_rng(0)
    draws = [METHOD.plan(inputs(2, (1, 1, 1, 3), 3), rng) for _ in range(3000)]
    seen = Counter(draw.units for draw in draws)
    assert set(seen) == {(0, 1), (0, 2), (1, 2)} and all(abs(count - 1000) < 130 for count in seen.values())
    assert 0.8 < sum(draw.redraws for draw in draws) / 3000 < 1.2 and {draw.reductions for draw in draws} == {0}


def test_a_draw_that_can_never_fit_is_smaller_and_says_so():
    draw = METHOD.plan(inputs(3, (10,) * 6, 25), np.random.default_rng(0))
    assert (len(draw.units), draw.reductions, draw.redraws, draw.groups, draw.probabilities) == (2, 1, REDRAWS, (), ())
    assert METHOD.plan(inputs(9, (1,) * 4), np.random.default_rng(0)).units == (0, 1, 2, 3)
    rare = [METHOD.plan(inputs(1, (*(99,) * 400, 10), 10), np.random.default_rng(seed)).units for seed in range(5)]
    assert rare == [(400,)] * 5
    with pytest.raises(BudgetError, match="smallest takes 10"):
        METHOD.plan(inputs(2, (10, 12), 9), np.random.default_rng(0))


def test_the_same_generator_gives_the_same_units_and_the_weights_are_fedpruners():
    one, other = (METHOD.plan(inputs(3, (1,) * 9), np.random.default_rng(4)) for _ in range(2))
    assert one == other and list(one.units) == sorted(set(one.units))
    samples = {"b": 300, "a": 100}
    assert METHOD.weights(samples) == METHODS["fedpruner"].weights(samples) == {"a": 0.25, "b": 0.75}


def test_a_round_without_similarities():
    shell = Shell(method="random")
    shell.join("a", "b")
    key = shell.key
    task = shell.machine.task("a").task
    assert not METHOD.probes and not task.similarity and not shell.machine.current.opened.evaluate
    assert kinds(shell.do(e.ProbeReceived("r", key, "a", *NOTHING, 2.0, 10, 1, 1.0))) == ["Choose"]
    event = choose_units(shell.machine, key, "a")
    assert len(event.units) == 2 and event.groups == event.probabilities == ()
    (sent,) = shell.do(event)
    assert isinstance(sent, c.SendAssignment) and e.decode(*e.encode(event)) == event
    fedpruner = Shell()
    fedpruner.join("a", "b")
    assert fedpruner.machine.task("a").task.similarity
