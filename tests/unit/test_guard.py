"""What was sent of a round is counted before more is trained for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.blocks import LoraBlock, write_blocks
from common.errors import PolicyError
from common.types import Assignment, ObjectRef, Part, ProbeSpec, RunSpec, TaskKey, TrainSpec, UnitId, UnitObject
from fp_client.guard import RUNS, Guard, least_update
from fp_client.policy import Policy

TARGETS = {"mlp.up_proj": (96, 32), "self_attn.q_proj": (32, 32)}
TRAIN = TrainSpec(2, 4, 128, 1e-4, 8, 16.0, tuple(TARGETS), 1)
SPEC = RunSpec("r", "m", "f" * 64, "fedpruner", Part.LAYER, TRAIN, ProbeSpec(sequence_length=128), 16, 3)
MIB = 1 << 20


def task(layers: int = 1, adapter: int = 0, attempt: int = 0, round_: int = 1) -> Assignment:
    """An assignment of so many layers, with one layer's adapter of so many bytes."""
    objects = (UnitObject(0, ObjectRef("a" * 64, adapter)),) if adapter else ()
    return Assignment(TaskKey("r", round_, attempt), tuple(map(UnitId, range(layers))), (), (), TRAIN, objects, 4, True)


def guard_of(tmp_path, limit: int) -> Guard:
    return Guard(Policy(max_upload=limit), tmp_path / ".asked.json")


def written(path, layers, rank) -> int:
    """The size of a file with the factors of so many layers."""
    write_blocks(path, [
        LoraBlock(layer, name, np.ones((rank, d_in), np.float32), np.ones((d_out, rank), np.float32))
        for layer in range(layers) for name, (d_out, d_in) in TARGETS.items()
    ])  # fmt: skip
    return path.stat().st_size


def test_a_second_attempt_that_can_not_be_sent_is_refused_before_it_is_trained(tmp_path):
    """A layer of 30 MiB in the adapter has 15 at half the rank: 10 of them are an update of 150 MiB."""
    guard, first = guard_of(tmp_path, 200 * MIB), task(10, 30 * MIB)
    guard.assignment(SPEC, first, None)
    guard.sent(first.key).bytes = 150 * MIB
    with pytest.raises(PolicyError, match=r"^policy.toml: max_upload: the server asks for bytes of updates: 3145\d\d\d\d\d, "):
        guard.assignment(SPEC, task(10, 30 * MIB, attempt=1), None)
    guard.assignment(SPEC, task(3, 30 * MIB, attempt=2), None)  # 195 MiB in all
    guard.assignment(SPEC, task(10, 30 * MIB, round_=2), None)  # another round has its own account


def test_the_assignment_that_was_let_through_is_left_to_the_push(tmp_path):
    """Its update may be in the outbox, and on the server."""
    guard, first = guard_of(tmp_path, 200 * MIB), task(10, 30 * MIB)
    guard.assignment(SPEC, first, None)
    guard.sent(first.key).bytes = 150 * MIB
    guard.assignment(SPEC, first, None)
    with pytest.raises(PolicyError, match="max_upload"):  # other work under the same key is not
        guard.assignment(SPEC, replace(first, redraws=1), None)
    guard.assignment(SPEC, first, None)


def test_where_the_size_is_not_known_only_a_round_that_is_used_up_is_refused(tmp_path):
    guard = guard_of(tmp_path, 200)
    guard.assignment(SPEC, task(), None)
    guard.sent(task().key).bytes = 199
    guard.assignment(SPEC, task(attempt=1), None)
    guard.sent(task().key).bytes = 200
    with pytest.raises(PolicyError, match="max_upload: the server asks for bytes of updates: 201, this device allows 200"):
        guard.assignment(SPEC, task(attempt=2), None)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_an_update_is_never_smaller_than_was_thought(tmp_path, rank):
    """Whatever the rank of the adapter: it is at most the run's."""
    real = written(tmp_path / "update", 3, TRAIN.rank)
    least = least_update(SPEC, task(3, written(tmp_path / "adapter", 1, rank)))
    assert 1 <= least <= real
    assert rank < 16 or least > 0.7 * real
    assert least_update(replace(SPEC, part=Part.ATTENTION), task(3, 30 * MIB)) == 1


def test_what_is_remembered_is_bounded(tmp_path):
    guard = guard_of(tmp_path, 200 * MIB)
    for number in range(RUNS + 9):
        one = task()
        guard.assignment(replace(SPEC, run=f"r{number}"), replace(one, key=replace(one.key, run=f"r{number}")), None)
    assert len(guard._let_through) == RUNS
