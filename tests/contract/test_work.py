"""A whole device but for the server: real mTLS, real worker process, a tiny random model."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_server import serving

from common.blocks import read_blocks
from common.checkpoint import Checkpoint
from common.errors import BudgetError, ConfigError, DataError, ModelError, ProtocolError
from common.pb import session_pb2
from common.tensorfile import TensorFile, write_tensors
from common.transport import serde, wire
from common.types import Assignment, Part, ProbeSpec, ProbeTask, RunSpec, TaskKey, TrainSpec, UnitId
from fp_client.agent import Agent
from fp_client.cache import ObjectCache
from fp_client.config import load_config
from fp_client.messages import AdapterFile
from fp_client.pace import Pace
from fp_client.policy import Policy
from fp_client.rpc import Connection
from fp_client.rpc_objects import Transfer
from fp_client.state import Outbox, Runs
from fp_client.work import KEPT, LocalWork, check_ranks
from tests.unit import device

KEY = TaskKey("r", 0, 0)
TARGETS = ("mlp.down_proj", "self_attn.q_proj")
TRAIN = TrainSpec(2, 2, 256, 1e-3, 4, 8.0, TARGETS, 11)
PROBE = ProbeSpec(positions=32, batch_size=2, sequence_length=256)
QUICK = wire.Backoff(first=0.01, longest=0.05, attempts=4)


def spec_of(directory, **changes) -> RunSpec:
    checkpoint = Checkpoint(directory / "model")
    fingerprint = checkpoint.fingerprint()
    checkpoint.close()
    return RunSpec(**{**dict(
        run="r", model="tiny", fingerprint=fingerprint, method="fedpruner", part=Part.LAYER, train=TRAIN, probe=PROBE,
        broadcast_rank=8, rounds=1,
    ), **changes})  # fmt: skip


@pytest.fixture
def home(tmp_path):
    device.model(tmp_path).rename(tmp_path / "model")
    device.data(tmp_path / "data.jsonl")
    (tmp_path / "client.toml").write_text(
        'device = "cpu"\n[budget]\nhost = "1GiB"\n[models."tiny"]\nsource = "model"\n'
        '[data]\nsource = "data.jsonl"\nheld_out = 0.1\n'
    )
    return tmp_path


def work_of(home) -> LocalWork:
    return LocalWork(load_config(home), home)


def test_reading_the_weights_ends_with_the_daemon_and_not_after_the_last_byte(home, monkeypatch):
    """A thread can't be cancelled: it looks up at every sign of progress."""
    reading, ended = threading.Event(), threading.Event()

    def endless(checkpoint, cache, progress):
        try:
            while True:
                reading.set()
                progress(1, 2)
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr("fp_client.work.cached_fingerprint", endless)

    async def main():
        work = asyncio.create_task(work_of(home).fingerprint(spec, lambda *_: None))
        assert await asyncio.to_thread(reading.wait, 30)
        work.cancel()
        await asyncio.wait([work])
        assert await asyncio.to_thread(ended.wait, 30)

    spec = spec_of(home)
    asyncio.run(main())


def planned(home, spec):
    async def main():
        work = work_of(home)
        try:
            return await work.plan(spec)
        finally:
            await work.close()

    return asyncio.run(main())


def test_a_round_on_real_weights_survives_a_killed_worker(home):
    async def main():
        async with serving() as server:
            server.ca.join(home)
            connection, work = Connection(home, server.address, QUICK), work_of(home)
            agent = Agent(
                connection.open, Transfer(connection), work, Policy(), ObjectCache(home / "objects", 1 << 20),
                Runs(home / "runs"), Outbox(home / "outbox"), QUICK,
            )  # fmt: skip
            running, hear, say = asyncio.create_task(agent.run()), server.sessions.next, server.sessions.tell.put
            spec = spec_of(home)
            await say(session_pb2.ServerMessage(plan=session_pb2.PlanRequest(spec=serde.run_spec_to_pb(spec))))
            report = serde.plan_report_from_pb(await hear("plan"))
            assert (report.refusal, report.samples, report.fingerprint) == ("", 36, spec.fingerprint)
            capacity = report.capacities[0]
            assert capacity.units == len(report.unit_bytes) and capacity.peak_bytes <= report.budget_bytes == 1 << 30

            await say(session_pb2.ServerMessage(probe=serde.probe_task_to_pb(ProbeTask(KEY, PROBE, ()))))
            found = serde.probe_report_from_pb(await hear("probe"))
            assert found.similarity.shape == (capacity.units, capacity.units) and found.tokens > 0

            units = (UnitId(1), UnitId(3))
            task = Assignment(KEY, units, (units,), ((0.5, 0.5),), TRAIN, (), 1, True)
            long_run = replace(spec, run="long", train=replace(TRAIN, steps=1000))
            await say(session_pb2.ServerMessage(plan=session_pb2.PlanRequest(spec=serde.run_spec_to_pb(long_run))))
            await hear("plan")
            long = replace(task, key=TaskKey("long", 0, 0), spec=long_run.train)
            await say(session_pb2.ServerMessage(assignment=serde.assignment_to_pb(long)))
            while (await hear("progress")).phase != "train":
                pass
            os.kill(work._worker.pid, signal.SIGKILL)
            failed = await hear("failed")
            assert failed.error == "WorkerError" and "out of memory" in failed.message

            await say(session_pb2.ServerMessage(assignment=serde.assignment_to_pb(task)))
            async with asyncio.timeout(180):
                while not server.objects.accepted:  # noqa: ASYNC110  # the other side is a real worker
                    await asyncio.sleep(0.05)
            running.cancel()
            await asyncio.wait([running])
            await connection.close()
            return next(iter(server.objects.accepted.values()))

    update = asyncio.run(main())
    (home / "update").write_bytes(update)
    blocks = list(read_blocks(home / "update"))
    assert [(b.layer, b.module) for b in blocks] == [(layer, module) for layer in (1, 3) for module in TARGETS]
    with TensorFile(home / "update") as file:
        assert {info.dtype for info in file.tensors.values()} == {"F32"}


def test_a_budget_too_small_is_refused_before_a_worker_starts(home):
    text = (home / "client.toml").read_text()
    (home / "client.toml").write_text(text.replace("1GiB", "20MiB"))

    async def main():
        work = work_of(home)
        with pytest.raises(BudgetError, match="smallest that would do") as caught:
            await work.plan(spec_of(home))
        assert work._worker is None
        return caught.value.smallest

    smallest = asyncio.run(main())
    (home / "client.toml").write_text(text.replace("1GiB", str(smallest)))
    assert planned(home, spec_of(home)).capacities[0].units >= 1


def test_a_response_longer_than_the_window_is_named_or_dropped(home):
    with (home / "data.jsonl").open("a") as file:
        file.write('{"instruction": "Say it", "output": "' + "long " * 200 + '"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:41: the response does not fit"):
        planned(home, spec_of(home))
    text = (home / "client.toml").read_text()
    (home / "client.toml").write_text(text + 'on_long = "drop"\n')
    assert planned(home, spec_of(home)).samples in (36, 37)


def test_models_that_are_missing(home):
    with pytest.raises(ConfigError, match=r"no model 'other' here \(has: tiny\)"):
        planned(home, spec_of(home, model="other"))
    next((home / "model").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="shard is missing"):
        spec = RunSpec("r", "tiny", "f" * 64, "fedpruner", Part.LAYER, TRAIN, PROBE, 8, 1)
        planned(home, spec)


def test_the_data_are_read_by_one_thread_at_a_time_whoever_is_cancelled(home, monkeypatch, caplog):
    """A thread can't be cancelled: who asks next waits for it, and reads nothing where it is cancelled meanwhile."""
    gc.collect()  # what earlier tests have left is theirs
    caplog.clear()
    begun, go = [], threading.Event()

    def slow(self, spec, pace=None):
        begun.append(spec.run)
        assert go.wait(30)
        raise BudgetError("too small")

    monkeypatch.setattr(LocalWork, "planned", slow)

    async def main():
        work, spec = work_of(home), spec_of(home)
        try:
            for n in range(4):
                asking = asyncio.create_task(work.plan(replace(spec, run=f"r{n}")))
                await asyncio.sleep(0.05)
                asking.cancel()
                assert await asyncio.wait([asking], timeout=5) == ({asking}, set()), "who is cancelled waits for no thread"
            assert begun == ["r0"]
            last = asyncio.create_task(work.plan(replace(spec, run="last")))
            await asyncio.sleep(0.05)
            assert begun == ["r0"]
        finally:
            go.set()
        with pytest.raises(BudgetError):
            await last
        with pytest.raises(BudgetError):
            await work.plan(spec)
        assert begun == ["r0", "last", "r"]

    asyncio.run(main())
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_plans_and_paces_of_ever_other_runs_are_not_kept_for_ever(home, monkeypatch):
    """A plan's pace stays as long as it does."""
    measured = []

    class Idle:
        async def run(self, name, *rest):
            measured.append(name)
            return Pace(1, *[0.1] * 8)

    async def worker(self, spec):
        return Idle()

    monkeypatch.setattr(LocalWork, "worker", worker)
    monkeypatch.setattr(
        LocalWork, "planned", lambda self, spec, pace=None: SimpleNamespace(modes=[SimpleNamespace(micro_batch=1)])
    )

    async def main():
        work, spec = work_of(home), spec_of(home)
        for n in range(50):
            await work._remembered(replace(spec, run=f"r{n}", broadcast_rank=100 + n))
            await work._remembered(replace(spec, run=f"s{n}"))
        assert len(work._plans) == KEPT and len(work._paces) == KEPT
        assert measured == ["pace"] * 51
        assert {(s.run[0], s.broadcast_rank) for s in work._plans} == {("s", 8), *(("r", 100 + n) for n in range(42, 50))}

    asyncio.run(main())


def test_the_fingerprint_is_read_once(home):
    async def main():
        work, told = work_of(home), []
        first = await work.fingerprint(spec_of(home), lambda *seen: told.append(seen))
        assert told and first == spec_of(home).fingerprint
        told.clear()
        assert await work.fingerprint(spec_of(home), lambda *seen: told.append(seen)) == first
        assert told == []

    asyncio.run(main())


def test_reading_the_weights_for_their_fingerprint_is_a_phase_of_its_own(home):
    """Bytes reported as `fetch` would be more than an adapter ever has, and its fetching would no longer count."""
    seen = []

    async def main():
        await work_of(home).fingerprint(spec_of(home), lambda *note: seen.append(note))

    asyncio.run(main())
    assert {phase for phase, _, _ in seen} == {"verify"} and seen[-1][1] == seen[-1][2] > 0


def test_an_adapter_of_a_larger_rank_than_announced_is_not_loaded(home):
    """What the policy allowed was the announced one; other keys than LoRA's are no adapter."""
    path = home / "layer.safetensors"
    shapes = {"lora_A": np.zeros((9, 4), np.float32), "lora_B": np.zeros((4, 9), np.float32)}
    for names, most, said in (
        (("lora_A", "lora_B"), 8, "adapter of layer 3: has rank 9, its run announced at most 8"),
        (("lora_A", "lora_B"), 9, ""),
        (("lora_A", "lora_C"), 9, "adapter of layer 3: tensor 'layers.2.self_attn.q_proj.lora_C': not a LoRA key"),
        (("lora_A",), 9, "adapter of layer 3: tensor 'layers.2.self_attn.q_proj.lora_B' is missing"),
    ):
        write_tensors(path, {f"layers.2.self_attn.q_proj.{name}": shapes.get(name, shapes["lora_B"]) for name in names})
        if said:
            with pytest.raises(ProtocolError, match=re.escape(said)):
                check_ranks((AdapterFile(2, str(path)),), most)
        else:
            check_ranks((AdapterFile(2, str(path)),), most)
    for a, b in (((4,), (4, 4)), ((), (4, 4)), ((4, 9), (4, 9)), ((0, 4), (1 << 40, 0))):
        write_tensors(path, {f"layers.2.self_attn.q_proj.lora_{f}": np.zeros(s, np.float32) for f, s in (("A", a), ("B", b))})
        with pytest.raises(ProtocolError, match=r"adapter of layer 3: self_attn\.q_proj: A .* are no factors of one matrix"):
            check_ranks((AdapterFile(2, str(path)),), 9)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="truncated or corrupt"):
        check_ranks((AdapterFile(2, str(path)),), 9)
