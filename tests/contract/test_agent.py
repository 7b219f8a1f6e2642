"""The agent against a real mTLS server, with work that is scripted instead of done."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_server import serving

from common.errors import (
    BudgetError,
    DamagedError,
    DataError,
    DigestError,
    FedPrunerError,
    IdentityError,
    InUseError,
    OffsetError,
    ProtocolError,
    StorageError,
    TooLate,
    UnreachableError,
    UpdateRejected,
    WorkerError,
)
from common.pb import session_pb2
from common.transport import serde, wire
from common.types import (
    Assignment,
    Capacity,
    Gradient,
    ObjectRef,
    Part,
    PlanReport,
    ProbeReport,
    ProbeSpec,
    ProbeTask,
    RunSpec,
    TaskKey,
    TrainSpec,
    UnitId,
    UnitObject,
    UpdateMetrics,
)
from fp_client import agent as agent_module
from fp_client.agent import Agent
from fp_client.cache import ObjectCache
from fp_client.messages import TrainResult
from fp_client.plans import cancel
from fp_client.policy import Policy
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer
from fp_client.state import Outbox, Runs

QUICK = wire.Backoff(first=0.01, longest=0.05, attempts=4)
KEY = TaskKey("r", 0, 0)
TRAIN = TrainSpec(2, 4, 128, 1e-4, 8, 16.0, ("self_attn.q_proj",), 1)
SPEC = RunSpec("r", "m", "f" * 64, "fedpruner", Part.LAYER, TRAIN, ProbeSpec(sequence_length=128), 8, 3)
CAPACITY = Capacity(Gradient.SUBMODEL, 2, 4, True, 100)


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes()


class FakeWork:
    """Work whose outcomes the test decides; `gate` holds tasks until the test lets them go on."""

    budget_bytes = 1000

    def __init__(self) -> None:
        self.print, self.error = "f" * 64, None
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.killed = 0
        self.closed = False
        self.adapters: list[list[tuple[int, bytes]]] = []

    async def fingerprint(self, spec, progress):
        return self.print

    async def plan(self, spec):
        self.begun.append("plan")
        if self.error:
            raise self.error
        return PlanReport(spec.run, 40, spec.fingerprint, (CAPACITY,), (10, 10), 500, "", self.budget_bytes)

    async def _run(self, what, adapter, progress):
        self.begun.append(what)
        self.adapters.append([(item.layer, _bytes(item.path)) for item in adapter])
        progress(what, 1, 2)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.killed += 1
            raise
        if self.error:
            raise self.error

    async def probe(self, spec, task, adapter, progress):
        await self._run("probe", adapter, progress)
        return ProbeReport(task.key, np.eye(2, dtype=np.float32), np.ones(2, np.float32), 2.5, 100, 10, 1.0)

    async def train(self, spec, task, adapter, out, progress):
        await self._run("train", adapter, progress)
        out.write_bytes(b"update of " + str(task.key).encode())
        return TrainResult(UpdateMetrics(2.0, 1.0, seconds=1.5))

    async def close(self):
        self.closed = True


class Device:
    """An agent running against a server, as its own task."""

    def __init__(self, server, directory, work=None, policy=None) -> None:
        self.server, self.work = server, work or FakeWork()
        self.connection = Connection(directory, server.address, QUICK)
        self.agent = Agent(
            self.connection.open, Transfer(self.connection), self.work, policy or Policy(),
            ObjectCache(directory / "objects", 1 << 20), Runs(directory / "runs"), Outbox(directory / "outbox"),
            QUICK, beat_seconds=0.02,
        )  # fmt: skip

    async def __aenter__(self):
        self.running = asyncio.create_task(self.agent.run())
        return self

    async def __aexit__(self, *exc):
        self.running.cancel()
        await asyncio.wait([self.running])
        if not self.running.cancelled():
            self.running.exception()  # what ended the agent is read by the tests that expect an end
        await self.connection.close()
        await self.until(lambda: not self.server.sessions.live)

    async def hears(self, kind, value):
        message = {
            "plan": lambda: session_pb2.ServerMessage(plan=session_pb2.PlanRequest(spec=serde.run_spec_to_pb(value))),
            "probe": lambda: session_pb2.ServerMessage(probe=serde.probe_task_to_pb(value)),
            "assignment": lambda: session_pb2.ServerMessage(assignment=serde.assignment_to_pb(value)),
            "cancel": lambda: session_pb2.ServerMessage(cancel=session_pb2.Cancel(key=serde.key_to_pb(value), reason="test")),
            "ended": lambda: session_pb2.ServerMessage(ended=session_pb2.RunEnded(run=value, outcome="finished")),
        }[kind]()
        await self.server.sessions.tell.put(message)

    async def joins(self):
        await self.hears("plan", SPEC)
        return serde.plan_report_from_pb(await self.server.sessions.next("plan"))

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # the condition is anything a test can see
                await asyncio.sleep(0.01)


def against(tmp_path, body):
    async def main():
        async with serving() as server:
            server.ca.join(tmp_path)
            await body(server)

    asyncio.run(main())


def probe_task(adapter=(), **changes):
    return replace(ProbeTask(KEY, SPEC.probe, tuple(adapter)), **changes)


def assignment(adapter=(), **changes):
    return replace(Assignment(KEY, (UnitId(0),), (), (), TRAIN, tuple(adapter), 4, True), **changes)


def test_plan_probe_train_push(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            report = await device.joins()
            assert (report.samples, report.capacities, report.refusal) == (40, (CAPACITY,), "")
            adapter = [UnitObject(1, server.objects.put(b"layer two")), UnitObject(0, server.objects.put(b"layer one"))]
            await device.hears("probe", probe_task(adapter))
            assert (await server.sessions.next("probe")).loss == 2.5
            await device.hears("assignment", assignment(adapter))
            await device.until(lambda: server.objects.accepted)
            assert device.work.adapters == [[(1, b"layer two"), (0, b"layer one")]] * 2
            assert len(server.objects.offsets) == 3  # two fetches, one push: the second task found its objects cached
        assert device.work.closed

    against(tmp_path, body)


def test_a_plan_asked_again_is_answered_from_memory_even_while_a_task_runs(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            first = await device.joins()
            device.work.gate.clear()
            await device.hears("probe", probe_task())
            await device.until(lambda: "probe" in device.work.begun)
            assert await device.joins() == first and device.work.begun.count("plan") == 1
            await device.hears("plan", replace(SPEC, rounds=4))  # another question is another plan
            device.work.gate.set()
            await server.sessions.next("probe", skip=("progress", "plan"))
            await device.until(lambda: device.work.begun.count("plan") == 2)

    against(tmp_path, body)


def test_progress_is_told_while_a_task_runs(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            await device.hears("probe", probe_task())
            first = await server.sessions.next("progress", skip=())
            while first.phase != "probe":
                first = await server.sessions.next("progress", skip=())
            again = await server.sessions.next("progress", skip=())
            assert (again.key.run, again.done, again.total) == ("r", 1, 2)

    against(tmp_path, body)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (WorkerError("the worker was killed"), "WorkerError"),
        (DataError("d.jsonl:3: bad"), "DataError"),
        (ValueError("boom"), "WorkerError"),
    ],
)
def test_a_failed_task_is_told_and_the_daemon_lives_on(tmp_path, error, name):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.error = error
            await device.hears("assignment", assignment())
            failed = await server.sessions.next("failed")
            assert failed.error == name and str(error) in failed.message
            device.work.error = None
            await device.hears("probe", probe_task())
            await server.sessions.next("probe")
            assert server.sessions.opened == 1

    against(tmp_path, body)


def test_a_task_sent_again_is_not_started_twice(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            await device.hears("assignment", assignment())
            await device.until(lambda: "train" in device.work.begun)
            await server.sessions.tell.put("cut")
            await device.until(lambda: server.sessions.opened == 2)
            await device.hears("assignment", assignment())
            await device.hears("assignment", assignment())
            device.work.gate.set()
            await device.until(lambda: server.objects.accepted)
            assert device.work.begun.count("train") == 1 and device.work.killed == 0

    against(tmp_path, body)


@pytest.mark.parametrize("error", [None, BudgetError("it does not fit")], ids=["done", "failed"])
def test_a_task_sent_again_just_when_it_has_ended_is_done_again(tmp_path, monkeypatch, error):
    """The server has its answer already, and may have lost it; the device is still tidying up."""
    tidying, go_on = asyncio.Event(), asyncio.Event()

    async def slow(task):
        if task.get_coro().__name__ == "_beat":
            tidying.set()
            await go_on.wait()
        await cancel(task)

    monkeypatch.setattr(agent_module, "cancel", slow)

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.error = error
            await device.hears("assignment", assignment())
            await asyncio.wait_for(tidying.wait(), 10)
            if error is not None:
                await server.sessions.next("failed")
            else:
                assert server.objects.accepted
                server.objects.accepted.clear()
            await device.hears("assignment", assignment())
            await asyncio.sleep(0.2)
            go_on.set()
            if error is not None:
                await server.sessions.next("failed")
            else:
                await device.until(lambda: server.objects.accepted)

    against(tmp_path, body)


def test_a_probe_sent_again_is_answered_from_memory(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            for _ in range(2):
                await device.hears("probe", probe_task())
                await server.sessions.next("probe")
            await device.hears("probe", probe_task(key=replace(KEY, attempt=1)))
            await server.sessions.next("probe")
            assert device.work.begun.count("probe") == 2

    against(tmp_path, body)


def test_another_task_takes_the_place_of_the_running_one(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            await device.hears("probe", probe_task())
            await device.until(lambda: "probe" in device.work.begun)
            await device.hears("assignment", assignment(key=replace(KEY, round=1)))
            await device.until(lambda: "train" in device.work.begun)
            assert device.work.killed == 1

    against(tmp_path, body)


@pytest.mark.parametrize(("kind", "value"), [("cancel", KEY), ("ended", "r")])
def test_cancel_and_the_end_of_the_run_kill_the_task(tmp_path, kind, value):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            await device.hears("assignment", assignment())
            await device.until(lambda: "train" in device.work.begun)
            await device.hears(kind, value)
            await device.until(lambda: device.work.killed == 1)
            assert not server.objects.accepted

    against(tmp_path, body)


def test_a_cancel_of_another_task_changes_nothing(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            device.work.gate.clear()
            await device.hears("assignment", assignment())
            await device.until(lambda: "train" in device.work.begun)
            await device.hears("cancel", replace(KEY, round=7))
            device.work.gate.set()
            await device.until(lambda: server.objects.accepted)

    against(tmp_path, body)


def test_an_update_not_pushed_survives_a_restart_and_is_not_trained_again(tmp_path):
    async def body(server):
        server.objects.cuts = [3] * 100
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            assert (await server.sessions.next("failed")).error == "UnreachableError"
        server.objects.cuts = []
        async with Device(server, tmp_path) as again:
            await again.hears("assignment", assignment())  # no plan request: the run is remembered
            await again.until(lambda: server.objects.accepted)
            assert again.work.begun == []
            assert list(server.objects.accepted.values()) == [b"update of " + str(KEY).encode()]

    against(tmp_path, body)


def test_an_update_that_was_damaged_on_the_devices_disk_is_trained_again(tmp_path):
    class Damaged(Transfer):
        pushes = 0

        async def push(self, ready, path, *rest):
            self.pushes += 1
            if self.pushes == 1:
                path.write_bytes(b"x" + path.read_bytes()[1:])
                raise DigestError("the bytes received do not have the digest")
            return await super().push(ready, path, *rest)

    async def body(server):
        async with Device(server, tmp_path) as device:
            device.agent._transfer = Damaged(device.connection)
            await device.joins()
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.accepted)
            assert list(server.objects.accepted.values()) == [b"update of " + str(KEY).encode()]
            assert device.work.begun == ["plan", "train", "train"]

    against(tmp_path, body)


def test_an_update_that_this_device_can_not_read_is_a_failed_task_and_trained_anew_when_asked_again(tmp_path):
    """gRPC turns what its request iterator raises into a cancelled call, which no handler of errors sees."""

    class Gone(Transfer):
        pushes = 0

        async def push(self, ready, path, *rest):
            self.pushes += 1
            if self.pushes == 1:
                path.unlink()
            return await super().push(ready, path, *rest)

    async def body(server):
        async with Device(server, tmp_path) as device, asyncio.timeout(20):
            device.agent._transfer = Gone(device.connection)
            await device.joins()
            await device.hears("assignment", assignment())
            failed = await server.sessions.next("failed")
            assert failed.error == "StorageError" and "r.safetensors: the update can't be read: No such file" in failed.message
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.accepted)
            assert device.work.begun == ["plan", "train", "train"] and server.sessions.opened == 1

    against(tmp_path, body)


@pytest.mark.parametrize("kind", [OffsetError, DigestError, StorageError, ProtocolError])
def test_no_refusal_but_a_final_one_costs_the_trained_update(tmp_path, kind):
    async def body(server):
        server.objects.push_errors = [kind("not now")] * 50
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            failed = await server.sessions.next("failed")
            assert (failed.error, failed.message) == (kind.__name__, "not now")
            server.objects.push_errors = []
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.accepted)
            assert device.work.begun.count("train") == 1

    against(tmp_path, body)


def test_a_rejected_update_is_dropped(tmp_path):
    async def body(server):
        server.objects.push_errors = [UpdateRejected("layers.0 holds NaN")]
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            assert (await server.sessions.next("failed")).error == "UpdateRejected"
            assert not list((tmp_path / "outbox").glob("*"))

    against(tmp_path, body)


def test_an_update_asked_for_again_before_its_push_is_answered_is_pushed_again(tmp_path):
    """The server has accepted it, found it damaged, and says so before the device has the push's answer."""
    asked = []

    async def body(server):
        class Late(Transfer):
            async def push(self, *given):
                done = await super().push(*given)
                if not asked:
                    asked.append(dict(server.objects.accepted))
                    server.objects.accepted.clear()
                    await device.hears("assignment", assignment())
                    await device.until(lambda: device.agent._again)
                return done

        async with Device(server, tmp_path) as device:
            device.agent._transfer = Late(device.connection)
            await device.joins()
            await device.hears("assignment", assignment())
            await device.until(lambda: asked and device.agent._task.done())
            assert server.objects.accepted == asked[0] != {} and server.objects.pushes == 2
            assert device.work.begun.count("train") == 1

    against(tmp_path, body)


def test_a_cancel_ends_the_wait_for_a_full_disk(tmp_path):
    async def body(server):
        server.objects.push_errors = [StorageError("full")] * 10_000
        async with Device(server, tmp_path) as device:
            device.connection.backoff = replace(QUICK, attempts=10_000)
            await device.joins()
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.pushes > 3)
            await device.hears("cancel", KEY)
            await device.until(lambda: device.agent._task is None)
            pushes = server.objects.pushes
            await device.hears("probe", probe_task(key=replace(KEY, round=1)))
            await server.sessions.next("probe")
            assert server.objects.pushes == pushes and not list((tmp_path / "outbox").glob("*"))

    against(tmp_path, body)


def test_another_assignment_of_the_same_key_is_trained_anew(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.accepted)
            await device.hears("assignment", assignment(units=(UnitId(1),)))
            await device.until(lambda: device.work.begun.count("train") == 2)

    against(tmp_path, body)


def test_the_end_of_the_run_forgets_run_and_update(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.accepted)
            await device.hears("ended", "r")
            await device.hears("probe", probe_task())
            failed = await server.sessions.next("failed")
            assert failed.error == "NotFound" and "has not joined" in failed.message
            assert list((tmp_path / "outbox").iterdir()) == []

    against(tmp_path, body)


def test_what_can_not_be_deleted_at_the_end_of_a_run_does_not_end_the_daemon(tmp_path, caplog):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            (tmp_path / "outbox" / "r.json").mkdir(parents=True)  # unlink refuses a directory
            await device.hears("ended", "r")
            await device.hears("probe", probe_task())
            assert (await server.sessions.next("failed")).error == "NotFound"
            assert "can't delete" in caplog.text and server.sessions.opened == 1

    against(tmp_path, body)


def test_a_late_update_is_dropped_without_complaint(tmp_path):
    async def body(server):
        server.objects.error = TooLate("round 1 is closed")
        async with Device(server, tmp_path) as device:
            await device.joins()
            await device.hears("assignment", assignment())
            await device.until(lambda: "train" in device.work.begun and not list((tmp_path / "outbox").glob("*.json")))
            await device.hears("probe", probe_task(key=replace(KEY, round=1)))
            await server.sessions.next("probe")

    against(tmp_path, body)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(models=("other",)), "models"),
        (Policy(max_steps=1), "max_steps"),
        (Policy(min_samples=41), "min_samples"),
        (Policy(max_rounds=2), "max_rounds"),
        (Policy(upload_similarity=False), "upload_similarity"),
    ],
)
def test_the_policy_refuses_a_run(tmp_path, policy, why):
    async def body(server):
        async with Device(server, tmp_path, policy=policy) as device:
            report = await device.joins()
            assert report.capacities == () and report.refusal.startswith("PolicyError") and why in report.refusal

    against(tmp_path, body)


def test_the_policy_offers_only_the_modes_it_allows(tmp_path):
    async def body(server):
        async with Device(server, tmp_path, policy=Policy(gradients=(Gradient.STREAMED, Gradient.STITCHED))) as device:
            auto = replace(SPEC, train=replace(TRAIN, gradient=Gradient.AUTO))
            await device.hears("plan", auto)
            report = await server.sessions.next("plan")
            assert not report.capacities and "gradients: the budget holds submodel" in report.refusal

    against(tmp_path, body)


def test_the_policy_refuses_tasks_beyond_what_the_plan_said(tmp_path):
    async def body(server):
        async with Device(server, tmp_path, policy=Policy(max_steps=2)) as device:
            await device.joins()
            await device.hears("assignment", assignment(spec=replace(TRAIN, steps=3)))
            assert "max_steps" in (await server.sessions.next("failed")).message
            long = probe_task()
            await device.hears("probe", replace(long, spec=replace(long.spec, sequence_length=5000)))
            assert "max_sequence_length" in (await server.sessions.next("failed")).message
            assert device.work.begun == ["plan"]

    against(tmp_path, body)


def test_the_policy_keeps_the_loss(tmp_path):
    async def body(server):
        async with Device(server, tmp_path, policy=Policy(upload_loss=False)) as device:
            await device.joins()
            await device.hears("probe", probe_task())
            report = await server.sessions.next("probe")
            assert (report.loss, report.tokens, report.units) == (0.0, 0, 2)
            await device.hears("probe", replace(probe_task(), similarity=False))  # as each round of method "random" asks
            report = await server.sessions.next("probe")
            assert (report.loss, report.tokens, report.units) == (0.0, 0, 0)
            assert device.work.begun == ["plan", "probe"]  # the second was not measured at all
            await device.hears("assignment", assignment())
            await device.until(lambda: server.objects.accepted)
            metrics = server.objects.metrics[0]
            assert not metrics.HasField("loss_first") and not metrics.HasField("loss_last") and metrics.seconds == 1.5

    against(tmp_path, body)


def test_other_base_weights_are_refused_naming_both(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            device.work.print = "a" * 64
            report = await device.joins()
            assert report.refusal.startswith("FingerprintError") and report.fingerprint == "a" * 64
            assert "aaaa" in report.refusal and "ffff" in report.refusal
            await device.hears("probe", probe_task())
            assert (await server.sessions.next("failed")).error == "NotFound"

    against(tmp_path, body)


@pytest.mark.parametrize("error", [WorkerError("the worker was killed"), StorageError("the disk is full")])
def test_a_plan_that_fails_for_the_moment_is_tried_again_before_it_is_a_refusal(tmp_path, monkeypatch, error):
    """A refusal keeps a device out for as long as its session lasts: a worker that was killed once must not cost the run."""
    monkeypatch.setattr("fp_client.plans.PAUSES", (0.01, 0.01))

    class Mended(FakeWork):
        times = 0

        async def plan(self, spec):
            self.error = error if self.begun.count("plan") < self.times else None
            return await super().plan(spec)

    async def body(server):
        for times, refused in ((2, False), (9, True)):
            work = Mended()
            work.times = times
            async with Device(server, tmp_path, work) as device:
                assert (type(error).__name__ in (await device.joins()).refusal) == refused
                assert work.begun.count("plan") == 3

    against(tmp_path, body)


def test_a_device_that_was_refused_for_the_moment_is_asked_again_after_a_while(tmp_path, monkeypatch):
    """The server asks whoever connects; nothing else would bring the device back before its session ends, which may be weeks."""
    monkeypatch.setattr("fp_client.plans.PAUSES", (0.01,))
    monkeypatch.setattr("fp_client.plans.AGAIN_SECONDS", 0.2)

    async def body(server):
        work = FakeWork()
        work.error = StorageError("the disk is full")
        async with Device(server, tmp_path, work) as device:
            assert "StorageError" in (await device.joins()).refusal
            work.error = None
            await device.until(lambda: server.sessions.opened == 2)
            assert (await device.joins()).refusal == ""
            await asyncio.sleep(0.5)
            assert server.sessions.opened == 2
        async with Device(server, tmp_path, policy=Policy(max_steps=1)) as device:  # time does not mend that
            assert "PolicyError" in (await device.joins()).refusal
            await asyncio.sleep(0.5)
            assert server.sessions.opened == 3

    against(tmp_path, body)


def test_a_policy_that_was_changed_holds_for_runs_the_device_had_joined(tmp_path):
    """After a restart a server sends the outstanding task, without asking what the device can hold."""

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
        async with Device(server, tmp_path, policy=Policy(models=("other",))) as device:
            for kind, task in (("probe", probe_task()), ("assignment", assignment())):
                await device.hears(kind, task)
                failed = await server.sessions.next("failed")
                assert failed.error == "PolicyError" and "models: " in failed.message
            assert device.work.begun == []

    against(tmp_path, body)


def test_a_budget_too_small_is_refused_with_the_smallest(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            device.work.error = BudgetError("needs 900 MiB", 900 << 20)
            report = await device.joins()
            assert report.smallest_budget == 900 << 20 and "900 MiB" in report.refusal

    against(tmp_path, body)


def test_a_damaged_cached_object_is_fetched_again(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            ref = server.objects.put(b"layer one")
            await device.hears("probe", probe_task([UnitObject(0, ref)]))
            await server.sessions.next("probe")
            (tmp_path / "objects" / ref.digest).write_bytes(b"layer ???")
            await device.hears("assignment", assignment([UnitObject(0, ref)]))
            await device.until(lambda: server.objects.accepted)
            assert device.work.adapters[-1] == [(0, b"layer one")]

    against(tmp_path, body)


def test_an_object_of_other_bytes_fails_the_task(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            ref = server.objects.put(b"layer one")
            server.objects.objects[ref.digest] = b"layer ???"
            await device.hears("probe", probe_task([UnitObject(0, ref)]))
            assert (await server.sessions.next("failed")).error == "DigestError"
            await device.hears("probe", probe_task([UnitObject(0, ObjectRef(ref.digest, 1 << 50))]))
            assert "policy.toml: max_fetch: the server asks for" in (await server.sessions.next("failed")).message
            device.agent._policy.__dict__["max_fetch"] = 1 << 60
            await device.hears("probe", probe_task([UnitObject(0, ObjectRef(ref.digest, 1 << 50))]))
            assert "client.toml allows 1048576 ([cache] max_size)" in (await server.sessions.next("failed")).message

    against(tmp_path, body)


def test_the_daemon_outlives_a_server_restart(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            await server.stop()
            await server.start()
            await device.until(lambda: server.sessions.opened == 2)

    against(tmp_path, body)


def test_a_session_in_which_a_task_was_done_begins_the_count_of_failures_anew(tmp_path):
    """Whatever ended it: here a message that this device does not know."""

    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            for number in range(2 * QUICK.attempts):
                await device.hears("probe", probe_task(key=replace(KEY, attempt=number)))
                await server.sessions.next("probe")
                await server.sessions.tell.put(session_pb2.ServerMessage())
                await device.until(lambda wanted=number + 2: server.sessions.opened == wanted)
            assert not device.running.done()
            for _ in range(QUICK.attempts - 1):
                seen = server.sessions.opened
                await server.sessions.tell.put(session_pb2.ServerMessage())
                await device.until(lambda seen=seen: server.sessions.opened > seen or device.running.done())
            with pytest.raises(ProtocolError, match="unexpected message"):
                await asyncio.wait_for(device.running, 20)

    against(tmp_path, body)


def test_a_server_that_stays_away_ends_the_daemon(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            await device.joins()
            await server.stop()
            with pytest.raises(UnreachableError):
                await asyncio.wait_for(device.running, 20)
            assert device.work.closed
            await server.start()

    against(tmp_path, body)


@pytest.mark.parametrize("error", [IdentityError("revoked"), ProtocolError("another schema"), InUseError("two daemons")])
def test_a_refusal_ends_the_daemon_at_once(tmp_path, error):
    async def body(server):
        server.sessions.refuse = error
        async with Device(server, tmp_path) as device:
            with pytest.raises(type(error), match=str(error)):
                await asyncio.wait_for(device.running, 20)
            assert len(server.sessions.schemas) == 1

    against(tmp_path, body)


def unimplemented() -> FedPrunerError:
    """What is between a device and a server that is just being replaced answers for it."""
    error = FedPrunerError("Method not found!")
    error.status = "UNIMPLEMENTED"
    return error


@pytest.mark.parametrize("error", [StorageError("the disk is full"), DamagedError("log.sqlite: event 7"), unimplemented()])
def test_a_server_in_trouble_is_asked_again_and_not_for_ever(tmp_path, caplog, error):
    async def body(server):
        server.sessions.refuse = error
        async with Device(server, tmp_path) as device:
            device.agent._backoff = replace(QUICK, attempts=20)
            await device.until(lambda: len(server.sessions.schemas) >= 2 or device.running.done())
            assert not device.running.done() and str(error) in device.agent.link.reason
            server.sessions.refuse = None
            await device.joins()
            assert f"{error}; try 2 of 20" in caplog.text
            server.sessions.refuse = error
            await server.sessions.tell.put("cut")
            with pytest.raises(type(error), match=str(error)):
                await asyncio.wait_for(device.running, 20)
            assert len(server.sessions.schemas) > 20

    against(tmp_path, body)


def test_a_server_that_talks_nonsense_is_not_asked_for_ever(tmp_path):
    async def body(server):
        async with Device(server, tmp_path) as device:
            for number in range(QUICK.attempts):
                await device.until(lambda number=number: server.sessions.opened == number + 1)
                await server.sessions.tell.put(session_pb2.ServerMessage())
            with pytest.raises(ProtocolError, match="unexpected message"):
                await asyncio.wait_for(device.running, 20)
            assert server.sessions.opened == QUICK.attempts

    against(tmp_path, body)
