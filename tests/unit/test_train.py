"""Training: equal to a plain loop on the whole batch, the same bytes for the same seed, clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import DataError, ProtocolError
from common.types import Estimator, Factors, Gradient, LoraBlock, Quantization, TrainSpec
from fp_client.loader import UnitLoader
from fp_client.submodel import Submodel, load_submodel
from fp_client.train import TrainResult, check_spec, micro_batches, train
from tests.unit import tiny
from tests.unit.test_submodel import KEPT, SPEC, UNITS

BATCHES = [tiny.batch(4, seed=seed) for seed in range(3)]


def loaded(directory: Path, spec: TrainSpec = SPEC, checkpointing: bool = True) -> Submodel:
    return load_submodel(UnitLoader(Checkpoint(directory)), UNITS, spec, checkpointing=checkpointing)


def run(directory: Path, micro_batch: int = 2, spec: TrainSpec = SPEC, checkpointing: bool = True) -> TrainResult:
    return train(loaded(directory, spec, checkpointing), BATCHES, spec, micro_batch)


def assert_close(one: list[LoraBlock], other: list[LoraBlock], tolerance: float) -> None:
    assert [(x.layer, x.module) for x in one] == [(x.layer, x.module) for x in other]
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x.a, y.a, atol=tolerance)
        np.testing.assert_allclose(x.b, y.b, atol=tolerance)


def test_equals_a_plain_loop_over_whole_batches(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path)
    found, twin = run(directory), loaded(directory, checkpointing=False)
    optimizer = torch.optim.AdamW(twin.trainable, lr=SPEC.learning_rate, weight_decay=0.0)
    losses = []
    for batch in BATCHES[: SPEC.steps]:
        hidden = twin.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits = hidden @ twin.head.T
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # AdamW divides by |gradient|: where that is near zero, rounding shows; hence not tighter.
    assert_close(found.blocks, twin.blocks(), 2e-4)
    assert found.loss_first == pytest.approx(losses[0], abs=1e-5)
    assert found.loss_last == pytest.approx(losses[-1], abs=1e-4)


def test_micro_batch_and_checkpointing_change_nothing_but_rounding(tmp_path: Path) -> None:
    directory = tiny.make("gemma2", tmp_path, layer_norm_eps=1e-6)
    spec = replace(SPEC, steps=1)
    base = run(directory, 4, spec, False)
    for micro_batch, checkpointing in ((1, True), (3, False), (100, True)):
        assert_close(run(directory, micro_batch, spec, checkpointing).blocks, base.blocks, 2e-4)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    directory = tiny.make("qwen2", tmp_path)
    spec = replace(SPEC, dropout=0.1)
    first, second = run(directory, spec=spec), run(directory, spec=spec)
    assert all(
        x.a.tobytes() == y.a.tobytes() and x.b.tobytes() == y.b.tobytes()
        for x, y in zip(first.blocks, second.blocks, strict=True)
    )
    other = run(directory, spec=replace(spec, seed=6))
    assert first.blocks[0].a.tobytes() != other.blocks[0].a.tobytes()


def test_loss_falls_and_blocks_carry_global_ids(tmp_path: Path) -> None:
    spec = replace(SPEC, steps=12)
    directory = tiny.make("mistral", tmp_path)
    found = train(loaded(directory, spec), [BATCHES[0]] * 12, spec, 2)
    assert found.loss_last < found.loss_first
    assert [(b.layer, b.module) for b in found.blocks] == [(layer, m) for layer in KEPT for m in sorted(SPEC.targets)]
    assert {(b.a.shape[0], b.b.shape[1]) for b in found.blocks} == {(SPEC.rank, SPEC.rank)}
    assert found.tokens_per_second > 0


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_nf4_trains_and_is_deterministic(compute: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))
    found = []
    for _ in range(2):
        loader = UnitLoader(checkpoint, "cpu", compute, Quantization.NF4, tmp_path / "store", "f" * 64)
        spec = replace(SPEC, steps=6)
        found.append(train(load_submodel(loader, UNITS, spec), [BATCHES[0]] * 6, spec, 2))
    assert found[0].loss_last < found[0].loss_first
    assert all(x.b.tobytes() == y.b.tobytes() for x, y in zip(found[0].blocks, found[1].blocks, strict=True))
    assert found[0].blocks[0].a.dtype == np.float32


def test_frozen_factor_stays(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path)
    spec = replace(SPEC, train=Factors.B)
    before = loaded(directory, spec).blocks()
    after = run(directory, spec=spec).blocks
    assert all(np.array_equal(x.a, y.a) for x, y in zip(before, after, strict=True))
    assert any(y.b.any() for y in after)


def test_micro_batches_cover_the_batch_and_drop_padding() -> None:
    parts = list(micro_batches(tiny.batch(5, 24), 2))
    assert [part["input_ids"].shape for part in parts] == [(2, 24), (2, 24), (1, 20)]


def test_progress_and_running_out_of_batches(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    directory = tiny.make("llama", tmp_path)
    train(loaded(directory), BATCHES, SPEC, 4, lambda *event: seen.append(event))
    rows = SPEC.batch_size
    assert seen == [("train", rows, 2 * rows), ("train", 2 * rows, 2 * rows)]
    with pytest.raises(DataError, match="only 1 batches, the round asks for 2"):
        train(loaded(directory), BATCHES[:1], SPEC, 4)
    empty = {**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], -100)}
    with pytest.raises(DataError, match="step 1: the batch has no response token"):
        train(loaded(directory), [empty, empty], SPEC, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_a_result(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny.make("llama", tmp_path)
    submodel, step = loaded(directory), torch.optim.AdamW.step

    def broken(self: torch.optim.AdamW) -> None:
        step(self)
        with torch.no_grad():
            submodel.trainable[0][0, 0] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    once = replace(SPEC, steps=1)  # with more, the next step's loss would tell first
    with pytest.raises(DataError, match=r"layer \d+, .*: its adapter holds NaN or infinite values after 1 steps"):
        train(submodel, BATCHES, once, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": Gradient.AUTO}, "gradient mode 'auto' must be resolved by the server"),
        ({"estimator": Estimator.FORWARD}, "estimator 'forward' is not supported"),
        ({"upload": Factors.A}, "upload of factor 'A' alone"),
        ({"rank": 0}, "positive rank"),
        ({"targets": ()}, "target module"),
    ],
)
def test_what_this_client_does_not_do_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        check_spec(replace(SPEC, **change))  # type: ignore[arg-type]
