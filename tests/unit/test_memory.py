"""The planner: its formulas against what torch saves and what checkpoints hold, and the choices it makes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoint
from common.errors import BudgetError, ModelError, ProtocolError, UnknownFamilyError
from common.types import Part, ProbeSpec, Quantization, Start, TrainSpec, UnitId
from fp_client.families import FAMILIES
from fp_client.loader import UnitLoader
from fp_client.memory import MIB, Held, Kept, Rows, Setting, activations, layer_bytes, probe_peak, train_peak
from fp_client.planner import micro_batches, plan, probe_rows
from fp_client.shapes import CONFIGS, shape_of
from fp_client.submodel import load_submodel
from tests.unit import tiny

ALL = (
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
NF4 = Setting(Quantization.NF4, stored=2)
PROBE = ProbeSpec(batch_size=4, sequence_length=128)
SMALL = CONFIGS["smollm2-135m"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # from transformers, when it saves tiny models


def spec(batch: int = 4, window: int = 128, rank: int = 16, targets: tuple[str, ...] = ALL, **changes: Any) -> TrainSpec:
    return TrainSpec(2, batch, window, 1e-4, rank, 2.0 * rank, targets, 0, **changes)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shape_from_the_config_is_the_checkpoints(family: str, tmp_path: Path) -> None:
    with_bias = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    checkpoint = Checkpoint(tiny.make(family, tmp_path, **with_bias))
    shape = shape_of(checkpoint.config)
    assert shape.modules == checkpoint.modules()
    assert shape.tied == checkpoint.tied
    stored = 0
    for name in checkpoint.names:
        size = 1
        for n in checkpoint.info(name).shape:
            size *= n
        stored += size
    assert shape.parameters == stored


def saved_by_torch(checkpoint: Checkpoint, dtype: torch.dtype, train: TrainSpec) -> int:
    """The slow twin of `activations(…).stacked`: the storages that autograd keeps for one layer, counted one by one."""
    submodel = load_submodel(UnitLoader(checkpoint, "cpu", dtype), [UnitId(0)], train, (), checkpointing=False)
    weights = {p.untyped_storage().data_ptr() for p in submodel.model.parameters() if p.device.type != "meta"}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    # The lowest layer's input needs no gradient of its own; every other layer's does.
    submodel.model.get_submodule("model.embed_tokens").register_forward_hook(lambda module, args, out: out.requires_grad_())
    submodel.kept[0].register_forward_pre_hook(lambda module, args: hooks.__enter__())
    submodel.kept[0].register_forward_hook(lambda module, args, out: hooks.__exit__(None, None, None))
    submodel.loss(tiny.batch(train.batch_size, train.sequence_length))
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_saved_activations_are_what_torch_saves(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 1}
    window = {"sliding_window": 4096} if family in ("mistral", "phi3", "qwen2") else {}
    checkpoint = Checkpoint(tiny.make(family, tmp_path, **wide, **window))
    shape = shape_of(checkpoint.config)
    names = tuple(module.name for module in shape.modules)
    for targets in (names, names[-1:]):
        train = spec(2, 64, 8, targets)
        found = saved_by_torch(checkpoint, dtype, train)
        predicted = activations(shape, Setting(itemsize=dtype.itemsize), train, 2 * 64, ledger=False).stacked
        assert 0.97 * found <= predicted <= 1.12 * found


@pytest.mark.parametrize("quantization", list(Quantization))
def test_layer_bytes_are_the_loaded_layers(quantization: Quantization, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make("llama", tmp_path))
    loader = UnitLoader(checkpoint, "cpu", torch.float32, quantization, tmp_path / "store", "0" * 64)
    submodel = load_submodel(loader, [UnitId(0)], spec(targets=("self_attn.q_proj",)))
    held = 0
    for name, parameter in submodel.kept[0].named_parameters():
        if "lora" not in name:
            held += parameter.untyped_storage().nbytes()
            state = getattr(parameter, "quant_state", None)
            held += state.absmax.untyped_storage().nbytes() if state is not None else 0
    assert layer_bytes(shape_of(checkpoint.config), Setting(quantization)) == held


def test_a_3_gb_device_holds_12_layers_of_llama2_7b() -> None:
    three = 3 * 10**9
    seven = plan(CONFIGS["llama2-7b"], NF4, spec(1, 512), ProbeSpec(batch_size=1), 0, three).modes[0]
    assert 12 <= seven.units < 32 and seven.checkpointing and seven.peak_bytes <= three
    thirteen = plan(CONFIGS["llama2-13b"], NF4, spec(1, 512), ProbeSpec(batch_size=1), 0, three).modes[0]
    assert 1 <= thirteen.units < seven.units
    assert round(shape_of(CONFIGS["llama2-7b"]).parameters / 1e6) == 6738
    assert round(shape_of(CONFIGS["llama2-13b"]).parameters / 1e6) == 13016


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("setting", [Setting(), Setting(itemsize=2), NF4], ids=["fp32", "bf16", "nf4"])
def test_more_budget_is_never_less_and_the_plan_keeps_it(name: str, setting: Setting) -> None:
    config = CONFIGS[name]
    smallest = plan(config, setting, spec(), PROBE, 32, 0).smallest_budget
    with pytest.raises(BudgetError) as caught:
        plan(config, setting, spec(), PROBE, 32, smallest - 1)
    assert caught.value.smallest == smallest
    before = 0
    for step in range(0, 40, 3):
        budget = smallest + step * smallest // 8
        planned = plan(config, setting, spec(), PROBE, 32, budget)
        found = planned.modes[0]
        assert found.units >= max(before, 1)
        assert found.peak_bytes == max(found.train.peak, planned.probe.peak) <= budget
        if found.units < shape_of(config).layers:
            kept = Kept(Held(found.units + 1), 1, True)
            assert train_peak(shape_of(config), setting, spec(), 32, kept).peak > budget
        before = found.units
    planned = plan(config, setting, spec(), PROBE, 32, 0)
    everything = planned.modes[0]
    assert (everything.units, everything.micro_batch, everything.checkpointing) == (shape_of(config).layers, 4, False)
    assert len(planned.unit_bytes) == shape_of(config).layers


def test_units_come_before_micro_batches_and_those_before_speed() -> None:
    found = [plan(SMALL, Setting(), spec(8, 256), PROBE, 0, budget * MIB).modes[0] for budget in range(260, 2500, 25)]
    for one in found:
        if one.units < 30:
            assert one.micro_batch < 8 or one.checkpointing
        if not one.checkpointing:
            assert (
                one.train.peak
                > train_peak(shape_of(SMALL), Setting(), spec(8, 256), 0, Kept(Held(one.units), one.micro_batch, True)).peak
            )
    assert min(one.units for one in found) < 5 and max(one.units for one in found) == 30
    assert micro_batches(4) == (4, 2, 1) and micro_batches(16) == (16, 8, 6, 4, 3, 2, 1) and micro_batches(1) == (1,)


@pytest.mark.parametrize(
    "heavier",
    [
        spec(8), spec(window=256), spec(rank=64), spec(start=Start.GLOBAL),
    ],
)  # fmt: skip
def test_what_costs_more_is_predicted_to(heavier: TrainSpec) -> None:
    shape = shape_of(SMALL)
    light = train_peak(shape, Setting(), spec(), 48, Kept(Held(8), 4, True)).peak
    assert train_peak(shape, Setting(), heavier, 48, Kept(Held(8), heavier.batch_size, True)).peak > light
    assert train_peak(shape, Setting(), spec(), 0, Kept(Held(8), 4, True)).peak < light
    assert train_peak(shape, Setting(), spec(), 48, Kept(Held(8), 4, False)).peak > light
    assert train_peak(shape, Setting(Quantization.NF4), spec(), 48, Kept(Held(8), 4, True)).peak < light


def test_the_breakdown_names_what_is_live() -> None:
    found = train_peak(shape_of(SMALL), Setting(), spec(), 16, Kept(Held(8), 4, True))
    rows = dict(found.rows)
    assert rows["weights"] == 8 * layer_bytes(shape_of(SMALL), Setting())
    assert rows["head"] == 49152 * 576 * 4
    assert rows["optimizer"] == 2 * rows["LoRA"] == 2 * rows["ledger"] == 2 * rows["gradients"]
    assert sum(rows.values()) == found.peak


def test_a_refusal_says_what_would_do() -> None:
    with pytest.raises(
        BudgetError, match=r"the budget of 100 MiB is too small: the smallest that would do is \d+ MiB \(loss: weights"
    ):
        plan(SMALL, Setting(), spec(), PROBE, 0, 100 * MIB)
    shape = shape_of(SMALL)
    with pytest.raises(BudgetError, match="can't hold the probe") as caught:
        probe_rows(shape, Setting(), PROBE, 16, 0, 20 * MIB)
    assert probe_rows(shape, Setting(), PROBE, 16, 0, caught.value.smallest).pass_rows == 4
    with pytest.raises(BudgetError):
        probe_rows(shape, Setting(), PROBE, 16, 0, caught.value.smallest - 1)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_probe_of_components_keeps_a_gram_matrix_more_a_layer(name: str) -> None:
    """At the kernel's moment all of them are live; there are no held-out rows to make another one the worst."""
    shape, n = shape_of(CONFIGS[name]), 512
    layer = ProbeSpec(positions=n, batch_size=4, sequence_length=128)
    plans = [probe_peak(shape, NF4, one, 0, 0, Rows(1, 4)) for one in (layer, replace(layer, part=Part.FFN))]
    assert plans[0].moment == plans[1].moment and plans[1].peak - plans[0].peak == shape.layers * n * n * 4


def test_the_probe_takes_fewer_rows_where_memory_is_short() -> None:
    shape = shape_of(CONFIGS["tinyllama-1.1b"])
    most = probe_rows(shape, NF4, PROBE, 64, 0, 0)
    assert most == Rows(4, 64)
    least = probe_peak(shape, NF4, PROBE, 64, 0, Rows(1, 4)).peak
    between = probe_rows(shape, NF4, PROBE, 64, 0, (least + probe_peak(shape, NF4, PROBE, 64, 0, most).peak) // 2)
    assert between != most
    assert probe_peak(shape, NF4, PROBE, 64, 0, between).peak < probe_peak(shape, NF4, PROBE, 64, 0, most).peak


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "bloom"}, UnknownFamilyError, "family 'bloom' is not supported"),
        ({"hidden_size": None}, ModelError, "hidden_size is None"),
        ({"num_hidden_layers": "30"}, ModelError, "num_hidden_layers is '30'"),
    ],
)
def test_a_config_that_cannot_be_planned_for(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan({**SMALL, **change}, Setting(), spec(), PROBE, 0, 0)


def test_a_target_the_model_does_not_have() -> None:
    with pytest.raises(ProtocolError, match=r"no linear module 'mlp\.gate_up_proj'"):
        plan(SMALL, Setting(), spec(targets=("mlp.gate_up_proj",)), PROBE, 0, 0)


def test_planning_needs_no_torch() -> None:
    code = "import sys, fp_client.planner, fp_client.pool, fp_client.models; print('torch' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
