"""The planner's gradient modes: what each can hold, what it gives up for memory, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import BudgetError
from common.types import Gradient, Part, PlanReport, ProbeSpec, Quantization, TrainSpec, UnitId, model_units
from fp_client.fitting import LEAST, Problem, fit
from fp_client.memory import MIB, Held, Setting, StreamPlan, layer_bytes, lora_bytes
from fp_client.memory_stream import Streamed, boundary_total, streamed_peak
from fp_client.pace import Pace, prepare_seconds, step_seconds
from fp_client.planner import Limits, ModePlan, Plan, plan, plan_task
from fp_client.shapes import CONFIGS, Shape, shape_of
from fp_server.capacity import byte_limit

ALL = tuple(module.name for module in shape_of(CONFIGS["smollm2-135m"]).modules)
SMALL, SEVEN = shape_of(CONFIGS["smollm2-135m"]), shape_of(CONFIGS["llama2-7b"])
PROBE = ProbeSpec(batch_size=4, sequence_length=128)
PACE = Pace(4, 0.02, 0.05, 0.03, 0.08, 0.004, 0.1, 0.05, 0.01)


def spec(gradient: Gradient = Gradient.AUTO, **changes: Any) -> TrainSpec:
    return replace(TrainSpec(10, 4, 128, 1e-4, 16, 32.0, ALL, 0, gradient=gradient), **changes)


def planned(budget: int, gradient: Gradient = Gradient.AUTO, part: Part = Part.LAYER, **rest: Any) -> Plan:
    limits, pace = rest.pop("limits", None), rest.pop("pace", None)
    return plan(CONFIGS["smollm2-135m"], Setting(stored=2), spec(gradient, **rest), PROBE, 0, budget * MIB, 8, part, limits, pace)


def mode(found: Plan, gradient: Gradient) -> ModePlan:
    one = found.mode(gradient)
    assert one is not None
    return one


def test_a_run_gets_the_modes_it_asks_for_and_the_budget_holds() -> None:
    every = (Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED)
    assert tuple(c.gradient for c in planned(400).capacities) == every
    assert [c.gradient for c in planned(400, Gradient.STITCHED).capacities] == [Gradient.STITCHED]
    floors = dict(planned(0).smallest)
    assert floors[Gradient.STREAMED] < floors[Gradient.SUBMODEL] < floors[Gradient.STITCHED]
    between = -(-floors[Gradient.STREAMED] // MIB)
    assert [c.gradient for c in planned(between).capacities] == [Gradient.STREAMED]
    with pytest.raises(BudgetError) as caught:
        planned(between - 2)
    assert caught.value.smallest == floors[Gradient.STREAMED]


def test_streaming_holds_more_units_than_a_submodel() -> None:
    found = planned(300)
    assert mode(found, Gradient.STREAMED).units == SMALL.layers > 3 * mode(found, Gradient.SUBMODEL).units
    assert mode(found, Gradient.STITCHED).units <= mode(found, Gradient.SUBMODEL).units


def test_without_a_bound_everything_useful_stays() -> None:
    stream = mode(planned(0), Gradient.STREAMED).stream
    assert stream == StreamPlan(resident=SMALL.layers, ahead=True, head=True, boundary_bytes=-1, prefix_bytes=-1)
    assert mode(planned(0), Gradient.STITCHED).stream.boundary_bytes == -1


def test_memory_goes_to_the_head_then_reading_ahead_then_layers_then_activations() -> None:
    seen = []
    for budget in range(102, 900, 4):
        one = mode(planned(budget, Gradient.STREAMED), Gradient.STREAMED)
        assert one.train.peak <= budget * MIB
        if one.units == SMALL.layers and one.micro_batch == 4:
            s = one.stream
            seen.append((s.head, s.ahead, s.resident))
            total = boundary_total(SMALL, Setting(stored=2), spec(), 0)
            assert s.boundary_bytes == -1 or s.boundary_bytes <= total
            if s.resident and s.resident < SMALL.layers:
                more = replace(s, resident=s.resident + 1, boundary_bytes=0, prefix_bytes=0)
                held = Streamed(Held(SMALL.layers), 0, 4)
                assert streamed_peak(SMALL, Setting(stored=2), spec(), 0, held, more).peak > budget * MIB
    assert seen[-1] == (True, True, SMALL.layers)
    assert {head for head, _, _ in seen} == {False, True}


def test_components_count_two_a_layer_and_any_draw_within_the_bytes_fits() -> None:
    for gradient in (Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED):
        found = planned(330, gradient, Part.FFN)
        one = found.modes[0]
        assert len(found.unit_bytes) == 2 * SMALL.layers and one.units % 2 == 0
        whole = planned(330, gradient).modes[0]
        assert one.units <= 2 * whole.units
        limit = one.units // 2 * sum(found.unit_bytes[:2])
        units = model_units(Part.FFN, SMALL.layers)
        for draw in (
            [*units[: one.units]],
            [*units[1::2], *units[::2]],
            [*units[::2], *units[1::2]],
            [*units[::-3], *units[::5]],
        ):
            taken: list[UnitId] = []
            for unit in dict.fromkeys(draw):
                size = sum(found.unit_bytes[2 * u.layer + (u.part is Part.FFN)] for u in [*taken, unit])
                if len(taken) < one.units and size <= limit:
                    taken.append(unit)
            task = plan_task(SMALL, Setting(stored=2), spec(gradient), 0, taken, one.micro_batch, one.checkpointing, 330 * MIB)
            assert task.peak <= 330 * MIB


PARTIAL = ("mlp.down_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize("targets", [ALL, PARTIAL, ("mlp.up_proj", "self_attn.q_proj")], ids=["all", "partial", "two"])
@pytest.mark.parametrize(
    ("name", "rank", "budget", "quantization"),
    [("smollm2-135m", 256, 700, Quantization.NONE), ("smollm2-135m", 16, 130, Quantization.NONE),
     ("llama2-7b", 64, 1500, Quantization.NF4), ("llama2-7b", 256, 2500, Quantization.NF4)],
)  # fmt: skip
@pytest.mark.parametrize("gradient", [Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED])
def test_every_draw_of_components_that_the_server_makes_fits(
    name: str, rank: int, budget: int, quantization: Quantization, targets: tuple[str, ...], gradient: Gradient
) -> None:
    setting, train = Setting(quantization, 2, 2), spec(gradient, rank=rank, targets=targets)
    try:
        found = plan(CONFIGS[name], setting, train, PROBE, 0, budget * MIB, 8, Part.FFN)
    except BudgetError:
        pytest.skip("the budget holds nothing in this mode")
    shape, one = shape_of(CONFIGS[name]), found.modes[0]
    units = model_units(Part.FFN, shape.layers)
    report = PlanReport("r", 10, "ab" * 32, found.capacities, found.unit_bytes, 0)
    limit, rng = byte_limit(report, one.capacity, units), np.random.default_rng(0)
    for _ in range(12):
        # As many attention parts as a draw can have, or any mix: what the server checks is the bytes and the number.
        share = rng.choice([1.0, rng.random()])
        parts = sorted(units, key=lambda unit: (unit.part is Part.FFN) == (share == 1.0 or rng.random() < share))
        draw = sorted([parts[index] for index in rng.permutation(one.units)] if share == 1.0 else parts[: one.units])
        if sum(found.unit_bytes[units.index(unit)] for unit in draw) > limit:
            continue
        task = plan_task(shape, setting, train, 0, draw, one.micro_batch, one.checkpointing, budget * MIB)
        assert task.peak <= budget * MIB


def test_two_attention_blocks_cost_less_than_two_feed_forwards() -> None:
    def peak(gradient: Gradient, part: Part) -> int:
        units = [UnitId(3, part), UnitId(9, part)]
        return plan_task(SMALL, Setting(), spec(gradient), 16, units, 4, True, 0).peak

    def both(gradient: Gradient) -> int:
        units = [UnitId(layer, part) for layer in (3, 9) for part in (Part.ATTENTION, Part.FFN)]
        return plan_task(SMALL, Setting(), spec(gradient), 16, units, 4, True, 0).peak

    for gradient in (Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED):
        assert peak(gradient, Part.ATTENTION) < peak(gradient, Part.FFN) < both(gradient)
        whole = plan_task(SMALL, Setting(), spec(gradient), 16, [UnitId(3), UnitId(9)], 4, True, 0).peak
        assert both(gradient) == whole
    for setting in (Setting(), Setting(Quantization.NF4)):
        parts = sum(layer_bytes(SEVEN, setting, part) for part in (Part.ATTENTION, Part.FFN))
        assert parts == layer_bytes(SEVEN, setting)


@pytest.mark.parametrize("shape", [SMALL, SEVEN], ids=["small", "7b"])
@pytest.mark.parametrize("low", [0, 5, 29])
def test_every_assignment_of_as_many_units_fits(shape: Shape, low: int) -> None:
    setting = Setting(Quantization.NF4, 2, 2)
    name = "smollm2-135m" if shape is SMALL else "llama2-7b"
    for gradient in (Gradient.STITCHED, Gradient.STREAMED):
        for budget in (260, 700, 1500):
            try:
                one = plan(CONFIGS[name], setting, spec(gradient), PROBE, 16, budget * MIB, 8).modes[0]
            except BudgetError:
                continue
            units = [UnitId(i) for i in range(low, shape.layers)][: one.units]
            task = plan_task(shape, setting, spec(gradient), 16, units, one.micro_batch, one.checkpointing, budget * MIB)
            assert task.peak <= budget * MIB
            assert task.stream.resident <= shape.layers - low


def test_an_update_limit_bounds_the_units() -> None:
    one = lora_bytes(SMALL, spec())
    for part, factor in ((Part.LAYER, 1), (Part.FFN, 2)):
        found = planned(0, part=part, limits=Limits(update_bytes=8 * one + 1))
        assert [m.units for m in found.modes] == [8 * factor] * 3


def test_a_step_limit_bounds_the_units_where_units_cost_time() -> None:
    free = planned(0, pace=PACE)
    times = {m.gradient: m.step_seconds for m in free.modes}
    assert 0 < times[Gradient.SUBMODEL] < times[Gradient.STREAMED]
    assert times[Gradient.STITCHED] == times[Gradient.SUBMODEL], "all units leave no gap to pass through first"
    limit = times[Gradient.SUBMODEL] / 2
    held = planned(0, pace=PACE, limits=Limits(step_seconds=limit))
    half = mode(held, Gradient.SUBMODEL)
    assert 0.8 * limit < half.step_seconds <= limit and 10 <= half.units < 16
    # Streamed steps pay for all layers: not even one unit is fast enough, and the honest time says so.
    one = mode(held, Gradient.STREAMED)
    assert one.units == 1 and one.step_seconds > limit
    assert [m.units for m in planned(0, limits=Limits(step_seconds=limit)).modes] == [30] * 3  # an unknown pace bounds nothing


def test_what_saves_memory_costs_time() -> None:
    setting, held = Setting(), Held(8)

    def seconds(**changes: Any) -> float:
        full = StreamPlan(resident=30, ahead=True)
        return step_seconds(SMALL, setting, spec(Gradient.STREAMED), PACE, held, 4, True, replace(full, **changes))

    assert (
        seconds() < seconds(resident=0, ahead=False) and seconds() < seconds(head=False) and seconds() < seconds(boundary_bytes=0)
    )
    assert seconds(resident=0) <= seconds(resident=0, ahead=False)
    kept, again = (step_seconds(SMALL, setting, spec(Gradient.SUBMODEL), PACE, held, 4, c, LEAST) for c in (False, True))
    assert again - kept == pytest.approx(8 * PACE.forward_lora)
    low = step_seconds(SMALL, setting, spec(Gradient.STREAMED), PACE, held, 4, True, StreamPlan(), 20)
    assert low < seconds(resident=0, ahead=False)
    assert prepare_seconds(SMALL, setting, spec(Gradient.STREAMED), PACE, StreamPlan(), 20) > 0
    assert prepare_seconds(SMALL, setting, spec(Gradient.SUBMODEL), PACE, StreamPlan()) == 0
    anchor = [prepare_seconds(SMALL, setting, spec(Gradient.STITCHED), PACE, p, gaps=3) for p in (StreamPlan(), LEAST)]
    assert 30 * 10 * PACE.forward <= anchor[0] < anchor[1], "every layer over the round's ten batches; spilling comes on top"


def test_what_a_round_does_once_counts_towards_the_step_limit() -> None:
    """A stitched device runs the whole model over the round's rows first: a share of that falls on every step."""
    held = planned(230, Gradient.STITCHED, pace=PACE)
    one = mode(held, Gradient.STITCHED)
    alone = one.step_seconds - one.prepare_seconds / 10
    assert one.prepare_seconds > 0 and 0 < alone < one.step_seconds
    limited = mode(
        planned(230, Gradient.STITCHED, pace=PACE, limits=Limits(step_seconds=one.step_seconds * 0.99)), Gradient.STITCHED
    )
    assert limited.units < one.units


@pytest.mark.parametrize("budget", [110, 130, 180])
def test_no_draw_spills_more_than_is_planned(budget: int) -> None:
    for gradient in (Gradient.STREAMED, Gradient.STITCHED):
        found = planned(budget + 110 * (gradient is Gradient.STITCHED), gradient, rank=4)
        one = mode(found, gradient)
        for first in range(SMALL.layers - one.units + 1):
            units = [UnitId(first + i) for i in range(one.units)]
            task = plan_task(SMALL, Setting(stored=2), spec(gradient, rank=4), 0, units, one.micro_batch, True, budget * MIB * 3)
            assert task.disk_bytes <= one.disk_bytes
        spread = [UnitId(round(i * (SMALL.layers - 1) / max(1, one.units - 1))) for i in range(one.units)]
        budgeted = (budget + 110 * (gradient is Gradient.STITCHED)) * MIB
        task = plan_task(SMALL, Setting(stored=2), spec(gradient, rank=4), 0, spread, one.micro_batch, True, budgeted)
        assert task.disk_bytes <= one.disk_bytes


def test_a_bound_of_the_disk_leaves_fewer_units_or_refuses() -> None:
    free = mode(planned(107, Gradient.STREAMED, steps=40), Gradient.STREAMED)
    assert free.disk_bytes > 0
    bound = mode(planned(107, Gradient.STREAMED, steps=40, limits=Limits(disk_bytes=free.disk_bytes - 1)), Gradient.STREAMED)
    assert bound.disk_bytes < free.disk_bytes and bound.units < free.units
    with pytest.raises(BudgetError, match=r"one unit leaves \d+ MiB of activations to the disk, cache.max_spill allows 1 MiB"):
        planned(103, Gradient.STREAMED, steps=40, limits=Limits(disk_bytes=MIB))
    roomy = mode(planned(0, Gradient.STREAMED, steps=40, limits=Limits(disk_bytes=1)), Gradient.STREAMED)
    assert (roomy.units, roomy.disk_bytes) == (30, 0)


def test_recomputation_is_turned_on_where_an_assignment_would_not_fit_without() -> None:
    problem = Problem(SMALL, Setting(), spec(Gradient.SUBMODEL), 0)
    kept, again = (problem.peak(Held(8), 4, c, 0, 0, LEAST).peak for c in (False, True))
    units = [UnitId(i) for i in range(8)]
    task = plan_task(SMALL, Setting(), spec(Gradient.SUBMODEL), 0, units, 4, False, (kept + again) // 2)
    assert task.checkpointing and task.peak == again
    assert not plan_task(SMALL, Setting(), spec(Gradient.SUBMODEL), 0, units, 4, False, kept).checkpointing
    with pytest.raises(BudgetError, match="the assignment of 8 units needs") as caught:
        plan_task(SMALL, Setting(), spec(Gradient.SUBMODEL), 0, units, 4, False, again - 1)
    assert caught.value.smallest == again


def test_fidelity_needs_room_for_the_full_models_gradient() -> None:
    assert (
        dict(planned(0, Gradient.SUBMODEL, fidelity=True).smallest)[Gradient.SUBMODEL]
        >= dict(planned(0).smallest)[Gradient.STREAMED]
    )
    units = [UnitId(29)]
    with_it = plan_task(SMALL, Setting(), spec(Gradient.STREAMED, fidelity=True, steps=1), 0, units, 4, True, 0)
    assert with_it.peak == plan_task(SMALL, Setting(), spec(Gradient.STREAMED, steps=1), 0, units, 4, True, 0).peak


def test_the_micro_batch_leaves_room_for_fidelity() -> None:
    """Within every budget from the smallest on there is a plan, and its assignments fit with their measurement."""
    config = {**CONFIGS["tinyllama-1.1b"], "vocab_size": 1000}
    shape, setting = shape_of(config), Setting(Quantization.NF4)
    train = replace(spec(Gradient.SUBMODEL, fidelity=True, batch_size=16, sequence_length=256),
                    targets=tuple(sorted(module.name for module in shape.modules)))  # fmt: skip
    probe, limits = ProbeSpec(batch_size=4, sequence_length=256), Limits(update_bytes=lora_bytes(shape, train))
    floor = plan(config, setting, train, probe, 0, 0, 8, limits=limits).smallest_budget
    chosen = set()
    for budget in range(floor, floor + 300 * MIB, 8 * MIB):
        one = plan(config, setting, train, probe, 0, budget, 8, limits=limits).modes[0]
        chosen.add(one.micro_batch)
        assert plan_task(shape, setting, train, 0, [UnitId(0)], one.micro_batch, one.checkpointing, budget).peak <= budget
    assert len(chosen) > 1


@pytest.mark.parametrize("window", [256, 4096])
def test_eager_attention_keeps_two_masks_a_length(window: int) -> None:
    """One for windowed and one for whole attention, in the compute dtype, also where the window is longer than the rows."""
    t, one = 512, replace(SMALL, window=window)
    train = spec(Gradient.STREAMED, sequence_length=t)

    def positions(shape: Shape, itemsize: int) -> int:
        return dict(streamed_peak(shape, Setting(itemsize=itemsize), train, 0, Streamed(Held(2), 0, 1), LEAST).rows)["positions"]

    for itemsize in (2, 4):
        rotary = 8 * 2 * t * one.head_dim * itemsize
        assert positions(replace(one, family="gemma2"), itemsize) == rotary + 8 * 2 * t * t * itemsize
        assert positions(one, itemsize) == rotary + (8 * t * t if window < t else 0)


def test_a_stream_that_does_not_fit_is_no_fit() -> None:
    problem = Problem(SEVEN, Setting(Quantization.NF4, 2, 2), spec(Gradient.STREAMED), 0)
    least = problem.smallest(Held(1), 4, 0).peak
    assert fit(problem, Held(1), 0, 0, (4,), least - 1) is None
    found = fit(problem, Held(1), 0, 0, (4, 2, 1), least)
    assert found is not None and found.micro_batch == 4 and found.estimate.peak <= least
