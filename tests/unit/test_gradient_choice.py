"""Which gradient mode a device trains in: the choice of "auto", its event, what it is sent, and the update's limit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_rounds import MANIFEST, Shell, assigned, committed, kinds

from common.errors import BudgetError
from common.types import Capacity, Gradient, PlanReport, UnitId
from fp_server import commands as c
from fp_server import events as e
from fp_server.capacity import choose_capacity, plan_problem, refusal
from fp_server.methods import METHODS, PlanInputs
from fp_server.status import status
from fp_server.work import choose_units

SUB, STI, STR, AUTO = Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED, Gradient.AUTO


def report(*capacities: Capacity, refused: str = "") -> PlanReport:
    return PlanReport("r", 10, "ab" * 32, capacities, (1,) * 4, 7, refused)


def modes(submodel=None, stitched=None, streamed=None) -> PlanReport:
    """A device that holds the modes which have predicted seconds a step."""
    return report(*(
        Capacity(mode, 2, index + 1, True, 5, seconds)
        for index, (mode, seconds) in enumerate(((SUB, submodel), (STI, stitched), (STR, streamed)))
        if seconds is not None
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("held", "limit", "chosen"),
    [
        (modes(1, 2, 9), 0, STR),
        (modes(1, 2), 0, STI),
        (modes(1), 0, SUB),
        (modes(), 0, None),
        (modes(1, 2, 9), 9.0, STR),
        (modes(1, 2, 9), 8.9, STI),
        (modes(1, 2, 9), 1.5, SUB),
        (modes(2, 1.9, 9), 0.5, STI),
        (modes(None, 4, 3), 0.5, STR),
        (modes(0, 0, 0), 0, STR),
        (modes(0, 0, 0), 5.0, SUB),
        (modes(0, 0, 7), 5.0, STR),
        (modes(0, 4, 0), 5.0, STI),
        (modes(2, 2, 2), 1.0, SUB),
    ],
)
def test_auto_takes_the_best_fidelity_within_the_limit_or_else_the_fastest(held, limit, chosen):
    """A prediction of 0 is none: known to be within no limit, and slower than any that is known."""
    found = choose_capacity(held, AUTO, limit)
    assert (found and found.gradient) == chosen
    reordered = dataclasses.replace(held, capacities=held.capacities[::-1])
    assert choose_capacity(reordered, AUTO, limit) == found, "the order a device names them in does not matter"


@pytest.mark.parametrize(
    ("submodel", "stitched", "streamed", "chosen"),
    [
        (8, 8, 4, STR),  # half as many units: the better gradient counts more
        (8, 8, 3, STI),
        (4, 1, 1, STR),  # a submodel's units count for little
        (10, 1, 1, SUB),  # unless it is the whole model
        (10, 5, 1, STI),
        (8, 0, 1, STR),
    ],
)
def test_within_a_limit_few_units_do_not_win_by_their_gradient(submodel, stitched, streamed, chosen):
    """A slow device that must stream plans one unit to be within the limit, where a stitched submodel would keep eight."""
    units = ((SUB, submodel), (STI, stitched), (STR, streamed))
    held = dataclasses.replace(report(*(Capacity(mode, n, 1, True, 5, 1.0) for mode, n in units if n)), unit_bytes=(1,) * 10)
    found = choose_capacity(held, AUTO, 2.0)
    assert found is not None and found.gradient == chosen
    found = choose_capacity(held, AUTO, 0)
    assert found is not None and found.gradient == STR, "without a limit memory alone decides"


def test_no_other_mode_stands_in_for_a_fixed_one_and_one_over_the_limit_is_refused():
    """A device plans fewer units to be within the limit: what is over it would be one unit, and late all the same."""
    held = modes(1, None, 9)
    assert choose_capacity(held, STR, 9.0).step_seconds == choose_capacity(held, STR, 0).step_seconds == 9
    assert choose_capacity(held, STI, 0) is None and choose_capacity(held, STR, 8.9) is None
    assert "expects 9 s of a streamed step even with one unit, the run allows 2 (train.step_seconds)" in refusal(held, STR, 2.0)
    assert choose_capacity(report(Capacity(STR, 0, 1, True, 5), Capacity(SUB, 1, 1, True, 5)), AUTO, 0).gradient is SUB
    assert choose_capacity(report(Capacity(STR, 0, 1, True, 5)), STR, 0) is None


def test_why_a_device_can_not():
    assert refusal(modes(1, None, 9), STI) == 'can\'t train with gradient = "stitched" (it can with: submodel, streamed)'
    assert refusal(report(refused="too small"), STI) == "too small" and "smallest submodel" in refusal(report(), AUTO)


def test_plans_that_name_no_real_mode():
    good = modes(1, 2, 9)
    units = tuple(UnitId(index) for index in range(4))
    assert plan_problem(good, MANIFEST, units) == ""
    for change in (Capacity(AUTO, 2, 1, True, 5), Capacity(SUB, 3, 1, True, 5)):
        assert "gradient mode" in plan_problem(report(*good.capacities, change), MANIFEST, units)
    for seconds in (-2.0, 1e300):
        assert "negative step time, or one above 1e+09" in plan_problem(modes(1, seconds), MANIFEST, units)


def join(shell: Shell, **reports: PlanReport) -> None:
    for device, made in reports.items():
        shell.do(c.Connected(device), e.PlanReceived("r", device, made, 10))


def test_each_device_trains_in_its_own_mode_and_the_event_says_which():
    shell = Shell('[train]\ngradient = "auto"\nstep_seconds = 3.0\n')
    join(shell, a=modes(1, 2, 2.5), b=modes(1, 2, 9))
    assert shell.machine.spec.train.gradient is AUTO and shell.machine.spec.step_seconds == 3.0
    shell.probe("a", "b")
    for device, mode, micro_batch in (("a", STR, 3), ("b", STI, 2)):
        event = choose_units(shell.machine, shell.key, device)
        assert (event.gradient, event.micro_batch) == (mode, micro_batch), "the capacity of that very mode"
        (sent,) = shell.do(event)
        assert sent.assignment.spec.gradient is mode and sent.assignment == shell.machine.assignment(device, shell.key)
    made = status(shell.machine, "", [])
    assert made["gradient"] == "auto" and made["devices"]["a"]["gradient"] == "streamed"
    assert made["devices"]["b"]["step_seconds"] == 2 and made["current"]["devices"]["b"]["gradient"] == "stitched"


def test_a_device_without_the_runs_mode_is_left_out_with_the_reason():
    shell = Shell('[train]\ngradient = "streamed"\n')
    join(shell, z=modes(1, 2), a=modes(1, 2, 3), b=modes(None, None, 3))
    why = 'can\'t train with gradient = "streamed" (it can with: submodel, stitched)'
    assert shell.machine.current.opened.excluded == {"z": why} and shell.machine.current.opened.drawn == ("a", "b")
    assert status(shell.machine, "", [])["devices"]["z"]["refusal"] == why and shell.machine.capacity("z") is None


@pytest.mark.parametrize(
    ("mode", "extra", "layers"), [(SUB, "", (0,)), (STI, "", (0, 1)), (STR, "", (0, 1)), (SUB, "fidelity = true\n", (0, 1))]
)
def test_who_runs_more_than_its_submodel_is_sent_the_whole_models_adapter(mode, extra, layers):
    shell = Shell(f'[train]\ngradient = "{mode}"\n{extra}')
    join(shell, a=modes(1, 1, 1), b=modes(1, 1, 1))
    for device in ("a", "b"):
        shell.probe(device)
        shell.assign(device)
    shell.accept("a", "b")
    first = committed(shell.key)
    shell.do(dataclasses.replace(first, units=(first.units[0], dataclasses.replace(first.units[0], layer=1))))
    shell.probe("a")
    (sent,) = shell.do(dataclasses.replace(assigned(shell.key, "a"), gradient=mode))  # layers 1 and 4
    assert tuple(item.layer for item in sent.assignment.adapter) == layers and sent.assignment.spec.fidelity is bool(extra)
    assert shell.machine.may_fetch("a") == {item.ref.digest for item in sent.assignment.adapter}
    assert kinds([sent]) == ["SendAssignment"]


def test_an_update_never_has_more_than_its_limit():
    """One module of 8×8 at rank 16: a layer's tensors take 1,024 bytes."""
    for limit, most in ((0, 3), (5000, 3), (2500, 2), (1024, 1)):
        shell = Shell(f"[limits]\nupdate_bytes = {limit}\n")
        shell.join("a", "b", units=3)
        shell.probe("a")
        event = choose_units(shell.machine, shell.key, "a")
        assert len(event.units) == most and event.reductions == event.redraws == 0, "known before the groups are made"


def test_both_limits_hold_for_every_draw():
    """Units 0–5 are large on the device, 6–11 large on the wire; three of a kind are too many of it."""
    device, wire = (30,) * 6 + (10,) * 6, (10,) * 6 + (30,) * 6
    similarity = np.ones((12, 12)) - 0.5 * (1 - np.eye(12))
    for seed in range(20):
        inputs = PlanInputs(similarity, np.full(12, 0.5), 4, device, 80, "k", wire, 80)
        draw = METHODS["fedpruner"].plan(inputs, np.random.default_rng(seed))
        assert sum(device[unit] for unit in draw.units) <= 80 and sum(wire[unit] for unit in draw.units) <= 80


def test_a_device_that_lost_its_mode_meanwhile_says_which_it_has():
    shell = Shell(extra='[train]\ngradient = "stitched"\n')
    join(shell, a=modes(1, 2), b=modes(1, 2))
    key = shell.machine.current.opened.key
    shell.probe("a")
    shell.do(e.PlanReceived("r", "a", modes(1), 10))
    with pytest.raises(BudgetError, match=r"train in this run: can.t train with gradient = .stitched. \(it can with: submodel\)"):
        choose_units(shell.machine, key, "a")
