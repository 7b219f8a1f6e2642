"""The planner: what a task will hold at its worst moment, from the model's config alone. Torch-free.

All figures are bytes above the worker's warmed footprint. One function a moment; a task's peak is
the largest of its moments. The formulas follow what the code holds, tensor by tensor; `OVERHEAD` is the one constant
that was measured instead: the buffers that the matrix library keeps, and the allocator's rounding. Here are a layer's
sizes, a submodel in memory and the probe; `fp_client.memory_stream` has the streamed modes.

Symbols: n = micro-batch × window tokens, d = hidden, m = intermediate, s = bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from common.checkpoint import EMBEDDING_KEY, Checkpoint
from common.tensorfile import ITEMSIZE
from common.types import Part, ProbeSpec, Quantization, Start, TrainSpec, UnitId, model_units, unit_modules
from fp_client.shapes import Shape
from fp_client.units import Kept as KeptParts

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
OVERHEAD_KERNELS = 24 * MIB
"""bf16: the compiled kernels of the last shapes of products (`fp_client.pool.KERNELS`); rows have ever other lengths."""
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

    @classmethod
    def of(cls, checkpoint: Checkpoint, quantization: Quantization, dtype: str, threads: int) -> Self:
        """For a checkpoint's weights, computed in `dtype`: ``float32`` or ``bfloat16``."""
        stored = ITEMSIZE[checkpoint.info(EMBEDDING_KEY).dtype]
        return cls(quantization, 2 if dtype == "bfloat16" else _FP32, stored, threads)

    @property
    def overhead(self) -> int:
        """What is held besides tensors."""
        return OVERHEAD + OVERHEAD_THREAD * (self.threads - 1) + (OVERHEAD_KERNELS if self.itemsize < _FP32 else 0)


@dataclass(frozen=True)
class Held:
    """How many layers are kept whole, and how many with one component alone."""

    whole: int = 0
    attention: int = 0
    ffn: int = 0
    any_draw: bool = False
    """Not one draw but the worst of many: a component may also share its layer."""

    def __iter__(self) -> Iterator[tuple[Part, int]]:
        """(what is kept of a layer, of how many layers), those that there are."""
        parts = ((Part.LAYER, self.whole), (Part.ATTENTION, self.attention), (Part.FFN, self.ffn))
        return iter([(part, count) for part, count in parts if count])

    @property
    def kinds(self) -> tuple[Part, ...]:
        """What a single layer may hold."""
        return (Part.LAYER,) if self.any_draw else tuple(part for part, _ in self)

    @property
    def layers(self) -> int:
        """Layers of which something is kept."""
        return self.whole + self.attention + self.ffn

    @staticmethod
    def of(kept: Mapping[int, KeptParts]) -> Held:
        """Of an assignment (`fp_client.units.keep`)."""
        alone = [next(iter(one.parts)) for one in kept.values() if len(one.parts) == 1]
        return Held(len(kept) - len(alone), alone.count(Part.ATTENTION), alone.count(Part.FFN))


@dataclass(frozen=True)
class Kept:
    """What a submodel keeps, and how it is trained."""

    held: Held
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
    """Activations kept in memory between forward and backward (stitched: changes over gaps); what is beyond goes to disk.
    −1: all of them stay."""
    prefix_bytes: int = -1
    """Of the prefix's outputs, the same."""


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


def layer_bytes(shape: Shape, setting: Setting, part: Part = Part.LAYER) -> int:
    """One decoder layer's weights, or one component's. NF4: half a byte each, and an fp32 scale for 64 of them.

    Norms and biases are shared out evenly: they are a few kilobytes.
    """
    modules = [m for m in shape.modules if m.name in unit_modules(UnitId(0, part), (m.name,))]
    linear, vectors = sum(m.d_out * m.d_in for m in modules), shape.vectors if part is Part.LAYER else shape.vectors // 2
    if setting.quantization is Quantization.NF4:
        return linear // 2 + sum(-(-m.d_out * m.d_in // 64) for m in modules) * _FP32 + vectors * setting.itemsize
    return (linear + vectors) * setting.itemsize


def ledger_bytes(shape: Shape, spec: TrainSpec, broadcast_rank: int, part: Part = Part.LAYER) -> int:
    """One unit's frozen ΔW factors. `global` starts from the top r of them and copies what is left."""
    rank = broadcast_rank if spec.start is Start.FRESH else max(0, broadcast_rank - spec.rank) + broadcast_rank
    return shape.factors(unit_modules(UnitId(0, part), spec.targets), rank) * _FP32


def lora_bytes(shape: Shape, spec: TrainSpec, part: Part = Part.LAYER) -> int:
    """One unit's trainable factors: what is uploaded of it."""
    return shape.factors(unit_modules(UnitId(0, part), spec.targets), spec.rank) * _FP32


def unit_bytes(shape: Shape, setting: Setting, spec: TrainSpec, broadcast_rank: int, part: Part = Part.LAYER) -> int:
    """What one more unit costs a checkpointed submodel with a micro-batch of one: weights, ΔW, LoRA with its gradient
    and AdamW's two moments, and the boundary activation (also of a component: it may be alone in its layer)."""
    boundary = spec.sequence_length * shape.hidden * setting.itemsize
    weights = layer_bytes(shape, setting, part) + ledger_bytes(shape, spec, broadcast_rank, part)
    return weights + 4 * lora_bytes(shape, spec, part) + boundary


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


def activations(
    shape: Shape, setting: Setting, spec: TrainSpec, tokens: int, ledger: bool, part: Part = Part.LAYER
) -> Activations:
    """Follows a llama layer with peft's LoRA; see the tensor names on the right. LoRA runs in fp32, so a narrower
    compute dtype casts each target's input (saved) and its output. `part`: what the layer still has."""
    s, n, t = setting.itemsize, tokens, set(unit_modules(UnitId(0, part), spec.targets))
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
    mlp = d + norm + post_norms + inputs(("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"), d) + 2 * m  # gate, activation
    if part is Part.FFN:
        attention, scores, mask = 0, 0, 0
    if part is Part.ATTENTION:
        mlp, m = d, 0
    before_up = attention + mlp
    rank_rows = n * spec.rank * _FP32 * len(t)
    saved = int(1.02 * (before_up + m + inputs(("mlp.down_proj",), m) + rank_rows))
    # The widest module: its output, LoRA's output, that times α/r, and the sum; a narrow dtype promotes its output too.
    wide = (2 * m if fused else m) or max(q + 2 * k if fused else q, d)
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
    acts = [activations(shape, setting, spec, n, broadcast_rank > 0, part) for part in kept.held.kinds]
    boundary = n * shape.hidden * s
    lora = sum(count * lora_bytes(shape, spec, part) for part, count in kept.held)
    held = (
        ("weights", sum(count * layer_bytes(shape, setting, part) for part, count in kept.held)),
        ("head", shape.head * s),
        ("ledger", sum(count * ledger_bytes(shape, spec, broadcast_rank, part) for part, count in kept.held)),
        ("LoRA", lora),
        ("batches", batch_bytes(spec)),
        ("overhead", setting.overhead + kept.held.layers * OVERHEAD_UNIT),
    )
    trained = (*held, ("gradients", lora), ("optimizer", 2 * lora))
    inner = max(act.backward - act.saved for act in acts)
    stack = ("boundaries", kept.held.layers * boundary)
    if kept.checkpointing:
        inner = max(max(act.recompute, act.backward) for act in acts)
    else:
        each = {part: activations(shape, setting, spec, n, broadcast_rank > 0, part).stacked for part, _ in kept.held}
        stack = ("activations", sum(count * each[part] for part, count in kept.held))
    moments = (
        Estimate("loading", (*held, ("reading", max(reading(shape, setting), quantizing(shape, setting))))),
        Estimate("forward", (*trained, stack, ("layer", max(act.forward for act in acts)))),
        Estimate("loss", (*trained, stack, ("final states", 4 * boundary), ("logits", logits_bytes(setting, n, shape.vocab)))),
        Estimate("backward", (*trained, stack, ("final states", boundary), ("layer", inner))),
    )
    return worst(moments)


def worst(moments: Iterable[Estimate]) -> Estimate:
    """The moment with the highest peak."""
    return max(moments, key=lambda moment: moment.peak)


def batch_bytes(spec: TrainSpec) -> int:
    """All rows of a round: ids, mask and labels."""
    return spec.steps * spec.batch_size * spec.sequence_length * 24


def reading(shape: Shape, setting: Setting) -> int:
    """What reading a weight needs besides the weight itself: a stored chunk where the dtype changes."""
    return READ * setting.stored if setting.stored != setting.itemsize else 0


def quantizing(shape: Shape, setting: Setting) -> int:
    """What making a unit's NF4 form needs: a stored chunk, its fp32 copy and bitsandbytes' temporaries, five in all.
    It goes to disk, so no weights of the unit are there yet."""
    if setting.quantization is not Quantization.NF4:
        return 0
    return min(READ, shape.largest) * (setting.stored + 5 * _FP32)


def logits_bytes(setting: Setting, tokens: int, vocabulary: int) -> int:
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
    states = len(model_units(spec.part, shape.layers)) + 1  # the stream before the first unit and after each
    grams = states * positions * positions * _FP32 if similarity else 0
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
        Estimate("probe: quantizing a unit", (*held, ("quantizing", quantizing(shape, setting)))),
        Estimate("probe: reading a unit", (*held, unit, ("reading", reading(shape, setting)))),
        Estimate("probe: a unit's forward", (*held, unit, ("layer", inner))),
        Estimate("probe: Gram matrix", (*held, unit, ("kernel", kernel))),
        Estimate("probe: response states", (*held, final)),
        Estimate("probe: held-out loss", (*kept, ("head", head), final, ("logits", 2 * LOGITS // 3))),
    )
    return worst(moments)
