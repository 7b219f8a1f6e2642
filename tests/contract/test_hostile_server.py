"""A server that asks for what it may not: each request is refused by its reason, and the daemon lives on in its session."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import replace

import pytest
from test_agent import KEY, SPEC, TRAIN, Device, FakeWork, against, assignment, probe_task

from common.bucket import Bucket
from common.errors import OffsetError, PolicyError
from common.pb import session_pb2
from common.transport import serde
from common.types import (
    Capacity,
    Estimator,
    Factors,
    Gradient,
    ObjectRef,
    Part,
    PlanReport,
    Start,
    TaskKey,
    UnitId,
    UnitObject,
)
from fp_client import agent as agent_module
from fp_client import guard as guard_module
from fp_client.guard import Guard
from fp_client.plans import AT_ONCE
from fp_client.policy import Policy
from fp_client.state import KEPT

HUGE = "x" * (3 << 20)


def run(**changes):
    """The run with some fields changed; `train_…` and `probe_…` change those of its parts."""
    parts = {"train": {}, "probe": {}, "": {}}
    for name, value in changes.items():
        section, _, rest = name.partition("_")
        key = (section, rest) if section in ("train", "probe") and rest else ("", name)
        parts[key[0]][key[1]] = value
    return replace(SPEC, **parts[""], train=replace(SPEC.train, **parts["train"]), probe=replace(SPEC.probe, **parts["probe"]))


POLICY = Policy(
    models=("m",), max_steps=10, max_batch=8, max_sequence_length=256, max_positions=600, max_rank=16, max_learning_rate=0.1,
    max_rounds=20, min_samples=5, max_fetch=1000, max_upload=1 << 20, gradients=(Gradient.SUBMODEL, Gradient.STREAMED),
    starts=(Start.FRESH,), factors=(Factors.BOTH, Factors.B), targets=("q_proj", "self_attn.v_proj"), max_rounds_back=2,
)  # fmt: skip

PLANS = [
    (run(model="other"), "PolicyError: policy.toml: models: 'other' is not among the allowed (m)"),
    (run(train_steps=11), "PolicyError: policy.toml: max_steps: the server asks for steps 11, this device allows 10"),
    (run(train_steps=2**32 - 1), "max_steps: the server asks for steps 4294967295, this device allows 10"),
    (run(train_batch_size=9), "max_batch: the server asks for rows 9, this device allows 8"),
    (run(probe_batch_size=9), "max_batch: the server asks for rows 9, this device allows 8"),
    (run(train_sequence_length=257), "max_sequence_length: the server asks for tokens a row 257, this device allows 256"),
    (run(probe_sequence_length=10**9), "max_sequence_length: the server asks for tokens a row 1000000000"),
    (run(probe_positions=601), "max_positions: the server asks for token positions 601, this device allows 600"),
    (run(train_rank=17), "max_rank: the server asks for a LoRA rank of 17, this device allows 16"),
    (run(broadcast_rank=17), "max_rank: the server asks for a broadcast rank of 17, this device allows 16"),
    (run(train_learning_rate=0.2), "max_learning_rate: the server asks for a learning rate of 0.2, this device allows 0.1"),
    (run(rounds=21), "max_rounds: the server asks for rounds 21, this device allows 20"),
    (run(train_gradient=Gradient.STITCHED), "gradients: the server asks for 'stitched', this device allows submodel, streamed"),
    (run(train_start=Start.GLOBAL), "starts: the server asks for 'global', this device allows fresh"),
    (run(train_train=Factors.A), "factors: the server asks for 'A', this device allows both, B"),
    (run(train_targets=("mlp.up_proj",)), "targets: the server asks for 'mlp.up_proj', this device allows q_proj"),
    (run(train_targets=("mlp.q_proj", "self_attn.k_proj")), "targets: the server asks for 'self_attn.k_proj'"),
    (run(train_rank=0), "ProtocolError: train.rank: the server asks for 0; it must be at least 1"),
    (run(train_steps=0), "train.steps: the server asks for 0; it must be at least 1"),
    (run(train_batch_size=0), "train.batch_size: the server asks for 0; it must be at least 1"),
    (run(train_sequence_length=1), "train.sequence_length: the server asks for 1; it must be at least 2"),
    (run(train_learning_rate=-1e-4), "train.learning_rate: the server asks for -0.0001; it can't be negative"),
    (run(train_alpha=-16.0), "train.alpha: the server asks for -16.0; it must be above 0"),
    (run(train_alpha=0.0), "train.alpha: the server asks for 0.0; it must be above 0"),
    (run(train_alpha=1e30), "train.alpha: the server asks for 1e+30; it must be above 0 and at most 1e+06"),
    (run(train_dropout=1.0), "train.dropout: the server asks for 1.0; it must be from 0 on and below 1"),
    (run(train_dropout=-0.5), "train.dropout: the server asks for -0.5; it must be from 0 on and below 1"),
    (run(train_targets=()), "train.targets: the server asks for '0 modules'; it must be 1 to 64"),
    (
        run(train_targets=("q_proj",) * 2),
        "train.targets: the server asks for \"('q_proj', 'q_proj')\"; not sorted, or one is named",
    ),
    (run(train_estimator=Estimator.FORWARD), "train.estimator: the server asks for 'forward'; this client only knows backprop"),
    (run(train_upload=Factors.B), "train.upload: the server asks for 'B'; this client uploads both factors or nothing"),
    (run(probe_positions=0), "probe.positions: the server asks for 0; it must be at least 2"),
    (run(probe_batch_size=0), "probe.batch_size: the server asks for 0; it must be at least 1"),
    (run(rounds=0), "rounds: the server asks for 0; it must be at least 1"),
    (run(broadcast_rank=0), "broadcast_rank: the server asks for 0; it must be at least 1"),
    (run(step_seconds=-1.0), "step_seconds: the server asks for -1.0; it can't be negative"),
    (run(part=Part.FFN), "probe.part: the server asks for 'layer'; not the run's"),
]
"""What a run may not ask, with a policy that says so, or with any."""


def garbled(message, **fields):
    """A message with fields that no value of ours has."""
    for path, value in fields.items():
        *way, last = path.split("__")
        target = message
        for name in way:
            target = getattr(target, name)
        if isinstance(value, list):
            del getattr(target, last)[:]
            getattr(target, last).extend(value)
        else:
            setattr(target, last, value)
    return message


def plan_pb(**fields):
    return session_pb2.ServerMessage(plan=session_pb2.PlanRequest(spec=garbled(serde.run_spec_to_pb(SPEC), **fields)))


GARBLED_PLANS = [
    (plan_pb(train__gradient="sideways"), "train.gradient: unknown value 'sideways'"),
    (plan_pb(train__gradient=HUGE), "train.gradient: unknown value 'xxx"),
    (plan_pb(train__learning_rate=math.nan), "train.learning_rate: nan is not finite"),
    (plan_pb(train__alpha=math.inf), "train.alpha: inf is not finite"),
    (plan_pb(train__dropout=-math.inf), "train.dropout: -inf is not finite"),
    (plan_pb(step_seconds=math.nan), "spec.step_seconds: nan is not finite"),
    (plan_pb(model=HUGE), "spec.model: 3145728 characters, at most 512 are read"),
    (plan_pb(method=HUGE), "spec.method: 3145728 characters, at most 512 are read"),
    (plan_pb(train__targets=[HUGE]), "train.targets: 3145728 characters, at most 512 are read"),
    (plan_pb(fingerprint="../x"), "spec.fingerprint: '../x' is not a sha256 digest"),
    (plan_pb(fingerprint=HUGE), "is not a sha256 digest"),
    (plan_pb(probe__kernel="magic"), "probe.kernel: unknown value 'magic'"),
    (plan_pb(part=77), "spec.part: unknown value 77"),
]


class Two(FakeWork):
    """Work of a model with two layers: both can be held as a submodel, one streamed."""

    async def plan(self, spec):
        self.begun.append("plan")
        capacities = (Capacity(Gradient.SUBMODEL, 2, 4, True, 100), Capacity(Gradient.STREAMED, 1, 4, True, 100))
        return PlanReport(spec.run, 40, spec.fingerprint, capacities, (10, 10), 500, "", self.budget_bytes)


def test_no_run_is_joined_that_asks_too_much_or_makes_no_sense(tmp_path):
    async def body(server):
        async with Device(server, tmp_path, Two(), POLICY) as device:
            for number, (spec, said) in enumerate(PLANS):
                await device.hears("plan", replace(spec, run=f"r{number}"))
                report = serde.plan_report_from_pb(await server.sessions.next("plan"))
                assert report.run == f"r{number}" and said in report.refusal and report.capacities == (), (said, report.refusal)
            for message, said in GARBLED_PLANS:
                await server.sessions.tell.put(message)
                report = serde.plan_report_from_pb(await server.sessions.next("plan"))
                assert said in report.refusal and len(report.refusal) < 600, (said, report.refusal[:300])
            assert device.work.begun == []
            assert (await device.joins()).refusal == "" and server.sessions.opened == 1

    against(tmp_path, body)


def test_targets_that_are_no_modules(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            for targets, said in (
                ([f"m{number:06d}" for number in range(100_000)], "train.targets: 100000 modules is more than any layer has"),
                ([f"m{number:06d}" for number in range(1000)], "'1000 modules'; it must be 1 to 64"),
                (["../../etc/passwd"], "train.targets: the server asks for '../../etc/passwd'; not a module's name"),
                (["self_attn.q_proj; rm"], "not a module's name"),
            ):
                await server.sessions.tell.put(plan_pb(train__targets=targets))
                assert said in (await server.sessions.next("plan")).refusal
            assert (await device.joins()).refusal == ""

    against(tmp_path, body)


FAR = ObjectRef("0" * 64, 400)
TASKS = [
    (probe_task(spec=replace(SPEC.probe, positions=513)), "probe.positions: the task asks for 513, its run for 512"),
    (probe_task(spec=replace(SPEC.probe, positions=601)), "policy.toml: max_positions"),
    (probe_task(spec=replace(SPEC.probe, batch_size=5)), "probe.batch_size: the task asks for 5, its run for 4"),
    (probe_task(spec=replace(SPEC.probe, part=Part.FFN)), "probe.part: the task asks for ffn, its run for layer"),
    (probe_task(key=TaskKey("r", 3, 0)), "round: the server asks for 4; the run has 3"),
    (probe_task(key=TaskKey("r", 4, 0), similarity=False), "round: the server asks for 5; the run has 3"),
    (probe_task(key=TaskKey("r", 2**32 - 1, 0)), "policy.toml: max_rounds: the server asks for rounds 4294967296"),
    (probe_task(key=TaskKey("other", 0, 0)), "run 'other': this device has not joined it"),
    (probe_task([UnitObject(0, FAR), UnitObject(0, FAR)]), "adapter: two objects of one layer, or one of a layer no model has"),
    (probe_task([UnitObject(n, FAR) for n in range(3)]), "max_fetch: the server asks for bytes of adapter objects: 1200"),
    (
        probe_task([UnitObject(0, ObjectRef("0" * 64, 2**64 - 1))]),
        "max_fetch: the server asks for bytes of adapter objects",
    ),
    (assignment(spec=replace(TRAIN, rank=9)), "train.rank: the task asks for 9, its run for 8"),
    (assignment(spec=replace(TRAIN, rank=17)), "policy.toml: max_rank"),
    (assignment(spec=replace(TRAIN, rank=0)), "train.rank: the task asks for 0, its run for 8"),
    (assignment(spec=replace(TRAIN, steps=3)), "train.steps: the task asks for 3, its run for 2"),
    (assignment(spec=replace(TRAIN, alpha=-1.0)), "train.alpha: the task asks for -1.0, its run for 16.0"),
    (assignment(spec=replace(TRAIN, dropout=0.9)), "train.dropout: the task asks for 0.9, its run for 0.0"),
    (assignment(spec=replace(TRAIN, learning_rate=-1.0)), "train.learning_rate: the server asks for -1.0; it can't be negative"),
    (assignment(spec=replace(TRAIN, learning_rate=5.0)), "policy.toml: max_learning_rate"),
    (assignment(spec=replace(TRAIN, fidelity=True)), "train.fidelity: the task asks for True, its run for False"),
    (assignment(spec=replace(TRAIN, targets=("self_attn.v_proj",))), "train.targets: the task asks for ('self_attn.v_proj',)"),
    (
        assignment(spec=replace(TRAIN, gradient=Gradient.STREAMED)),
        "train.gradient: the task asks for streamed, its run",
    ),
    (assignment(micro_batch=5), "micro_batch: the server asks for 5; a batch has 4 rows"),
    (assignment(units=tuple(map(UnitId, range(3)))), "units: the server asks for '3'; the model has 2 layers"),
    (assignment(units=(UnitId(4095),)), "units: the server asks for '4096'; the model has 2 layers"),
    (assignment(units=(UnitId(0, Part.FFN),)), "units: the server asks for '1N'; the run's units are layers"),
    (assignment(groups=((UnitId(7),),), probabilities=((1.0,),)), "groups: the server asks for '8'; the model has 2 layers"),
    (assignment(groups=((UnitId(0),),) * 2, probabilities=((1.0,),) * 2), "groups: the server asks for '2 units'; one is in two"),
    (
        assignment(groups=((UnitId(0),),), probabilities=((0.5, 0.5),)),
        "groups: the server asks for '1 units'; with 2 prob",
    ),
    (
        assignment(groups=((UnitId(0),),), probabilities=((math.nan,),)),
        "groups: the server asks for 'a probability'; it must",
    ),
    (assignment(key=TaskKey("r", 3, 0)), "round: the server asks for 4; the run has 3"),
    (assignment([UnitObject(n, FAR) for n in range(3)]), "policy.toml: max_fetch"),
    (assignment([UnitObject(2, FAR)]), "adapter: the server asks for '3'; the model has 2 layers"),
    (probe_task([UnitObject(4000, FAR)]), "adapter: the server asks for '4001'; the model has 2 layers"),
]


def task_pb(task, **fields):
    if hasattr(task, "units"):
        return session_pb2.ServerMessage(assignment=garbled(serde.assignment_to_pb(task), **fields))
    return session_pb2.ServerMessage(probe=garbled(serde.probe_task_to_pb(task), **fields))


GARBLED_TASKS = [
    (task_pb(assignment(), spec__learning_rate=math.nan), "train.learning_rate: nan is not finite"),
    (task_pb(assignment(), micro_batch=0), "assignment.micro_batch: 0 must be at least 1"),
    (task_pb(assignment(), units=[]), "assignment.units: must be at least one, in model order, without repeats"),
    (task_pb(assignment(), units=[serde.unit_to_pb(UnitId(0))] * 2), "without repeats"),
    (task_pb(assignment(), units=[serde.unit_to_pb(UnitId(0))] * 5000), "more units or groups than any model has"),
    (task_pb(assignment(), spec__targets=[HUGE]), "train.targets: 3145728 characters"),
    (task_pb(assignment(), spec__start="nowhere"), "train.start: unknown value 'nowhere'"),
    (task_pb(probe_task(), spec__sample=HUGE), "probe.sample: unknown value 'xxx"),
    (task_pb(probe_task(), spec__part=9), "probe.part: unknown value 9"),
    (task_pb(probe_task([UnitObject(0, ObjectRef("0" * 64, 1))] * 5000)), "5000 objects is more than any model has layers"),
    (task_pb(probe_task([UnitObject(0, ObjectRef("../../device.key", 1))])), "'../../device.key' is not a sha256 digest"),
]


def test_no_task_is_done_that_is_not_of_its_run(tmp_path):
    """Policy, the run's own spec, the device's own plan: what contradicts one of them costs the round and nothing else."""

    async def body(server):
        async with Device(server, tmp_path, Two(), POLICY) as device:
            await device.joins()
            for task, said in TASKS:
                kind = "assignment" if hasattr(task, "units") else "probe"
                await device.hears(kind, task)
                failed = await server.sessions.next("failed")
                assert said in failed.message and serde.key_from_pb(failed.key) == task.key, (said, failed.message)
            for message, said in GARBLED_TASKS:
                await server.sessions.tell.put(message)
                failed = await server.sessions.next("failed")
                assert failed.error == "ProtocolError" and said in failed.message and len(failed.message) < 600, said
            assert device.work.begun == ["plan"] and server.objects.offsets == []
            await device.hears("probe", probe_task(key=TaskKey("r", 3, 0), similarity=False))  # the final evaluation
            await server.sessions.next("probe")
            seeds = replace(TRAIN, seed=2**64 - 1, learning_rate=0.0)
            await device.hears("assignment", assignment(key=TaskKey("r", 2, 7), spec=seeds))
            await device.until(lambda: server.objects.accepted)
            assert server.sessions.opened == 1

    against(tmp_path, body)


def test_an_assignment_holds_to_what_the_device_said_it_can_hold(tmp_path):
    async def body(server):
        async with Device(server, tmp_path, Two(), POLICY) as device:
            spec = run(train_gradient=Gradient.AUTO)
            await device.hears("plan", spec)
            await server.sessions.next("plan")
            both = (UnitId(0), UnitId(1))
            for gradient, units, said in (
                (Gradient.AUTO, both, "train.gradient: the server asks for 'auto'; a task must name one mode"),
                (Gradient.STITCHED, both, "policy.toml: gradients: the server asks for 'stitched'"),
                (Gradient.STREAMED, both, "units: the server asks for 2; this device said it can hold 1"),
            ):
                await device.hears("assignment", assignment(units=units, spec=replace(TRAIN, gradient=gradient)))
                assert said in (await server.sessions.next("failed")).message
            await device.hears("assignment", assignment(units=both))
            await device.until(lambda: server.objects.accepted)

    against(tmp_path, body)


def test_a_name_in_a_message_is_no_path(tmp_path):
    """The end of a run deletes files that are called after it: a name with a path in it would delete any."""
    victim = tmp_path / "precious.json"
    model = tmp_path / "model.safetensors"

    async def body(server):
        async with Device(server, tmp_path) as device:
            victim.write_text("{}")
            model.write_text("weights")
            await device.joins()
            for name in ("../precious", str(tmp_path / "precious"), str(tmp_path / "model"), "..", "", "a/b", "x\0y", HUGE):
                before = server.sessions.opened
                await device.hears("ended", name)
                await device.until(lambda before=before: server.sessions.opened == before + 1)
                await device.joins()
                await device.hears("probe", probe_task(key=TaskKey("r", 0, before)))  # work done: the count begins anew
                await server.sessions.next("probe")
            assert victim.exists() and model.exists() and not device.running.done()

    against(tmp_path, body)


def test_a_servers_words_can_not_forge_the_log(tmp_path, caplog):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            evil = "done\n2026-01-01 INFO all is well \x1b[2J" + HUGE
            await server.sessions.tell.put(
                session_pb2.ServerMessage(cancel=session_pb2.Cancel(key=serde.key_to_pb(KEY), reason=evil))
            )
            await server.sessions.tell.put(session_pb2.ServerMessage(ended=session_pb2.RunEnded(run="r", outcome=evil)))
            await device.until(lambda: sum("all is well" in message for message in caplog.messages) == 2)

    with caplog.at_level(logging.INFO):
        against(tmp_path, body)
    for message in caplog.messages:
        assert "\n" not in message and "\x1b" not in message and len(message) < 1000


def test_a_flood_of_plan_requests(tmp_path):
    """While one is being answered a few may wait; the others are refused, and none is forgotten for that."""

    async def body(server):
        gate = asyncio.Event()

        class Slow(FakeWork):
            async def fingerprint(self, spec, progress):
                await gate.wait()
                return self.print

        async with Device(server, tmp_path, Slow()) as device:
            for number in range(3 * AT_ONCE):
                await device.hears("plan", replace(SPEC, run=f"r{number}"))
            for _ in range(2 * AT_ONCE):
                report = await server.sessions.next("plan")
                assert "plan requests wait for their answer already; this device takes 4 at once" in report.refusal
            gate.set()
            answered = {(await server.sessions.next("plan")).run for _ in range(AT_ONCE)}
            assert answered == {f"r{number}" for number in range(AT_ONCE)} and device.work.begun.count("plan") == AT_ONCE

    against(tmp_path, body)


def test_ever_new_runs_do_not_fill_the_disk(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            for number in range(KEPT + 10):
                await device.hears("plan", replace(SPEC, run=f"r{number}"))
                await server.sessions.next("plan")
            assert len(list((tmp_path / "runs").glob("r*.json"))) == KEPT
            await device.hears("probe", probe_task(key=TaskKey("r0", 0, 0)))
            assert "has not joined it" in (await server.sessions.next("failed")).message
            await device.hears("probe", probe_task(key=TaskKey(f"r{KEPT + 9}", 0, 0)))
            await server.sessions.next("probe")

    against(tmp_path, body)


def test_a_flood_of_tasks_and_cancels_is_left_unread(tmp_path, monkeypatch):
    """A burst is taken, the rest waits at the server's side; what is asked next is answered."""
    monkeypatch.setattr(agent_module, "BURST", 20.0)
    monkeypatch.setattr(agent_module, "MESSAGES", 500.0)

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            for number in range(40):
                await device.hears("assignment", assignment(key=TaskKey("r", 0, number)))
                await device.hears("cancel", TaskKey("r", 0, number))
            device.work.gate.set()
            await device.hears("probe", probe_task(key=TaskKey("r", 1, 0)))
            await server.sessions.next("probe")
            assert server.sessions.opened == 1 and not server.objects.accepted

    against(tmp_path, body)


def test_messages_are_counted_over_all_sessions(tmp_path, monkeypatch):
    """Or a server that ends each after a burst could have its next one at once."""
    made = []
    monkeypatch.setattr(agent_module, "Bucket", lambda *given: made.append(given) or Bucket(*given))

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            await server.sessions.tell.put("cut")
            await device.until(lambda: server.sessions.opened == 2)
            await device.hears("probe", probe_task())
            await server.sessions.next("probe")
        assert len(made) == 1

    against(tmp_path, body)


def test_tasks_a_day_are_bounded_also_over_restarts_of_the_daemon(tmp_path):
    policy = Policy(max_tasks_a_day=12)
    said = (
        "policy.toml: max_tasks_a_day: the server has asked for 12 plans, probes and trainings in 24 hours, this device allows 12"
    )

    async def body(server):
        async with Device(server, tmp_path, policy=policy) as device:
            await device.joins()
            for number in range(11):
                await device.hears("probe", probe_task(key=TaskKey("r", 0, number)))
                await server.sessions.next("probe")
            await device.hears("probe", probe_task(key=TaskKey("r", 0, 10)))  # told again from memory: no new work
            await server.sessions.next("probe")
            for _ in range(2):
                await device.hears("assignment", assignment(key=TaskKey("r", 1, 0)))
                failed = await server.sessions.next("failed")
                assert (failed.error, failed.message) == ("PolicyError", said)
        async with Device(server, tmp_path, policy=policy) as again:
            await again.hears("plan", replace(SPEC, run="another"))
            assert said in (await server.sessions.next("plan")).refusal

    against(tmp_path, body)


def test_an_update_is_not_sent_for_ever(tmp_path):
    """A server that takes the bytes and wants them again: what was sent counts, and the limit's name is told."""
    size = len(b"update of " + str(KEY).encode())
    policy = Policy(max_upload=3 * size)

    async def body(server):
        server.objects.forgets = True
        async with Device(server, tmp_path, policy=policy) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            failed = await server.sessions.next("failed")
            assert failed.error == "PolicyError"
            assert failed.message == (
                f"policy.toml: max_upload: the server asks for bytes of updates: {4 * size}, this device allows {3 * size}"
            )
            # Nor are they forgotten with the task: the same round again, in this attempt or another.
            # Another attempt is not even trained.
            for again in (KEY, replace(KEY, attempt=KEY.attempt + 1)):
                pushes, trained = server.objects.pushes, list(device.work.adapters)
                await device.hears("assignment", replace(assignment(), key=again))
                failed = await server.sessions.next("failed")
                assert failed.error == "PolicyError" and f"updates: {4 * size}," in failed.message
                assert (server.objects.pushes, device.work.adapters) == (pushes, trained)
            await device.hears("probe", probe_task())
            await server.sessions.next("probe")

    against(tmp_path, body)


def test_an_update_larger_than_may_be_sent_is_planned_for_and_never_sent(tmp_path):
    async def body(server):
        seen = []

        class Watched(FakeWork):
            async def plan(self, spec):
                seen.append(spec.update_bytes)
                return await super().plan(spec)

        async with Device(server, tmp_path, Watched(), Policy(max_upload=10)) as device:
            await device.joins()
            await device.hears("plan", replace(SPEC, run="s", update_bytes=4))
            await server.sessions.next("plan")
            assert seen == [10, 4]
            await device.hears("assignment", assignment())
            assert "policy.toml: max_upload" in (await server.sessions.next("failed")).message
            assert server.objects.pushes == 0

    against(tmp_path, body)


def test_pieces_of_nothing_end_a_fetch(tmp_path):
    async def body(server):
        server.objects.empty = True
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("probe", probe_task([UnitObject(0, ObjectRef("0" * 64, 5))]))
            assert "the server sent a piece of nothing" in (await server.sessions.next("failed")).message

    against(tmp_path, body)


def test_a_probe_that_was_not_announced(tmp_path):
    """A run of a method without similarities can't ask for them later."""

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.hears("plan", replace(SPEC, similarity=False))
            await server.sessions.next("plan")
            await device.hears("probe", probe_task())
            failed = await server.sessions.next("failed")
            assert "similarity: the server asks for True; the run said it would not ask for it" in failed.message

    against(tmp_path, body)


def guard_of(tmp_path, clock, **limits):
    return Guard(Policy(**limits), tmp_path / ".asked.json", clock)


def test_rounds_may_go_back_a_little_as_after_a_restored_backup(tmp_path, caplog):
    guard = guard_of(tmp_path, lambda: 1e9, max_rounds_back=3)
    spec = replace(SPEC, rounds=100)

    def asked(number):
        guard.probe(spec, probe_task(key=TaskKey("r", number, 0)), None)

    asked(50)
    with caplog.at_level(logging.WARNING):
        asked(47)
    assert "run r: the server has gone back from round 51 to 48" in caplog.text
    said = "policy.toml: max_rounds_back: the server asks for round 47 after round 51, this device allows 3 back"
    with pytest.raises(PolicyError) as caught:
        asked(46)
    assert str(caught.value) == said
    guard = guard_of(tmp_path, lambda: 1e9, max_rounds_back=3)
    with pytest.raises(PolicyError, match="max_rounds_back"):  # also after a restart
        asked(46)
    guard.probe(replace(spec, run="other"), probe_task(key=TaskKey("other", 0, 0)), None)


def test_tasks_are_counted_for_a_day(tmp_path, caplog):
    now = [1e9]
    guard = guard_of(tmp_path, lambda: now[0], max_tasks_a_day=5)
    for _ in range(5):
        guard.plan(SPEC)
        now[0] += 3600
    with pytest.raises(PolicyError, match="max_tasks_a_day: the server has asked for 5"):
        guard.plan(SPEC)
    now[0] += 20 * 3600
    guard.plan(SPEC)
    (tmp_path / ".asked.json").write_text('{"hours": 7}')
    with caplog.at_level(logging.WARNING):
        again = guard_of(tmp_path, lambda: now[0], max_tasks_a_day=1)
    assert ".asked.json: can't be read, counting begins anew" in caplog.text
    again.plan(SPEC)
    assert set(json.loads((tmp_path / ".asked.json").read_text())) == {"hours", "rounds"}


def test_what_is_remembered_of_runs_is_bounded(tmp_path):
    guard = guard_of(tmp_path, lambda: 1e9)
    for number in range(guard_module.RUNS + 9):
        guard.probe(replace(SPEC, run=f"r{number}"), probe_task(key=TaskKey(f"r{number}", 1, 0)), None)
    kept = json.loads((tmp_path / ".asked.json").read_text())["rounds"]
    assert len(kept) == guard_module.RUNS and "r0" not in kept


def test_an_offset_that_never_moves_ends_the_push(tmp_path):
    async def body(server):
        server.objects.push_errors = [OffsetError("ask Offset first")] * 100
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            assert (await server.sessions.next("failed")).error == "OffsetError"
            assert server.objects.pushes < 10

    against(tmp_path, body)
