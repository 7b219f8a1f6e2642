"""The worker process and the daemon's handle on it: real processes, a tiny random model."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.blocks import read_blocks, write_blocks
from common.codec import to_json
from common.errors import BudgetError, DataError, ModelError, ProtocolError, StorageError, WorkerError
from common.types import (
    Assignment,
    Gradient,
    LoraBlock,
    ProbeReport,
    ProbeSpec,
    ProbeTask,
    Quantization,
    TaskKey,
    TrainSpec,
    UnitId,
)
from fp_client import pool as pool_module
from fp_client.data import DataSource
from fp_client.messages import AdapterFile, CheckArgs, CheckResult, PaceArgs, ProbeArgs, TrainArgs, TrainResult, WorkerConfig
from fp_client.pace import Pace
from fp_client.pool import Worker, worker_environment
from fp_client.tasks import Tasks
from fp_client.worker import report
from tests.unit import device, tiny

KEY = TaskKey("run", 0, 0)
TARGETS = ("mlp.down_proj", "self_attn.q_proj")
SPEC = TrainSpec(2, 2, 256, 1e-3, 4, 8.0, TARGETS, 11)
PROBE = ProbeTask(KEY, ProbeSpec(positions=32, batch_size=2, sequence_length=256), ())


def assignment(spec: TrainSpec = SPEC, units: tuple[int, ...] = (1, 4)) -> Assignment:
    kept = tuple(UnitId(i) for i in units)
    return Assignment(KEY, kept, (kept,), ((0.5,) * len(kept),), spec, (), 1, True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    root = tmp_path_factory.mktemp("device")
    return WorkerConfig(
        str(device.model(root)), "ab" * 32, str(root / "cache"), DataSource(str(device.data(root / "data.jsonl")))
    )


def with_worker(config: WorkerConfig, body: Callable[[Worker], Awaitable[Any]], **options: float) -> Any:
    async def run() -> Any:
        async with Worker(config, **options) as worker:
            return await body(worker)

    return asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="the score is Linux's")
def test_the_worker_and_not_the_daemon_is_what_the_kernel_kills_when_memory_is_spent(config: WorkerConfig) -> None:
    def score(of: int) -> int:
        return int(Path(f"/proc/{of}/oom_score_adj").read_text())

    async def body(worker: Worker) -> int:
        return score((await worker.start()).pid)

    assert with_worker(config, body) == 1000 > score(os.getpid())


def adapter_files(directory: Path, layers: Iterator[int] | range) -> tuple[AdapterFile, ...]:
    generator = np.random.default_rng(0)
    files = []
    for layer in layers:
        path = directory / f"layer-{layer}.safetensors"
        a = generator.normal(size=(3, tiny.COMMON["hidden_size"])).astype(np.float32)
        b = generator.normal(size=(tiny.COMMON["hidden_size"], 3)).astype(np.float32)
        write_blocks(path, [LoraBlock(layer, "self_attn.q_proj", a, b)])
        files.append(AdapterFile(layer, str(path)))
    return tuple(files)


def test_check_probe_and_train_in_one_warm_process(config: WorkerConfig, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    async def body(worker: Worker) -> None:
        ready = await worker.start()
        assert ready.pid == worker.pid and ready.warmed_bytes > 100 << 20
        assert await worker.run("check", CheckArgs(256), CheckResult) == CheckResult(38, 2, 0)
        plain = await worker.run("probe", ProbeArgs(PROBE, ()), ProbeReport, lambda *p: seen.append(p))
        assert plain.similarity.shape == (6, 6) and plain.in_out.shape == (6,) and np.isfinite(plain.loss)
        assert plain.tokens > 0 and plain.peak_bytes > 0
        assert seen[-1] == ("probe", 6, 6)
        changed = await worker.run("probe", ProbeArgs(PROBE, adapter_files(tmp_path, range(6))), ProbeReport)
        assert changed.loss != plain.loss
        only = await worker.run("probe", ProbeArgs(replace(PROBE, similarity=False), ()), ProbeReport)
        assert only.similarity.size == 0 and only.loss == pytest.approx(plain.loss, rel=1e-5)
        outs = [tmp_path / "one", tmp_path / "two"]
        for out in outs:
            done = await worker.run("train", TrainArgs(assignment(), (), str(out)), TrainResult, lambda *p: seen.append(p))
            assert done.metrics.measured_peak_bytes > 0 and done.metrics.predicted_peak_bytes > 0
        assert seen[-1] == ("train", 4, 4) and ("load", 2, 2) in seen
        blocks = list(read_blocks(outs[0]))
        assert [(b.layer, b.module) for b in blocks] == [(layer, name) for layer in (1, 4) for name in TARGETS]
        assert any(np.abs(b.b).max() > 0 for b in blocks)
        assert outs[0].read_bytes() == outs[1].read_bytes()
        assert worker.pid == ready.pid

    with_worker(config, body)


def test_a_disk_without_room_for_activations_is_said_before_anything_is_loaded(
    config: WorkerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Tasks._room
    tasks = object.__new__(Tasks)  # without the warm-up: the check needs the configuration alone
    tasks.config = replace(config, cache=str(tmp_path / "new"))
    free = shutil.disk_usage(tmp_path).free
    room(tasks, free // 2)
    with pytest.raises(StorageError, match=r"new: \d+ MiB of activations will be spilled here, and \d+ MiB are free: make room"):
        room(tasks, 2 * free + (1 << 30))


def test_a_probe_that_is_not_finite_is_a_named_error(config: WorkerConfig, tmp_path: Path) -> None:
    """Weights of W_0 + ΔW too large for the dtype: a report of NaN would be refused by every server, for ever."""
    path = tmp_path / "layer-2.safetensors"
    huge = np.full((3, tiny.COMMON["hidden_size"]), 1e30, np.float32)
    write_blocks(path, [LoraBlock(2, "self_attn.o_proj", huge, huge.T.copy())])
    args = ProbeArgs(PROBE, (AdapterFile(2, str(path)),))
    message = r"run run, round 1: the full model's held-out loss \(nan\) and similarity .*is not finite: .* for float32"

    async def body(worker: Worker) -> None:
        with pytest.raises(ModelError, match=message):
            await worker.run("probe", args, ProbeReport)
        only = replace(args, task=replace(PROBE, similarity=False))
        with pytest.raises(ModelError, match=r"held-out loss \(nan\) is not finite"):
            await worker.run("probe", only, ProbeReport)
        assert np.isfinite((await worker.run("probe", ProbeArgs(PROBE, ()), ProbeReport)).loss)

    with_worker(config, body)


def test_nf4_is_quantized_once_and_kept(config: WorkerConfig, tmp_path: Path) -> None:
    quantized = replace(config, quantization=Quantization.NF4, cache=str(tmp_path / "cache"))
    with_worker(quantized, lambda worker: worker.run("train", TrainArgs(assignment(), (), str(tmp_path / "out")), TrainResult))
    assert len(list((tmp_path / "cache" / "nf4").rglob("layer-*.safetensors"))) == 2


def test_errors_come_back_as_what_they_are_and_only_unexpected_ones_end_the_process(config: WorkerConfig, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        with pytest.raises(DataError, match=r"data\.jsonl:\d+: the response does not fit the window"):
            await worker.run("check", CheckArgs(64), CheckResult)
        pid = worker.pid
        with pytest.raises(ProtocolError, match=r"has no linear module 'mlp\.gates'"):
            bad = assignment(replace(SPEC, targets=("mlp.gates",)))
            await worker.run("train", TrainArgs(bad, (), str(tmp_path / "out")), TrainResult)
        with pytest.raises(ProtocolError, match="the model has 6 layers"):
            await worker.run("train", TrainArgs(assignment(units=(17,)), (), str(tmp_path / "out")), TrainResult)
        with pytest.raises(ProtocolError, match="unknown task 'dance'"):
            await worker.run("dance", CheckArgs(1), CheckResult)
        with pytest.raises(ProtocolError, match="task 'probe': ProbeArgs: unknown key 'window'"):
            await worker.run("probe", CheckArgs(1), CheckResult)
        assert worker.pid == pid is not None
        with pytest.raises(WorkerError, match="unexpected FileNotFoundError"):
            await worker.run("train", TrainArgs(assignment(), (), str(tmp_path / "no" / "out")), TrainResult)
        assert worker.pid is None
        assert (await worker.run("check", CheckArgs(256), CheckResult)).samples == 38

    with_worker(config, body)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "/no/such/model"}, ModelError, "its tokenizer can't be loaded"),
        ({"device": "cuda"}, WorkerError, "no CUDA device"),
    ],
)
def test_a_worker_that_cannot_start_says_why(
    config: WorkerConfig, change: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_worker(replace(config, **change), lambda worker: worker.start())  # type: ignore[arg-type]


def test_bad_data_is_named(config: WorkerConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": 1}\n')
    broken = replace(config, data=DataSource(str(tmp_path / "bad.jsonl")))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: 'instruction' must be a text"):
        with_worker(broken, lambda worker: worker.run("check", CheckArgs(256), CheckResult))


def test_a_budget_the_probe_cannot_keep_is_refused(config: WorkerConfig) -> None:
    with pytest.raises(BudgetError, match="the smallest that would do") as caught:
        with_worker(replace(config, budget_bytes=1 << 20), lambda worker: worker.run("probe", ProbeArgs(PROBE, ()), ProbeReport))
    assert caught.value.smallest > 1 << 20


def test_an_assignment_larger_than_the_budget_is_refused_before_loading(config: WorkerConfig, tmp_path: Path) -> None:
    args = TrainArgs(assignment(replace(SPEC, rank=1 << 16)), (), str(tmp_path / "out"))
    with pytest.raises(BudgetError, match="nothing was loaded") as caught:
        with_worker(replace(config, budget_bytes=100 << 20), lambda worker: worker.run("train", args, TrainResult))
    assert caught.value.smallest > 100 << 20


def test_an_allocation_beyond_the_cap_is_a_budget_error() -> None:
    code = (
        "import torch, json\n"
        "from fp_client import measure, worker\n"
        "measure.limit(64 << 20)\n"
        "small = torch.zeros(8 << 20)\n"
        "del small\n"
        "try:\n"
        "    torch.zeros(32 << 20)\n"
        "except RuntimeError as error:\n"
        "    print(json.dumps(worker.report(error)))\n"
        "small = torch.zeros(8 << 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=worker_environment(1))
    reply = json.loads(done.stdout)
    assert reply["error"] == "BudgetError" and "needs more memory than its budget" in reply["message"]


def test_a_full_disk_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
    assert report(full) == {"error": "StorageError", "message": "/somewhere: the disk is full; free some space"}
    assert capsys.readouterr().err == "", "nothing unexpected: no stack trace"
    assert report(OSError(errno.EIO, os.strerror(errno.EIO)))["error"] == "WorkerError"
    assert "Input/output error" in capsys.readouterr().err


def long_train(out: Path) -> TrainArgs:
    return TrainArgs(assignment(replace(SPEC, steps=20_000)), (), str(out))


async def until_training(worker: Worker, out: Path) -> asyncio.Task[TrainResult]:
    """A training task that has done its first step."""
    started = asyncio.Event()
    task = asyncio.create_task(
        worker.run("train", long_train(out), TrainResult, lambda phase, *_: phase == "train" and started.set(), 5 << 30)
    )
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert started.is_set()
    return task


def test_a_killed_worker_ends_the_task_and_the_next_starts_afresh(config: WorkerConfig, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        task = await until_training(worker, tmp_path / "out")
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(WorkerError, match="probably out of memory: predicted 5120 MiB, budget 1024 MiB"):
            await task
        assert worker.pid is None
        assert (await worker.run("check", CheckArgs(256), CheckResult)).samples == 38
        assert worker.pid != first

    with_worker(replace(config, budget_bytes=1 << 30), body)


def test_a_worn_worker_is_ended_and_the_next_task_gets_a_fresh_one(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await worker.run("check", CheckArgs(256), CheckResult)
        first, exchange = worker.pid, worker._exchange
        assert first is not None

        async def worn(*args: Any) -> Any:
            return {**await exchange(*args), "worn": True}

        monkeypatch.setattr(worker, "_exchange", worn)
        assert (await worker.run("check", CheckArgs(256), CheckResult)).samples == 38
        assert worker.pid is None
        monkeypatch.setattr(worker, "_exchange", exchange)
        assert (await worker.run("check", CheckArgs(256), CheckResult)).samples == 38
        assert worker.pid not in (None, first)

    with_worker(config, body)


def test_another_death_is_reported_with_its_signal(config: WorkerConfig, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        task = await until_training(worker, tmp_path / "out")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(WorkerError, match="died during 'train' \\(signal SIGSEGV\\)"):
            await task

    with_worker(config, body)


def test_cancelling_kills_the_process(config: WorkerConfig, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        task = await until_training(worker, tmp_path / "out")
        pid = worker.pid
        assert pid is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert worker.pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with_worker(config, body)


def test_an_idle_worker_is_released(config: WorkerConfig) -> None:
    async def body(worker: Worker) -> None:
        await worker.run("check", CheckArgs(256), CheckResult)
        assert worker.pid is not None
        process = worker._process
        assert process is not None
        async with asyncio.timeout(30):
            await process.wait()
        await worker.run("check", CheckArgs(256), CheckResult)

    with_worker(config, body, idle_seconds=0.2)


def test_a_start_that_takes_too_long_is_an_error(config: WorkerConfig) -> None:
    with pytest.raises(WorkerError, match="did not start within 0 s"):
        with_worker(config, lambda worker: worker.start(), start_seconds=0.01)


def test_the_worker_dies_with_its_daemon(config: WorkerConfig, tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "fp_client.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=worker_environment(1),
    )
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps({"config": to_json(config)}).encode() + b"\n")
    worker.stdin.write(json.dumps({"task": "train", "args": to_json(long_train(tmp_path / "out"))}).encode() + b"\n")
    worker.stdin.flush()
    try:
        while b'"train"' not in (line := worker.stdout.readline()):
            assert line, "the worker ended before it trained"
        worker.stdin.close()
        assert worker.wait(timeout=60) == 0
    finally:
        with suppress(ProcessLookupError):
            worker.kill()
        worker.stdout.close()
        worker.wait()


def test_what_libraries_print_does_not_get_into_the_messages(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noisy = tmp_path / "sitecustomize.py"
    noisy.write_text(
        "import os, sys, threading, time\n"
        "def shout():\n"
        "    while os.fstat(1).st_ino != os.fstat(2).st_ino:\n"  # the worker has not claimed its output yet
        "        time.sleep(0.01)\n"
        "    while True:\n"
        "        os.write(1, b'noise on descriptor 1\\n'); print('noise', flush=True); time.sleep(0.02)\n"
        "if sys.argv[:1] == ['-m']:\n"
        "    threading.Thread(target=shout, daemon=True).start()\n"
    )
    original = pool_module.worker_environment
    monkeypatch.setattr(pool_module, "worker_environment", lambda threads: {**original(threads), "PYTHONPATH": str(tmp_path)})

    async def body(worker: Worker) -> None:
        assert (await worker.run("check", CheckArgs(256), CheckResult)).samples == 38
        async with asyncio.timeout(30):
            while not any("noise" in word for word in worker._last_words):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await worker.run("check", CheckArgs(256), CheckResult)).samples == 38

    with_worker(config, body)


def test_the_pace_is_measured_and_predicts_a_step(config: WorkerConfig, tmp_path: Path) -> None:
    async def body(worker: Worker) -> tuple[Pace, TrainResult]:
        pace = await worker.run("pace", PaceArgs(SPEC, 4, 2), Pace)
        args = TrainArgs(assignment(replace(SPEC, gradient=Gradient.STREAMED)), (), str(tmp_path / "update"), pace)
        return pace, await worker.run("train", args, TrainResult)

    ratios = []
    for _ in range(3):
        pace, result = with_worker(config, body)
        assert pace.rows == 2 and min(vars(pace).values()) > 0
        metrics = result.metrics
        assert metrics.predicted_step_seconds > 0 and metrics.step_seconds > 0
        ratios.append(metrics.predicted_step_seconds / metrics.step_seconds)
        # Milliseconds on a machine that does other things: only the order of magnitude can be held to, and not each time.
        if 1 / 20 < ratios[-1] < 20:
            return
    pytest.fail(f"predicted to taken: {ratios}")


def test_the_pace_of_a_model_whose_targets_are_not_there(config: WorkerConfig) -> None:
    with pytest.raises(ProtocolError, match="no linear module"):
        with_worker(config, lambda worker: worker.run("pace", PaceArgs(replace(SPEC, targets=("mlp.c_fc",)), 0, 2), Pace))
