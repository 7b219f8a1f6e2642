"""Component mode (FedPruner+) on the server: limits, choice, stacking by unit against a plain sum, what is kept and told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_rounds import kinds

from common.blocks import read_block, write_blocks
from common.config import parse
from common.errors import ConfigError
from common.tensorfile import TensorFile
from common.types import (
    Capacity,
    Gradient,
    LoraBlock,
    ModelManifest,
    ModuleShape,
    Part,
    PlanReport,
    TaskKey,
    UnitId,
    UpdateMetrics,
    component_units,
    layer_units,
    unit_modules,
)
from fp_server import commands as c
from fp_server import events as e
from fp_server.capacity import byte_limit, plan_problem
from fp_server.config import RunConfig
from fp_server.export import export_peft
from fp_server.ledger import read_delta
from fp_server.lowrank import Dense
from fp_server.objects import ObjectStore
from fp_server.reviewing import review_round
from fp_server.rounds import RunMachine
from fp_server.status import status
from fp_server.validation import expected_shapes
from fp_server.views import spans
from fp_server.work import aggregate_round, choose_units

MODULES = (ModuleShape("mlp.down_proj", 16, 24), ModuleShape("mlp.up_proj", 24, 16), ModuleShape("self_attn.q_proj", 16, 16))
MANIFEST = ModelManifest("toy", "llama", 4, 16, 64, MODULES, "ab" * 32)
UNITS = component_units(4)
SIZES = (10, 30) * 4
"""Bytes of 1M, 1N, 2M, 2N …"""
RANK = 2
SAMPLES = {"a": 30, "b": 10, "c": 60}
TOML = """
[run]
name = "r"
rounds = 3
min_devices = 3
devices_per_round = 1.0
[model]
name = "toy"
manifest = "x"
[lora]
rank = 2
alpha = 6.0
start = "START"
[pruning]
units = "component"
[limits]
min_holders = HOLDERS
"""


def config(holders: int = 1, start: str = "fresh", extra: str = "") -> RunConfig:
    return parse(TOML.replace("HOLDERS", str(holders)).replace("START", start) + extra, RunConfig, "test")


def report(units: int, sizes: tuple[int, ...] = SIZES) -> PlanReport:
    return PlanReport("r", 9, "ab" * 32, (Capacity(Gradient.SUBMODEL, units, 1, True, 5),), sizes, 7)


def limit(units: int, sizes: tuple[int, ...] = SIZES) -> int:
    made = report(units, sizes)
    return byte_limit(made, made.capacities[0], UNITS)


def test_what_the_drawn_units_may_cost():
    assert limit(4) == 2 * 40 and limit(8) == 4 * 40 and limit(2) == 40
    assert limit(4, (10, 30, 10, 50, 12, 30, 10, 30)) == 2 * 60, "the largest layer's two components"
    layers = PlanReport("r", 9, "", (Capacity(Gradient.SUBMODEL, 2, 1, True, 5),), (5, 9, 7, 1), 7)
    assert byte_limit(layers, layers.capacities[0], layer_units(4)) == 16, "the two largest layers"


def test_a_plan_for_components_counts_components():
    assert plan_problem(report(4), MANIFEST, UNITS) == plan_problem(report(8), MANIFEST, UNITS) == ""
    assert plan_problem(report(4), MANIFEST, layer_units(4)) == "the plan has 8 units, the model 4 layers"
    assert plan_problem(report(2, (40,) * 4), MANIFEST, UNITS) == "the plan has 4 units, the model 8 components"
    assert "odd number of components" in plan_problem(report(3), MANIFEST, UNITS)
    assert "more units than the model" in plan_problem(report(10), MANIFEST, UNITS)


class Run:
    """A machine with three devices, and the store that its updates and ledgers are in."""

    def __init__(self, directory: Path, holders: int = 1, start: str = "fresh", units: int = 4) -> None:
        self.machine = RunMachine(config(holders, start), MANIFEST)
        for name in ("objects", "scratch"):
            (directory / name).mkdir(exist_ok=True)
        self.store, self.directory = ObjectStore(directory), directory
        self.out: list[c.Command] = []
        for name, count in SAMPLES.items():
            self.do(c.Connected(name))
            self.do(e.PlanReceived("r", name, report(units), count))

    def do(self, *happenings: e.Event | c.Stimulus) -> list[c.Command]:
        made: list[c.Command] = []
        for item in happenings:
            for command in self.machine.handle(item, 0.0):
                made += self.do(command.event) if isinstance(command, c.Record) else [command]
        self.out += made
        return made

    @property
    def key(self) -> TaskKey:
        assert self.machine.current is not None
        return self.machine.current.opened.key

    def probe(self, device: str, salt: int = 0) -> None:
        rng = np.random.default_rng([salt, self.key.round, *device.encode()])
        rows = rng.standard_normal((len(UNITS), 5))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        in_out = rng.uniform(0.2, 0.9, len(UNITS)).astype(np.float32)
        self.do(e.ProbeReceived("r", self.key, device, np.square(rows @ rows.T).astype(np.float32), in_out, 2.0, 9, 1, 1.0))

    def train(self, given: dict[str, tuple[UnitId, ...]]) -> dict[str, list[LoraBlock]]:
        """A whole round with these units for each device; the blocks they pushed."""
        blocks: dict[str, list[LoraBlock]] = {}
        key = self.key
        for device in SAMPLES:
            self.probe(device)
            units = given[device]
            self.do(e.Assigned("r", key, device, units, tuple((u,) for u in units), ((1.0,),) * len(units), 0, 0, 1, True))
            assignment = self.machine.assignment(device, key)
            rng = np.random.default_rng([7, key.round, *device.encode()])
            shapes = {name: shape for name, shape in expected_shapes(assignment, MANIFEST).items() if name.endswith("lora_A")}
            made = blocks[device] = []
            for name in shapes:
                _, layer, module = name.removesuffix(".lora_A").split(".", 2)
                shape = MANIFEST.module(module)
                a, b = rng.standard_normal((RANK, shape.d_in), np.float32), rng.standard_normal((shape.d_out, RANK), np.float32)
                made.append(LoraBlock(int(layer), module, a, b))
            path = self.directory / f"{device}-{key.round}"
            write_blocks(path, made)
            self.do(e.UpdateAccepted("r", key, device, self.store.adopt(path), UpdateMetrics()))
        return blocks

    def commit(self) -> e.RoundCommitted:
        self.do(review_round(self.machine, self.store, self.key))
        event = aggregate_round(self.machine, self.store, self.key, 0)
        self.do(event)
        return event

    def delta(self, layer: int, module: ModuleShape) -> np.ndarray:
        with TensorFile(self.store.path(self.machine.ledger[layer].digest)) as file:
            delta = read_delta(file, layer, module)
        return delta.w.astype(float) if isinstance(delta, Dense) else delta.b.astype(float) @ delta.a


def units(*labels: str) -> tuple[UnitId, ...]:
    return tuple(UnitId.parse(label) for label in labels)


def test_units_are_chosen_among_the_components_and_never_cost_more_than_the_whole_layers_held(tmp_path):
    redraws, shapes = [], set()
    for index in range(12):
        run = Run(tmp_path, units=4)
        run.machine.config = run.machine.config.model_copy(
            update={"run": run.machine.config.run.model_copy(update={"seed": index})}
        )
        run.probe("a", index)
        event = choose_units(run.machine, run.key, "a")
        assert list(event.units) == sorted(event.units) and set(event.units) <= set(UNITS)
        assert sorted(unit for group in event.groups for unit in group) == sorted(UNITS)
        assert len(event.groups) == len(event.units) == 4 - event.reductions
        assert sum(SIZES[UNITS.index(unit)] for unit in event.units) <= 80
        assert event == choose_units(run.machine, run.key, "a"), "the same state gives the same choice"
        redraws.append(event.redraws)
        shapes.add("".join(sorted(unit.label[-1] for unit in event.units)))
    assert max(redraws) > 0 and min(redraws) == 0
    assert len(shapes) > 1 and all(shape.count("N") <= 2 for shape in shapes), shapes


def test_an_assignment_expects_the_modules_of_its_components_alone():
    run = RunMachine(config(), MANIFEST)
    assert run.units == UNITS and run.spec.part is not Part.LAYER and run.spec.probe.part is run.spec.part
    assert [unit_modules(unit, tuple(m.name for m in MODULES)) for unit in UNITS[:2]] == [
        ("self_attn.q_proj",), ("mlp.down_proj", "mlp.up_proj"),
    ]  # fmt: skip


GIVEN = {"a": units("1M", "2M", "2N", "4N"), "b": units("1M", "2N", "3M", "4N"), "c": units("2M", "3M", "4M", "4N")}
HOLDERS = {"1M": "ab", "2M": "ac", "2N": "ab", "3M": "bc", "4M": "c", "4N": "abc"}


def twin(blocks: dict[str, list[LoraBlock]], layer: int, module: ModuleShape) -> np.ndarray:
    """Slow twin: Eq. 5 of one module over whoever pushed it, from the blocks alone. α/r = 3."""
    held = {d: b for d, made in blocks.items() for b in made if (b.layer, b.module) == (layer, module.name)}
    total = sum(SAMPLES[device] for device in held)
    out = np.zeros((module.d_out, module.d_in))
    for device, block in held.items():
        out += SAMPLES[device] / total * 3.0 * (block.b.astype(float) @ block.a)
    return out


def test_each_component_is_stacked_over_its_own_holders(tmp_path):
    run = Run(tmp_path)
    blocks = run.train(GIVEN)
    assert kinds(run.out)[-1] == "Review"
    event = run.commit()
    assert [commit.layer for commit in event.units] == [0, 1, 2, 3] and event.held_back == event.held_back_units == ()
    stacked = {part.unit.label: "".join(part.holders) for commit in event.units for part in commit.parts}
    assert stacked == HOLDERS
    assert [commit.holders for commit in event.units] == [("a", "b"), ("a", "b", "c"), ("b", "c"), ("a", "b", "c")]
    for layer in range(4):
        for module in MODULES:
            np.testing.assert_allclose(run.delta(layer, module), twin(blocks, layer, module), atol=1e-5)
    made = status(run.machine, "", [])["history"][0]
    assert {label: "".join(names) for label, names in made["holders"].items()} == HOLDERS
    assert made["devices"]["a"]["units"] == ["1M", "2M", "2N", "4N"]


def test_a_component_nobody_trained_keeps_its_values_and_an_untouched_layer_its_object(tmp_path):
    run = Run(tmp_path, start="global")
    first = run.train(GIVEN)
    run.commit()
    before = {(layer, m.name): run.delta(layer, m) for layer in range(4) for m in MODULES}
    old, sent = dict(run.machine.ledger), dict(run.machine.broadcast)
    tops = {}
    with TensorFile(run.store.path(sent[1].digest)) as file:
        tops = {m.name: read_block(file, 1, m.name) for m in MODULES}
    second = run.train(dict.fromkeys(SAMPLES, units("2M")))
    event = run.commit()
    assert [commit.layer for commit in event.units] == [1] and len(first) == 3
    assert {n: ref for n, ref in run.machine.ledger.items() if n != 1} == {n: ref for n, ref in old.items() if n != 1}
    for module in MODULES[:2]:
        assert run.delta(1, module).tobytes() == before[1, module.name].tobytes(), "no one trained 2N"
        with TensorFile(run.store.path(run.machine.broadcast[1].digest)) as file:
            again = read_block(file, 1, module.name)
        assert (again.a.tobytes(), again.b.tobytes()) == (tops[module.name].a.tobytes(), tops[module.name].b.tobytes())
    q = MODULES[2]
    top = tops[q.name].b[:, :RANK].astype(float) @ tops[q.name].a[:RANK]
    np.testing.assert_allclose(run.delta(1, q), before[1, q.name] - top + twin(second, 1, q), atol=1e-5)


def test_min_holders_is_a_units_and_not_a_layers(tmp_path):
    run = Run(tmp_path, holders=3)
    blocks = run.train(GIVEN)
    event = run.commit()
    assert [commit.layer for commit in event.units] == [3] and event.held_back == (0, 1, 2)
    assert {unit.label for unit in event.held_back_units} == {"1M", "2M", "2N", "3M", "4M"}
    assert [part.unit.label for part in event.units[0].parts] == ["4N"]
    np.testing.assert_allclose(run.delta(3, MODULES[0]), twin(blocks, 3, MODULES[0]), atol=1e-5)
    assert not run.delta(3, MODULES[2]).any(), "4M had one holder"
    made = status(run.machine, "", [])["history"][0]
    assert made["held_back_layers"] == [1, 2, 3] and set(made["held_back_units"]) == {"1M", "2M", "2N", "3M", "4M"}


def test_the_export_names_the_trained_components_modules_alone(tmp_path):
    run = Run(tmp_path)
    blocks = run.train(dict.fromkeys(SAMPLES, units("1M", "3N")))
    run.commit()
    ledgers = {layer: run.store.path(ref.digest) for layer, ref in run.machine.ledger.items()}
    export_peft(ledgers, MANIFEST, tmp_path / "adapter", "toy")
    with TensorFile(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        modules = {name.removeprefix("base_model.model.model.layers.").rsplit(".lora_", 1)[0] for name in file.tensors}
        assert modules == {"0.self_attn.q_proj", "2.mlp.down_proj", "2.mlp.up_proj"}
        name = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"
        got = file.float32(name.format("B")).astype(float) @ file.float32(name.format("A"))
    np.testing.assert_allclose(got, twin(blocks, 2, MODULES[1]), atol=1e-5)


def test_a_component_without_a_target_is_refused_before_the_run_starts():
    config().check(MANIFEST)
    attention_only = parse(TOML.replace("HOLDERS", "1").replace('start = "START"', 'targets = ["q_proj"]'), RunConfig, "x")
    with pytest.raises(ConfigError, match=r"ffn parts alone.*there are: mlp\.down_proj, mlp\.up_proj"):
        attention_only.check(MANIFEST)
    layers = parse(TOML.replace("HOLDERS", "1").replace('start = "START"', 'targets = ["q_proj"]').replace("component", "layer"),
                   RunConfig, "x")  # fmt: skip
    layers.check(MANIFEST)


def test_names_of_components_are_short_for_a_person():
    assert spans(["1M", "1N", "2N", "3M", "3N", "4M"]) == "1 2N 3 4M"
    assert spans(["1M", "1N", "2M", "2N", "11M"]) == "1-2 11M"
    assert spans(["1", "2", "3", "11", "12"]) == "1-3 11-12" and spans([]) == ""
