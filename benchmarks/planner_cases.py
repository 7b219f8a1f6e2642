"""The settings in which `benchmarks/planner.py` compares prediction and kernel."""

from __future__ import annotations

from dataclasses import dataclass

from common.types import Gradient, Part, ProbeSpec, Quantization, Start, TrainSpec, UnitId
from fp_client.memory import MIB, Setting
from fp_client.planner import Limits, ModePlan, Plan, TaskPlan, plan, plan_task
from fp_client.shapes import CONFIGS, shape_of

ALL = (
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Case:
    """One setting. `budget` in MiB, 0 for no bound; `units` at most, 0 for what fits; `low`: the lowest layer assigned.

    `ragged`: rows of ever other lengths, as real data has them, the window at most.
    """

    shape: str
    budget: int
    batch: int
    window: int
    quantization: Quantization = Quantization.NONE
    dtype: str = "float32"
    rank: int = 16
    targets: tuple[str, ...] = ALL
    broadcast_rank: int = 0
    start: Start = Start.FRESH
    threads: int = 1
    heldout: int = 8
    probe: bool = True
    gradient: Gradient = Gradient.SUBMODEL
    part: Part = Part.LAYER
    units: int = 0
    low: int = 0
    steps: int = 2
    ragged: bool = False

    @property
    def name(self) -> str:
        """For people."""
        extra = "".join(
            f" {text}"
            for text, shown in (
                (self.gradient.value, self.gradient is not Gradient.SUBMODEL),
                ("components", self.part is not Part.LAYER), (f"{self.units} units", self.units),
                (f"from {self.low + 1}", self.low),
                (f"r{self.rank}", self.rank != 16), ("attention", self.targets == ATTENTION), ("bf16", self.dtype != "float32"),
                (f"ledger {self.broadcast_rank} {self.start}", self.broadcast_rank),
                (f"{self.threads} threads", self.threads > 1), (f"{self.steps} steps", self.steps != 2),
                ("ragged", self.ragged),
            )
            if shown
        )  # fmt: skip
        return f"{self.shape} {self.quantization} {self.budget} MiB {self.batch}×{self.window}{extra}"

    @property
    def train_spec(self) -> TrainSpec:
        """Two steps at least: the optimizer's state is there in the second."""
        return TrainSpec(
            self.steps, self.batch, self.window, 1e-4, self.rank, 2.0 * self.rank, self.targets, 0,
            gradient=self.gradient, start=self.start,
        )  # fmt: skip

    @property
    def probe_spec(self) -> ProbeSpec:
        """One batch of the same size."""
        return ProbeSpec(batch_size=self.batch, sequence_length=self.window)

    @property
    def setting(self) -> Setting:
        """Random weights are stored as bf16."""
        return Setting(self.quantization, 2 if self.dtype == "bfloat16" else 4, 2, self.threads)

    def plan(self) -> Plan:
        """From the config alone."""
        return plan(
            CONFIGS[self.shape], self.setting, self.train_spec, self.probe_spec, self.broadcast_rank, self.budget * MIB,
            self.heldout, self.part, Limits(),
        )  # fmt: skip

    def assigned(self, mode: ModePlan) -> tuple[UnitId, ...]:
        """As many units as planned, spread over the layers from `low` up; components alternate."""
        layers = shape_of(CONFIGS[self.shape]).layers - self.low
        if self.part is Part.LAYER:
            count = min(self.units or mode.units, mode.units, layers)
            return tuple(UnitId(self.low + i * layers // count) for i in range(count))
        count = min(self.units or mode.units, mode.units, 2 * layers)
        places = [i * 2 * layers // count + i % 2 * (count < layers) for i in range(count)]
        return tuple(UnitId(self.low + at // 2, (Part.ATTENTION, Part.FFN)[at % 2]) for at in places)

    def task(self, mode: ModePlan) -> TaskPlan:
        """How those units are trained."""
        return plan_task(
            shape_of(CONFIGS[self.shape]), self.setting, self.train_spec, self.broadcast_rank, self.assigned(mode),
            mode.micro_batch, mode.checkpointing, self.budget * MIB,
        )  # fmt: skip


NF4 = Quantization.NF4
STREAMED, STITCHED = Gradient.STREAMED, Gradient.STITCHED
CASES = (
    Case("smollm2-135m", 300, 4, 128),
    Case("smollm2-135m", 500, 4, 128),
    Case("smollm2-135m", 260, 1, 512),
    Case("smollm2-135m", 700, 8, 256),
    Case("smollm2-135m", 300, 4, 128, broadcast_rank=48),
    Case("smollm2-135m", 400, 4, 128, broadcast_rank=32, start=Start.GLOBAL),
    Case("smollm2-135m", 300, 2, 256, rank=64, targets=ATTENTION),
    Case("smollm2-135m", 500, 4, 256, threads=2),
    Case("smollm2-135m", 250, 4, 128, NF4),
    Case("smollm2-135m", 400, 2, 512, NF4),
    Case("smollm2-135m", 300, 4, 128, dtype="bfloat16"),
    Case("smollm2-135m", 400, 4, 128, part=Part.ATTENTION),
    Case("tinyllama-1.1b", 900, 1, 512, heldout=2),
    Case("tinyllama-1.1b", 1600, 4, 128, heldout=2),
    Case("tinyllama-1.1b", 600, 1, 512, NF4, heldout=2),
    Case("tinyllama-1.1b", 800, 4, 256, NF4, heldout=2),
    Case("tinyllama-1.1b", 800, 1, 1024, NF4, heldout=2),
    Case("tinyllama-1.1b", 500, 1, 512, NF4, "bfloat16", heldout=2),
    Case("tinyllama-1.1b", 900, 2, 256, dtype="bfloat16", heldout=2),
    # The streamed modes; their probes are those above.
    Case("smollm2-135m", 110, 4, 128, probe=False, gradient=STREAMED),
    Case("smollm2-135m", 150, 4, 128, probe=False, gradient=STREAMED),
    Case("smollm2-135m", 300, 4, 128, probe=False, gradient=STREAMED),
    Case("smollm2-135m", 0, 4, 128, probe=False, gradient=STREAMED),
    Case("smollm2-135m", 300, 4, 256, probe=False, gradient=STREAMED, units=8, low=7, steps=12),
    Case("smollm2-135m", 250, 4, 128, probe=False, gradient=STREAMED, units=8, low=3, broadcast_rank=48),
    Case("smollm2-135m", 400, 4, 128, probe=False, gradient=STREAMED, broadcast_rank=32, start=Start.GLOBAL),
    Case("smollm2-135m", 200, 4, 128, dtype="bfloat16", probe=False, gradient=STREAMED),
    Case("smollm2-135m", 160, 4, 128, NF4, probe=False, gradient=STREAMED),
    Case("smollm2-135m", 300, 4, 128, probe=False, gradient=STREAMED, part=Part.ATTENTION, units=16),
    Case("smollm2-135m", 220, 4, 128, probe=False, gradient=STITCHED),
    Case("smollm2-135m", 400, 4, 128, probe=False, gradient=STITCHED),
    Case("smollm2-135m", 0, 4, 256, probe=False, gradient=STITCHED, units=8, steps=12),
    Case("smollm2-135m", 400, 4, 256, probe=False, gradient=STITCHED, units=8, steps=12),
    Case("smollm2-135m", 300, 4, 128, probe=False, gradient=STITCHED, broadcast_rank=48),
    Case("smollm2-135m", 250, 4, 128, dtype="bfloat16", probe=False, gradient=STITCHED),
    Case("smollm2-135m", 250, 4, 128, NF4, probe=False, gradient=STITCHED),
    Case("smollm2-135m", 350, 4, 128, probe=False, gradient=STITCHED, part=Part.ATTENTION),
    Case("tinyllama-1.1b", 220, 1, 512, NF4, "bfloat16", probe=False, gradient=STREAMED),
    Case("tinyllama-1.1b", 400, 4, 256, NF4, "bfloat16", probe=False, gradient=STREAMED, units=8),
    Case("tinyllama-1.1b", 500, 2, 512, NF4, probe=False, gradient=STREAMED, units=12),
    Case("tinyllama-1.1b", 700, 2, 256, dtype="bfloat16", probe=False, gradient=STREAMED),
    Case("tinyllama-1.1b", 400, 4, 256, NF4, "bfloat16", probe=False, gradient=STITCHED),
    Case("tinyllama-1.1b", 900, 2, 256, dtype="bfloat16", probe=False, gradient=STITCHED),
    # Rows of ever other lengths: every shape is new to the matrix kernels.
    Case("smollm2-135m", 300, 4, 192, heldout=64, dtype="bfloat16", steps=10, ragged=True),
    Case("smollm2-135m", 300, 4, 192, probe=False, steps=10, ragged=True),
    Case("smollm2-135m", 176, 4, 192, dtype="bfloat16", probe=False, gradient=STREAMED, steps=10, ragged=True),
    Case("smollm2-135m", 250, 4, 192, dtype="bfloat16", probe=False, gradient=STITCHED, units=8, steps=10, ragged=True),
    Case("smollm2-135m", 160, 4, 192, NF4, "bfloat16", probe=False, gradient=STREAMED, steps=10, ragged=True),
    Case("tinyllama-1.1b", 500, 1, 512, NF4, "bfloat16", heldout=24, steps=6, ragged=True),
    Case("tinyllama-1.1b", 400, 4, 256, NF4, "bfloat16", probe=False, gradient=STREAMED, units=8, steps=4, ragged=True),
)
SEVEN = (Case("llama2-7b", 2861, 1, 512, NF4, probe=False), Case("llama2-7b", 2861, 1, 512, NF4, "bfloat16", probe=False))
