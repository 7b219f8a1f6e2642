"""The planner: what a task will hold at its worst moment, from the model's config alone. Torch-free.

All figures are bytes above the worker's warmed footprint. One function a moment; a task's peak is
the largest of its moments. The formulas follow what the code holds, tensor by tensor; `OVERHEAD` is the one constant
that was measured instead: the buffers that the matrix library keeps, and the allocator's rounding.

Symbols: n = micro-batch × window tokens, d = hidden, m = intermediate, s = bytes of the compute dtype, K = kept layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.types import ProbeSpec, Quantization, Start, TrainSpec
from fp_client.shapes import Shape

MIB = 1 << 20
LOGITS = 3 * 16 * MIB
"""A chunk of fp32 logits and the two temporaries of its soft-max (`fp_client.loss`)."""
READ = 4 * MIB
"""Elements read, cast or quantized at a time (`fp_client.tensors.CHUNK`)."""
HEAD_ROWS = 4096
"""Vocabulary rows of the head in memory during a probe (`fp_client.loader.HEAD_ROWS`)."""
OVERHEAD = 24 * MIB
"""For one thread; each further one packs its own panels."""
OVERHEAD_THREAD = 4 * MIB
OVERHEAD_UNIT = MIB // 4
"""Modules, hooks and the autograd graph of one layer."""
PASS_ROWS = 64
"""Rows whose residual streams the probe keeps at once, where the budget allows."""
MICRO_ROWS = 4
"""Rows inside a layer at once in a probe, where the budget allows."""
EAGER = frozenset({"gemma2"})
"""Families whose attention scores are materialised (`fp_client.families`)."""
_FP32 = 4


@dataclass(frozen=True)
class Setting:
    """How a device computes. `itemsize` is s, `stored` the bytes of the checkpoint's dtype."""

    quantization: Quantization = Quantization.NONE
    itemsize: int = 4
    stored: int = 4
    threads: int = 1

    @property
    def overhead(self) -> int:
        """What is held besides tensors."""
        return OVERHEAD + OVERHEAD_THREAD * (self.threads - 1)


@dataclass(frozen=True)
class Kept:
    """What a submodel keeps, and how it is trained."""

    units: int
    micro_batch: int
    checkpointing: bool


@dataclass(frozen=True)
class StreamPlan:
    """What of the streamed model stays in memory (`fp_client.stream`). The gradient does not depend on it."""

    resident: int = 0
    """Layers whose weights stay, the topmost ones."""
    ahead: bool = False
    """Whether the next layer is read while one computes: one more layer in memory."""
    head: bool = True
    """Whether the head stays; else its rows are read in blocks, twice a step."""
    boundary_bytes: int = -1
    """Activations kept in memory between forward and backward; what is beyond goes to disk. −1: all of them stay."""


@dataclass(frozen=True)
class Rows:
    """How many rows a probe has inside a layer, and in a pass (`fp_client.probe.probe`)."""

    micro_rows: int
    pass_rows: int


@dataclass(frozen=True)
class Estimate:
    """A predicted peak. `rows` of the table name what is live at that moment and add up to `peak`."""

    moment: str
    rows: tuple[tuple[str, int], ...]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(size for _, size in self.rows)


def layer_bytes(shape: Shape, setting: Setting) -> int:
    """One decoder layer's weights. NF4: half a byte each, and an fp32 scale for 64 of them."""
    if setting.quantization is Quantization.NF4:
        return (
            shape.linear // 2 + sum(-(-m.d_out * m.d_in // 64) for m in shape.modules) * _FP32 + shape.vectors * setting.itemsize
        )
    return (shape.linear + shape.vectors) * setting.itemsize


def ledger_bytes(shape: Shape, spec: TrainSpec, broadcast_rank: int) -> int:
    """One layer's frozen ΔW factors. `global` starts from the top r of them and copies what is left."""
    rank = broadcast_rank if spec.start is Start.FRESH else max(0, broadcast_rank - spec.rank) + broadcast_rank
    return shape.factors(spec.targets, rank) * _FP32


def unit_bytes(shape: Shape, setting: Setting, spec: TrainSpec, broadcast_rank: int) -> int:
    """What one more unit costs a checkpointed submodel with a micro-batch of one: weights, ΔW, LoRA with its gradient
    and AdamW's two moments, and the boundary activation."""
    lora = 4 * shape.factors(spec.targets, spec.rank) * _FP32
    boundary = spec.sequence_length * shape.hidden * setting.itemsize
    return layer_bytes(shape, setting) + ledger_bytes(shape, spec, broadcast_rank) + lora + boundary


def largest_weight(shape: Shape, setting: Setting) -> int:
    """A 4-bit weight is unpacked whole while it is multiplied with."""
    return shape.largest * setting.itemsize if setting.quantization is Quantization.NF4 else 0


@dataclass(frozen=True)
class Activations:
    """One layer's activations for n tokens. `boundary`: its input; `saved`: for its backward, besides the boundary;
    `stacked`: what it leaves behind where nothing is recomputed; `forward` and `recompute`: the most that is live while it
    runs without and with saving; `backward`: the most that its backward holds, `saved` included."""

    boundary: int
    saved: int
    stacked: int
    forward: int
    recompute: int
    backward: int


def activations(shape: Shape, setting: Setting, spec: TrainSpec, tokens: int, ledger: bool) -> Activations:
    """Follows a llama layer with peft's LoRA; see the tensor names on the right. LoRA runs in fp32, so a narrower
    compute dtype casts each target's input (saved) and its output."""
    s, n, t = setting.itemsize, tokens, set(spec.targets)
    narrow = s < _FP32
    d, m = n * shape.hidden * s, n * shape.intermediate * s
    q, k = n * shape.heads * shape.head_dim * s, n * shape.kv_heads * shape.head_dim * s
    fused = any(module.name == "mlp.gate_up_proj" for module in shape.modules)

    def inputs(names: tuple[str, ...], size: int) -> int:
        """What a group of modules with the same input saves of it for their A gradients."""
        hit = sum(f"{name}" in t for name in names)
        return hit * size * _FP32 // s if narrow else (size if hit else 0)

    full = n * shape.hidden * _FP32
    norm = full if narrow else 0  # the fp32 copy of its input
    post_norms = 2 * full if shape.family.startswith("gemma") else 0
    qk_norm = (q + k) * _FP32 // s if shape.family in ("qwen3", "gemma3", "gemma3_text", "olmo2") else 0
    scores = n * spec.sequence_length * shape.heads * _FP32 if shape.family in EAGER else 0
    masked = 0 < shape.window < spec.sequence_length
    values = 2 * q if scores or masked else 2 * k  # with a mask, grouped keys and values are repeated for every head
    mask = 2 * n * spec.sequence_length * s if masked else 0
    attention = (
        inputs(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"), d)
        + norm + qk_norm + 2 * scores + q + values
        + (q + k + q if fused else 0)  # the value is a view that keeps the fused projection
        + (0 if scores else q) + (inputs(("self_attn.o_proj",), q) if narrow or scores or masked else 0)
    )  # fmt: skip
    mlp = inputs(("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"), d) + 2 * m  # gate and its activation
    before_up = attention + d + norm + post_norms + mlp
    rank_rows = n * spec.rank * _FP32 * len(t)
    saved = int(1.02 * (before_up + m + inputs(("mlp.down_proj",), m) + rank_rows))
    # The widest module: its output, LoRA's output, that times α/r, and the sum; a narrow dtype promotes its output too.
    wide = 2 * m if fused else m
    lora = 3 * wide * _FP32 // s + (2 * wide if narrow else 0)
    hooked = 2 * wide if ledger else 0
    weight = largest_weight(shape, setting)
    module = max(lora, hooked + wide, weight + wide)
    forward = mask + max(m + 2 * d + module, 4 * scores)  # act, residual, normed input
    recompute = mask + max(before_up + 2 * d + module, attention + 4 * scores)
    backward = mask + saved + max(2 * wide * _FP32 // s, weight + m, 3 * scores)
    return Activations(d, saved, saved + (0 if narrow else d), forward, recompute, backward)


def train_peak(shape: Shape, setting: Setting, spec: TrainSpec, broadcast_rank: int, kept: Kept) -> Estimate:
    """The worst moment of loading and training a submodel; `broadcast_rank` 0 where there is no ΔW yet.

    Gradients count as held from the start of a step: those of small factors come from the heap, whose pages stay.
    """
    n, s = kept.micro_batch * spec.sequence_length, setting.itemsize
    act = activations(shape, setting, spec, n, broadcast_rank > 0)
    lora = kept.units * shape.factors(spec.targets, spec.rank) * _FP32
    held = (
        ("weights", kept.units * layer_bytes(shape, setting)),
        ("head", shape.head * s),
        ("ledger", kept.units * ledger_bytes(shape, spec, broadcast_rank)),
        ("LoRA", lora),
        ("batches", spec.batch_size * spec.sequence_length * 24),
        ("overhead", setting.overhead + kept.units * OVERHEAD_UNIT),
    )
    trained = (*held, ("gradients", lora), ("optimizer", 2 * lora))
    stack = ("boundaries", kept.units * act.boundary) if kept.checkpointing else ("activations", kept.units * act.stacked)
    inner = max(act.recompute, act.backward) if kept.checkpointing else act.backward - act.saved
    moments = (
        Estimate("loading", (*held, ("reading", max(_reading(shape, setting), _quantizing(shape, setting))))),
        Estimate("forward", (*trained, stack, ("layer", act.forward))),
        Estimate("loss", (*trained, stack, ("final states", 4 * act.boundary), ("logits", _logits(setting, n, shape.vocab)))),
        Estimate("backward", (*trained, stack, ("final states", act.boundary), ("layer", inner))),
    )
    return max(moments, key=lambda moment: moment.peak)


def _reading(shape: Shape, setting: Setting) -> int:
    """What reading a weight needs besides the weight itself: a stored chunk where the dtype changes."""
    return READ * setting.stored if setting.stored != setting.itemsize else 0


def _quantizing(shape: Shape, setting: Setting) -> int:
    """What making a unit's NF4 form needs: a stored chunk, its fp32 copy and bitsandbytes' temporaries, five in all.
    It goes to disk, so no weights of the unit are there yet."""
    if setting.quantization is not Quantization.NF4:
        return 0
    return min(READ, shape.largest) * (setting.stored + 5 * _FP32)


def _logits(setting: Setting, tokens: int, vocabulary: int) -> int:
    """A narrow dtype's logits are there beside their fp32 copy."""
    whole = min(LOGITS, 3 * tokens * vocabulary * _FP32)
    return whole + (whole // 6 if setting.itemsize < _FP32 else 0)


def probe_peak(
    shape: Shape, setting: Setting, spec: ProbeSpec, heldout_rows: int, adapter_bytes: int, rows: Rows, similarity: bool = True
) -> Estimate:
    """The worst moment of a streamed probe. `adapter_bytes`: one layer's ΔW factors."""
    s, t = setting.itemsize, spec.sequence_length
    d, m = t * shape.hidden * s, t * shape.intermediate * s
    passed = min(max(rows.pass_rows, spec.batch_size), spec.batch_size + heldout_rows)
    streams = passed * d
    micro = min(rows.micro_rows, passed)
    positions = min(spec.positions, spec.batch_size * t)
    grams = (shape.layers + 1) * positions * positions * _FP32 if similarity else 0
    wide = max(module.d_out for module in shape.modules) * t * s
    weight = largest_weight(shape, setting)
    inner = micro * (2 * d + m + max(2 * m, (3 * wide if adapter_bytes else 0))) + weight
    if shape.family in EAGER:
        inner += 3 * micro * t * t * shape.heads * _FP32
    kept = (("Gram matrices", grams), ("overhead", setting.overhead))
    held = (("residual streams", streams), *kept)
    unit = ("unit", layer_bytes(shape, setting) + adapter_bytes)
    final = ("final states", min(heldout_rows, passed) * d)
    head = HEAD_ROWS * shape.hidden * (s + (setting.stored if setting.stored != s else 0))
    kernel = positions * (2 * shape.hidden + 3 * positions) * 8 if similarity else 0
    moments = (
        Estimate("probe: quantizing a unit", (*held, ("quantizing", _quantizing(shape, setting)))),
        Estimate("probe: reading a unit", (*held, unit, ("reading", _reading(shape, setting)))),
        Estimate("probe: a unit's forward", (*held, unit, ("layer", inner))),
        Estimate("probe: Gram matrix", (*held, unit, ("kernel", kernel))),
        Estimate("probe: response states", (*held, final)),
        Estimate("probe: held-out loss", (*kept, ("head", head), final, ("logits", 2 * LOGITS // 3))),
    )
    return max(moments, key=lambda moment: moment.peak)
