"""Stacking (Eq. 5), the two starts, recompression and the ledger's files, against plain float64 sums."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.blocks import read_block, write_blocks
from common.errors import StorageError
from common.tensorfile import TensorFile, TensorWriter, write_tensors
from common.types import LoraBlock, ModelManifest, ModuleShape, Start
from fp_server import ledger as ledger_module
from fp_server.aggregation import ENTRY, Holder, next_rank, too_large, update_fresh, update_global
from fp_server.ledger import Contribution, LostUpdates, aggregate_layer, broadcast_layer, open_ledger, read_delta
from fp_server.lowrank import Delta, Dense, Factored, empty, lossless, recompress, split_top
from fp_server.validation import REPRESENTABLE

SHAPES = [(24, 40), (40, 24), (32, 32)]


def block(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> LoraBlock:
    d_out, d_in = shape
    a = rng.standard_normal((rank, d_in), dtype=np.float32)
    return LoraBlock(0, "m", a, rng.standard_normal((d_out, rank), dtype=np.float32))


def holders_of(rng: np.random.Generator, shape: tuple[int, int], ranks: Sequence[int]) -> tuple[list[Holder], list[LoraBlock]]:
    """Random holders with random weights and scales, and their blocks in the same order."""
    samples = rng.integers(1, 1000, len(ranks))
    blocks = [block(rng, shape, rank) for rank in ranks]
    holders = [
        Holder(f"d{i:03}", float(samples[i] / samples.sum()), float(rng.uniform(0.1, 4)), rank, lambda i=i: blocks[i])
        for i, rank in enumerate(ranks)
    ]
    return holders, blocks


def full(delta: Delta) -> np.ndarray:
    if isinstance(delta, Dense):
        return delta.w.astype(np.float64)
    return delta.b.astype(np.float64) @ delta.a.astype(np.float64)


def twin_sum(holders: Sequence[Holder], blocks: Sequence[LoraBlock]) -> np.ndarray:
    """Slow twin: Σ w_n (α_n/r_n) B_n A_n, one dense float64 product at a time."""
    total = np.zeros((len(blocks[0].b), blocks[0].a.shape[1]))
    for holder, one in zip(holders, blocks, strict=True):
        total += holder.weight * holder.scale * (one.b.astype(np.float64) @ one.a.astype(np.float64))
    return total


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def factored(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> Factored:
    one = block(rng, shape, rank)
    return Factored(one.a, one.b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_fresh_equals_the_sum_below_and_above_the_dense_threshold(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for ranks, stacks in (([3, 8, 1, 5], True), ([16, 4, 8, 8, 12], False)):
        holders, blocks = holders_of(rng, shape, ranks)
        for start in (empty(*shape), factored(rng, shape, 4), Dense(rng.standard_normal(shape, dtype=np.float32))):
            got = update_fresh(start, holders)
            assert isinstance(got, Factored) == (stacks and isinstance(start, Factored))
            assert error(full(got), full(start) + twin_sum(holders, blocks)) < 1e-6
            for array in (got.w,) if isinstance(got, Dense) else (got.a, got.b):
                assert array.dtype == np.float32 and array.flags.c_contiguous


def test_a_stack_of_a_large_module_stays_within_rounding() -> None:
    """Strips of rows and many holders: 130 rows are two strips and a bit."""
    rng = np.random.default_rng(0)
    holders, blocks = holders_of(rng, (130, 150), rng.integers(1, 33, 40).tolist())
    assert error(full(update_fresh(empty(130, 150), holders)), twin_sum(holders, blocks)) < 1e-6


def test_the_threshold_is_the_smaller_dimension() -> None:
    assert next_rank(0, (24, 40), [11, 12]) == 23
    assert next_rank(0, (24, 40), [12, 12]) is None
    assert next_rank(20, (24, 40), [2], taken_back=2) is None
    assert next_rank(None, (24, 40), [1]) is None


@pytest.mark.parametrize("ranks", [[2, 3, 4], [9, 10, 8]])
def test_order_of_holders_does_not_matter_to_the_bit(ranks: list[int]) -> None:
    rng = np.random.default_rng(1)
    holders, _ = holders_of(rng, (24, 40), ranks)
    one, other = update_fresh(empty(24, 40), holders), update_fresh(empty(24, 40), holders[::-1])
    assert full(one).tobytes() == full(other).tobytes()


def test_without_holders_the_ledger_is_the_very_same() -> None:
    delta = factored(np.random.default_rng(0), (24, 40), 3)
    assert update_fresh(delta, []) is delta
    assert update_global(delta, delta, []) is delta


@pytest.mark.parametrize("ledger_rank", [12, None])
@pytest.mark.parametrize("ranks", [[2, 4], [4, 8, 30]])
def test_global_counts_the_residual_once(ledger_rank: int | None, ranks: list[int]) -> None:
    """Twin: ΔW + Σ w_n (s_n B_n A_n − top_n) with top_n sliced out for each device on its own."""
    rng, shape = np.random.default_rng(4), (48, 64)
    delta: Delta = factored(rng, shape, ledger_rank) if ledger_rank else Dense(rng.standard_normal(shape, dtype=np.float32))
    given, _ = recompress(delta, 8)
    holders, blocks = holders_of(rng, shape, ranks)
    want = full(delta) + twin_sum(holders, blocks)
    for holder in holders:
        want -= holder.weight * full(given.first(holder.rank))
    assert error(full(update_global(delta, given, holders)), want) < 1e-6


def test_devices_that_change_nothing_give_the_ledger_back() -> None:
    """Each returns the top part it was given, scale folded out: what was subtracted is what was given."""
    rng, shape = np.random.default_rng(4), (48, 64)
    delta = factored(rng, shape, 12)
    given, _ = recompress(delta, 8)
    scale = 2.0
    parts = [LoraBlock(0, "m", given.a[:r], given.b[:, :r] / np.float32(scale)) for r in (4, 8)]
    holders = [Holder(f"d{i}", 0.5, scale, len(p.a), lambda p=p: p) for i, p in enumerate(parts)]
    assert error(full(update_global(delta, given, holders)), full(delta)) < 1e-6


def test_global_from_nothing_is_fresh() -> None:
    rng = np.random.default_rng(0)
    holders, _ = holders_of(rng, (24, 40), [3, 4])
    start = empty(24, 40)
    assert full(update_global(start, start, holders)).tobytes() == full(update_fresh(start, holders)).tobytes()


def test_holders_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(0)
    holders, _ = holders_of(rng, (24, 40), [3, 4])
    with pytest.raises(ValueError, match="do not sum to 1"):
        update_fresh(empty(24, 40), holders[:1])
    with pytest.raises(ValueError, match="stands twice"):
        update_fresh(empty(24, 40), [dataclasses.replace(h, device="d") for h in holders])
    with pytest.raises(ValueError, match="device 'd001'"):
        update_fresh(empty(24, 40), [holders[0], dataclasses.replace(holders[1], rank=5)])
    with pytest.raises(ValueError, match="broadcast factors have shape"):
        update_global(empty(24, 40), empty(40, 24), holders)


def kinds(shape: tuple[int, int], rank: int, decay: float = 0.8) -> list[Delta]:
    """The same ΔW of known, decaying spectrum, factored (with redundant columns) and dense."""
    rng = np.random.default_rng(8)
    u = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
    s = 3.0 * decay ** np.arange(rank)
    mix = np.linalg.qr(rng.standard_normal((rank + 3, rank)))[0]  # (rank+3, rank) with orthonormal columns
    factors = Factored((mix @ v.T).astype(np.float32), ((u * s) @ mix.T).astype(np.float32))
    return [factors, Dense(full(factors).astype(np.float32))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [0, 1])
def test_recompression_is_the_best_one_and_reports_its_true_error(shape: tuple[int, int], kind: int) -> None:
    delta = kinds(shape, 14)[kind]
    want = full(delta)
    u, s, vt = np.linalg.svd(want)
    for rank in (1, 4, 9, 13):
        got, dropped = recompress(delta, rank)
        assert got.rank == rank and got.shape == shape
        assert error(full(got), (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-6
        assert dropped == pytest.approx(np.linalg.norm(want - full(got)) ** 2 / np.linalg.norm(want) ** 2, rel=1e-4)
        np.testing.assert_allclose(got.a @ got.a.T, np.eye(rank), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(got.b, axis=0), s[:rank], rtol=1e-5)
        assert (got.a[np.arange(rank), np.abs(got.a).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("kind", [0, 1])
def test_recompression_to_more_than_there_is_keeps_all_and_adds_no_noise(kind: int) -> None:
    delta = kinds((24, 40), 6)[kind]
    got, dropped = recompress(delta, 20)
    assert 6 <= got.rank <= (6 if kind == 0 else 20)
    assert error(full(got), full(delta)) < 1e-6 and dropped < 1e-12


def test_a_ledger_of_zeros_recompresses_to_nothing() -> None:
    zeros = Factored(np.zeros((2, 40), np.float32), np.zeros((24, 2), np.float32))
    for delta in (empty(24, 40), zeros, Dense(np.zeros((24, 40), np.float32))):
        got, dropped = recompress(delta, 4)
        assert (got.rank, got.shape, dropped) == (0, (24, 40), 0.0)
        assert lossless(delta).rank == 0
    with pytest.raises(ValueError, match="at least 1"):
        recompress(zeros, 0)


@pytest.mark.parametrize("kind", [0, 1])
def test_top_and_residual_are_the_broadcast_to_the_bit(kind: int) -> None:
    delta = kinds((24, 40), 14)[kind]
    top, residual = split_top(delta, 4, 10)
    whole, _ = recompress(delta, 10)
    assert (top.rank, residual.rank) == (4, 6)
    assert np.vstack([top.a, residual.a]).tobytes() == whole.a.tobytes()
    assert np.hstack([top.b, residual.b]).tobytes() == whole.b.tobytes()
    assert split_top(delta, 99, 10)[1].rank == 0


def test_lossless_drops_only_what_is_redundant() -> None:
    redundant, dense = kinds((24, 40), 6)
    for delta in (redundant, dense):
        assert lossless(delta).rank == 6
        assert error(full(lossless(delta)), full(delta)) < 3e-7
    needed = factored(np.random.default_rng(0), (24, 40), 6)
    assert lossless(needed) is needed


def test_memory_stays_under_four_times_the_dense_size() -> None:
    """100 holders of rank 16 on 576×1536, each made when it is read; the old ledger and the result included."""
    shape, size = (576, 1536), 576 * 1536 * 4

    def holder(index: int) -> Holder:
        return Holder(f"d{index:03}", 0.01, 2.0, 16, lambda: block(np.random.default_rng(index), shape, 16))

    holders = [holder(index) for index in range(100)]
    tracemalloc.start()
    try:
        for start in (lambda: empty(*shape), lambda: Dense(np.ones(shape, np.float32))):
            tracemalloc.reset_peak()
            base = tracemalloc.get_traced_memory()[0]
            delta = update_fresh(start(), holders)
            peak = tracemalloc.get_traced_memory()[1] - base
            print(f"peak {peak / size:.2f} x dense")
            assert isinstance(delta, Dense) and peak < 4 * size
            del delta
    finally:
        tracemalloc.stop()


# --- files ---------------------------------------------------------------------------------------------------------

MODULES = (ModuleShape("mlp.down_proj", 24, 40), ModuleShape("self_attn.q_proj", 24, 24), ModuleShape("self_attn.v_proj", 8, 24))
MANIFEST = ModelManifest("tiny", "llama", 4, 24, 100, MODULES, "f" * 64)
TARGETS = ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
LAYER = 2


def contribution(tmp_path: Path, device: str, weight: float, rank: int, seed: int, layer: int = LAYER) -> Contribution:
    rng = np.random.default_rng(seed)
    path = tmp_path / f"{device}-{seed}.safetensors"
    write_blocks(
        path,
        [
            LoraBlock(
                at, m.name, rng.standard_normal((rank, m.d_in), np.float32), rng.standard_normal((m.d_out, rank), np.float32)
            )
            for at in (0, layer)
            for m in MODULES
        ],
    )
    return Contribution(device, weight, 2.0, rank, path)


def all_by(parts: Sequence[Contribution]) -> dict[str, Sequence[Contribution]]:
    """The same updates for every module: whole layers."""
    return dict.fromkeys(TARGETS, parts)


def ledger_full(path: Path | None, module: ModuleShape) -> np.ndarray:
    if path is None:
        return np.zeros((module.d_out, module.d_in))
    with open_ledger(path) as file:
        return full(read_delta(file, LAYER, module))


def contributed(parts: Sequence[Contribution], module: ModuleShape) -> np.ndarray:
    total = np.zeros((module.d_out, module.d_in))
    for part in parts:
        with TensorFile(part.path) as file:
            one = read_block(file, LAYER, module.name)
        total += part.weight * part.scale * (one.b.astype(np.float64) @ one.a.astype(np.float64))
    return total


@pytest.mark.parametrize("start", list(Start))
def test_rounds_on_disk_equal_the_sums(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rounds, factors first and dense later; fewer files open than holders."""
    monkeypatch.setattr(ledger_module, "OPEN_FILES", 1)
    previous: Path | None = None
    given: Path | None = None
    want = {m.name: np.zeros((m.d_out, m.d_in)) for m in MODULES}
    seen: set[str] = set()
    for index in range(5):
        parts = [contribution(tmp_path, "b", 0.25, 2, 2 * index), contribution(tmp_path, "a", 0.75, 3, 2 * index + 1)]
        out = tmp_path / f"ledger-{index}"
        assert aggregate_layer(LAYER, MANIFEST, all_by(parts), previous, out, start, given)
        for module in MODULES:
            want[module.name] += contributed(parts, module)
            if start is Start.GLOBAL and given is not None:
                with TensorFile(given) as file:
                    top = read_block(file, LAYER, module.name)
                for part in parts:
                    want[module.name] -= part.weight * (top.b[:, : part.rank].astype(float) @ top.a[: part.rank].astype(float))
            assert error(ledger_full(out, module), want[module.name]) < 1e-6
        previous, given = out, tmp_path / f"broadcast-{index}"
        dropped = broadcast_layer(out, LAYER, MANIFEST, 4, given)
        for module in MODULES:
            with TensorFile(given) as file:
                sent = read_block(file, LAYER, module.name)
            assert len(sent.a) == 4
            truth = ledger_full(out, module)
            lost = np.linalg.norm(truth - sent.b.astype(float) @ sent.a.astype(float)) ** 2 / np.linalg.norm(truth) ** 2
            assert dropped[module.name] == pytest.approx(lost, rel=1e-4, abs=1e-12)
        with TensorFile(out) as file:
            seen |= {name.rsplit(".", 1)[1] for name in file.tensors}
    assert seen == {"delta", "lora_A", "lora_B"}


def test_the_same_round_gives_the_same_bytes(tmp_path: Path) -> None:
    parts = [contribution(tmp_path, "b", 0.25, 2, 1), contribution(tmp_path, "a", 0.75, 7, 2)]
    for name, order in (("x", parts), ("y", parts[::-1])):
        aggregate_layer(LAYER, MANIFEST, all_by(order), None, tmp_path / name)
        broadcast_layer(tmp_path / name, LAYER, MANIFEST, 3, tmp_path / f"{name}-sent")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert (tmp_path / "x-sent").read_bytes() == (tmp_path / "y-sent").read_bytes()


def test_an_update_that_can_not_be_stacked_is_named_for_what_it_is_and_nothing_is_written(tmp_path: Path) -> None:
    """B·A is ordinary; w·(α/r)·B is not. An older version accepted such updates, and tried to aggregate them for ever."""
    good, bad = contribution(tmp_path, "a", 0.25, 2, 0), contribution(tmp_path, "b", 0.75, 2, 1)
    blocks = [LoraBlock(LAYER, m.name, np.full((2, m.d_in), 1e-38, "f4"), np.full((m.d_out, 2), 3e38, "f4")) for m in MODULES]
    write_blocks(bad.path, blocks)
    with pytest.raises(LostUpdates, match=r"mlp.down_proj.lora_B' holds 3e[+]38") as caught:
        aggregate_layer(LAYER, MANIFEST, all_by([good, bad]), None, tmp_path / "out")
    assert list(caught.value.lost) == ["b"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [2.0, 0.5, 1e6, 1e-6])
@pytest.mark.parametrize("ranks", [[2, 2], [16, 16]])
def test_the_largest_and_smallest_there_may_be_are_stacked_without_a_warning(scale: float, ranks: list[int]) -> None:
    """Every pair of extremes that the push lets through, factors and dense; then what the devices get of it."""
    shape, most = (24, 24), np.float32(ENTRY) * np.float32(0.999)
    b = np.full((24, 2), most / np.float32(max(1.0, scale)))
    small = np.float32(1e-45)
    for pair in ((b, np.full((2, 24), most)), (b, np.full((2, 24), small)), (np.full((24, 2), small), np.full((2, 24), most))):
        blocks = [LoraBlock(0, "m", np.resize(pair[1], (rank, 24)), np.resize(pair[0], (24, rank))) for rank in ranks]
        assert not any(too_large("A", one.a, scale) or too_large("B", one.b, scale) for one in blocks)
        holders = [Holder(f"d{n}", 0.5, scale, rank, lambda n=n, blocks=blocks: blocks[n]) for n, rank in enumerate(ranks)]
        got = update_fresh(empty(*shape), holders)
        assert isinstance(got, Dense) == (sum(ranks) > 24)
        factors, _ = recompress(got, 4)
        for array in (factors.a, factors.b, *((got.w,) if isinstance(got, Dense) else (got.a, got.b))):
            assert np.isfinite(array).all()
        assert np.abs(full(got) - twin_sum(holders, blocks)).max() <= 1e-6 * np.abs(twin_sum(holders, blocks)).max() + 1e-29


@pytest.mark.parametrize("start", list(Start))
def test_a_ledger_that_grows_by_the_most_there_may_be_stays_finite(start: Start) -> None:
    """As many rounds as a run may have, each of them by `REPRESENTABLE`: what 10⁶ rounds made, then some more."""
    rng = np.random.default_rng(0)
    u, v = (one / np.linalg.norm(one) for one in rng.standard_normal((2, 24)))
    delta: Delta = Dense((1e6 * REPRESENTABLE * np.outer(u, v)).astype(np.float32))
    for _ in range(3):
        given, _ = recompress(delta, 2)
        continued = given.rank if start is Start.GLOBAL else 0
        a = np.concatenate([given.a[:continued], v[None].astype(np.float32)])
        b = np.concatenate([given.b[:, :continued], (REPRESENTABLE * u)[:, None].astype(np.float32)], axis=1)
        holders = [Holder("d", 1.0, 1.0, continued + 1, lambda a=a, b=b: LoraBlock(0, "m", a, b))]
        delta = update_global(delta, given, holders) if start is Start.GLOBAL else update_fresh(delta, holders)
        assert np.isfinite(full(delta)).all()


def test_a_layer_nobody_trained_keeps_its_bytes(tmp_path: Path) -> None:
    first = tmp_path / "first"
    aggregate_layer(LAYER, MANIFEST, all_by([contribution(tmp_path, "a", 1.0, 2, 1)]), None, first)
    before, stamp = first.read_bytes(), first.stat().st_mtime_ns
    for start in Start:
        assert aggregate_layer(LAYER, MANIFEST, all_by([]), first, tmp_path / "second", start) is False
    assert not (tmp_path / "second").exists()
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (before, stamp)


def test_modules_outside_the_targets_are_copied_to_the_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    part = contribution(tmp_path, "a", 1.0, 2, 1)
    aggregate_layer(LAYER, MANIFEST, all_by([part]), None, first)
    aggregate_layer(LAYER, MANIFEST, {"self_attn.q_proj": [part]}, first, second)
    with TensorFile(first) as old, TensorFile(second) as new:
        assert set(old.tensors) == set(new.tensors)
        for name in old.tensors:
            assert (old.bytes_of(name) == new.bytes_of(name)) == ("q_proj" not in name)


def test_global_without_the_broadcast_is_refused(tmp_path: Path) -> None:
    part = contribution(tmp_path, "a", 1.0, 2, 1)
    aggregate_layer(LAYER, MANIFEST, all_by([part]), None, tmp_path / "first", Start.GLOBAL)
    with pytest.raises(ValueError, match="counted twice"):
        aggregate_layer(LAYER, MANIFEST, all_by([part]), tmp_path / "first", tmp_path / "second", Start.GLOBAL)
    with pytest.raises(ValueError, match=r"no module 'mlp\.up'"):
        aggregate_layer(LAYER, MANIFEST, {"mlp.up": [part]}, None, tmp_path / "second")


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    part = contribution(tmp_path, "a", 1.0, 2, 1)
    for tensors in (
        {f"layers.{LAYER}.mlp.down_proj.delta": np.zeros((3, 3), np.float32)},
        {f"layers.{LAYER}.mlp.down_proj.lora_A": np.zeros((2, 40), np.float32)},
    ):
        write_tensors(path, tensors)
        with pytest.raises(StorageError, match=r"damaged ledger: layer 3 mlp\.down_proj"):
            aggregate_layer(LAYER, MANIFEST, all_by([part]), path, tmp_path / "next")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StorageError, match="truncated"):
        broadcast_layer(path, LAYER, MANIFEST, 4, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_aggregation_of_files_holds_one_module_at_a_time(tmp_path: Path) -> None:
    """Seven dense modules of 384×512: the peak stays under four of one, whatever the layer sums to."""
    modules = tuple(ModuleShape(f"mlp.m{i}", 384, 512) for i in range(7))
    manifest = ModelManifest("wide", "llama", 1, 512, 100, modules, "f" * 64)
    rng = np.random.default_rng(0)
    write_tensors(tmp_path / "old", {f"layers.0.{m.name}.delta": rng.standard_normal((384, 512), np.float32) for m in modules})
    blocks = [
        LoraBlock(0, m.name, rng.standard_normal((8, 512), np.float32), rng.standard_normal((384, 8), np.float32))
        for m in modules
    ]
    write_blocks(tmp_path / "update", blocks)
    parts = [Contribution(f"d{i}", 0.25, 1.0, 8, tmp_path / "update") for i in range(4)]
    tracemalloc.start()
    try:
        aggregate_layer(0, manifest, {m.name: parts for m in modules}, tmp_path / "old", tmp_path / "new")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 384 * 512 * 4


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="'b' was announced but not written"), TensorWriter(path, {"a": (1,), "b": (2,)}) as out:
        out.write("a", np.zeros(1, np.float32))
    assert not path.exists()
    for name, shape in (("c", (1,)), ("a", (2,))):
        with pytest.raises(ValueError, match="not announced"), TensorWriter(path, {"a": (1,)}) as out:
            out.write(name, np.zeros(shape, np.float32))
        assert not path.exists()


def test_the_writer_writes_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(4, np.float32), "e": np.zeros((0, 3), np.float32)}
    write_tensors(tmp_path / "x", tensors, {"k": "v"})
    with TensorWriter(tmp_path / "y", {n: t.shape for n, t in tensors.items()}, {"k": "v"}) as out:
        for name in ("e", "b", "a"):
            out.write(name, tensors[name])
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    with TensorFile(tmp_path / "y") as file:
        assert np.array_equal(file.float32("b"), tensors["b"]) and file.float32("e").shape == (0, 3)
