"""What a device must be ready for: the dearest draws of as many units, what each takes in memory, on disk and in seconds.
Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from common.types import Gradient, Part
from fp_client.fitting import Fit, Problem, fit
from fp_client.memory import Estimate, Held, lora_bytes, unit_bytes
from fp_client.memory_stream import spilled
from fp_client.pace import Pace, prepare_seconds, step_seconds
from fp_client.shapes import Shape


def worst_draws(problem: Problem, layers: int, part: Part) -> tuple[Held, ...]:
    """The dearest draws of so many whole layers, or of as many components of each kind; no draw that the server makes within
    the bytes of those units costs more. Components lie in layers of their own as far as there are layers.

    A draw may have more of the component whose `unit_bytes` are fewer. Streamed, base weights don't stay, and where that
    component's LoRA is the larger one, as many of it as can be are the dearest.
    """
    shape, spec, most = problem.shape, problem.spec, problem.shape.layers
    if part is Part.LAYER:
        return (Held(layers),)
    alone = min(layers, most - layers)
    draws = [Held(layers - alone, alone, alone, any_draw=True)]
    if spec.gradient is Gradient.STREAMED or spec.fidelity:
        size = {one: unit_bytes(shape, problem.setting, spec, problem.broadcast_rank, one) for one in (Part.ATTENTION, Part.FFN)}
        cheap, dear = sorted(size, key=lambda one: size[one])
        if lora_bytes(shape, spec, cheap) > lora_bytes(shape, spec, dear):
            many = min(2 * layers, most)
            few = 2 * layers - many
            shared = max(0, many + few - most)
            count = {cheap: many - shared, dear: few - shared}
            draws.append(Held(shared, count[Part.ATTENTION], count[Part.FFN], any_draw=True))
    return tuple(draws)


def least(problem: Problem, draws: Sequence[Held], micro_batch: int) -> Estimate:
    """The least that training any of these draws takes; and measuring its gradient's fidelity, where that is asked for."""
    found = [problem.smallest(held, micro_batch, most_gaps(problem.shape, held)) for held in draws]
    if problem.spec.fidelity:
        found += [once(problem).smallest(held, micro_batch, 0) for held in draws]
    return max(found, key=lambda one: one.peak)


def once(problem: Problem) -> Problem:
    """The full model's gradient on one batch."""
    return replace(problem, spec=replace(problem.spec, gradient=Gradient.STREAMED, steps=1))


def most_gaps(shape: Shape, held: Held) -> int:
    """The most gaps that a draw can leave."""
    positions = shape.layers if held.layers == held.whole else 2 * shape.layers
    kept = held.whole if held.layers == held.whole else 2 * held.whole + held.attention + held.ffn
    return min(kept + 1, positions - kept)


def seconds_of(problem: Problem, pace: Pace | None, held: Held, found: Fit, low: int, gaps: int) -> tuple[float, float]:
    """(a step, what a round does once before)."""
    if pace is None:
        return 0.0, 0.0
    shape, setting, spec = problem.shape, problem.setting, problem.spec
    step = step_seconds(shape, setting, spec, pace, held, found.micro_batch, found.checkpointing, found.stream, low, gaps)
    return step, prepare_seconds(shape, setting, spec, pace, found.stream, low, gaps)


def disk_of(problem: Problem, held: Held, gaps: int, budget_bytes: int, found: Fit) -> int:
    """The most that a draw leaves on disk. Streamed, either all layers' boundaries or, with a draw that begins above the first
    layer, those of the others and the prefix's outputs."""
    shape, setting, spec = problem.shape, problem.setting, problem.spec
    most = spilled(shape, setting, spec, found.stream, 0, gaps).most
    if spec.gradient is Gradient.STREAMED and shape.layers > 1:
        above = fit(problem, held, gaps, 1, (found.micro_batch,), budget_bytes)
        if above is not None:
            most = max(most, spilled(shape, setting, spec, above.stream, 1).most)
    return most
