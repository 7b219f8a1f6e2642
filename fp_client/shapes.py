"""A decoder's shape from its Hugging Face ``config.json`` alone: what the planner computes with. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.checkpoint import FAMILIES
from common.errors import ModelError, ProtocolError, UnknownFamilyError
from common.types import ModuleShape

_TIED = frozenset({"gemma2", "gemma3", "gemma3_text", "smollm3"})
"""Families whose head is the embedding unless config.json says otherwise."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. All decoder layers are alike."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    modules: tuple[ModuleShape, ...]
    """The linear modules of one layer."""
    vectors: int
    """Elements of one layer's norms and biases."""
    window: int = 0
    """Tokens that sliding-window layers look back on; 0 where there are none."""

    @cached_property
    def linear(self) -> int:
        """Elements of one layer's linear weights."""
        return sum(module.d_out * module.d_in for module in self.modules)

    @property
    def largest(self) -> int:
        """Elements of one layer's largest linear weight."""
        return max(module.d_out * module.d_in for module in self.modules)

    @property
    def head(self) -> int:
        """Elements of the head matrix (V, d)."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights of the model."""
        return self.layers * (self.linear + self.vectors) + self.hidden + self.head * (1 if self.tied else 2)

    def factors(self, targets: tuple[str, ...], rank: int) -> int:
        """Elements of one layer's LoRA factors. Raises ProtocolError for a target the family does not have."""
        by_name = {module.name: module for module in self.modules}
        if unknown := sorted(set(targets) - set(by_name)):
            raise ProtocolError(f"a {self.family} layer has no linear module {unknown[0]!r} (has {', '.join(sorted(by_name))})")
        return sum(rank * (by_name[name].d_in + by_name[name].d_out) for name in targets)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes. Raises UnknownFamilyError, or ModelError naming a bad key."""
    family = str(config.get("model_type", "(none)"))
    if family not in FAMILIES:
        raise UnknownFamilyError(f"model family {family!r} is not supported (supported: {', '.join(sorted(FAMILIES))})")

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise ModelError(f"config.json: {key} is {value!r}, expected a positive number")
        return value

    d, m, heads = number("hidden_size"), number("intermediate_size"), number("num_attention_heads")
    kv = number("num_key_value_heads", heads)
    hd = number("head_dim", 256 if family in ("gemma2", "gemma3", "gemma3_text") else d // heads)
    q, k = heads * hd, kv * hd
    attention = {"o_proj": (d, q)}
    attention |= {"qkv_proj": (q + 2 * k, d)} if family == "phi3" else {"q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d)}
    mlp = {"gate_up_proj": (2 * m, d)} if family == "phi3" else {"gate_proj": (m, d), "up_proj": (m, d)}
    mlp["down_proj"] = (d, m)
    named = {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}
    norms = 4 * d if family.startswith("gemma") else 2 * d
    norms += {"gemma3": 2 * hd, "gemma3_text": 2 * hd, "qwen3": 2 * hd, "olmo2": q + k}.get(family, 0)
    biased = family == "qwen2" or bool(config.get("attention_bias"))
    biases = (
        (q + 2 * k if biased else 0) + (d if biased and family != "qwen2" else 0) + (2 * m + d if config.get("mlp_bias") else 0)
    )
    sliding = config.get("sliding_window") if family != "qwen2" or config.get("use_sliding_window") else None
    return Shape(
        family, number("num_hidden_layers"), d, m, heads, kv, hd, number("vocab_size"),
        bool(config.get("tie_word_embeddings", family in _TIED)),
        tuple(ModuleShape(name, out, into) for name, (out, into) in sorted(named.items())), norms + biases, sliding or 0,
    )  # fmt: skip


def _llama(layers: int, d: int, m: int, heads: int, kv: int, vocab: int, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": d,
        "intermediate_size": m, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49152, tied=True),
    "tinyllama-1.1b": _llama(22, 2048, 5632, 32, 4, 32000),
    "llama2-7b": _llama(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": _llama(40, 5120, 13824, 40, 40, 32000),
}
"""Public configurations of models that tables and benchmarks speak of."""
