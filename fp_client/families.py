"""Where a Hugging Face model family keeps its embeddings, layers, attention, MLP, norm and head.

Every supported family is a plain pre- or post-norm decoder: ``model.embed_tokens``, ``model.layers``,
``model.norm``, ``model.rotary_emb`` and ``lm_head``. What differs between them stays in their own forward
(masks, sliding windows, rotary choice, soft-capping); this table says only what the streaming code must know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import ModelError, UnknownFamilyError
from common.types import Part


@dataclass(frozen=True)
class Family:
    """Attribute names inside the Hugging Face model, and the traits that streaming depends on.

    `attention` and `mlp` are the two components of a decoder layer (paper §3.3), each with the norms that go with it.
    """

    name: str
    architecture: str
    """The causal language model's class in transformers."""
    backbone: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    attention_kernel: str = "sdpa"
    """gemma2 soft-caps its attention logits, which SDPA cannot do."""


_ATTENTION_SANDWICH = ("input_layernorm", "post_attention_layernorm")
_MLP_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_FAMILIES = (
    Family("llama", "LlamaForCausalLM"),
    Family("mistral", "MistralForCausalLM"),
    Family("qwen2", "Qwen2ForCausalLM"),
    Family("qwen3", "Qwen3ForCausalLM"),
    Family("phi3", "Phi3ForCausalLM"),
    Family("gemma2", "Gemma2ForCausalLM", attention_norms=_ATTENTION_SANDWICH, mlp_norms=_MLP_SANDWICH, attention_kernel="eager"),
    Family("gemma3_text", "Gemma3ForCausalLM", attention_norms=_ATTENTION_SANDWICH, mlp_norms=_MLP_SANDWICH),
    Family("smollm3", "SmolLM3ForCausalLM"),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""By `model_type`."""


def family_of(model_type: str) -> Family:
    """Raises UnknownFamilyError naming the family, with a hint for the image-and-text variant of gemma3."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type == "gemma3":
        raise UnknownFamilyError("model family 'gemma3' is the image-and-text model; use its text model (model_type gemma3_text)")
    raise UnknownFamilyError(f"model family {model_type!r} is not supported (supported: {', '.join(sorted(FAMILIES))})")


def model_class(family: Family) -> Any:
    """The transformers class; never remote code. Raises ModelError when this transformers lacks it."""
    import transformers

    try:
        return getattr(transformers, family.architecture)
    except AttributeError:
        raise ModelError(
            f"the installed transformers {transformers.__version__} has no {family.architecture}; upgrade it"
        ) from None


def backbone(model: nn.Module, family: Family) -> nn.Module:
    """The decoder stack inside the causal language model."""
    return model.get_submodule(family.backbone)


def decoder_layers(model: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder layers, by original index."""
    layers = backbone(model, family).get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def silence_dropout(config: Any) -> None:
    """Set the family's own dropouts to 0, in place.

    The model stays in train mode throughout (bitsandbytes repacks 4-bit weights in eval mode on some CPUs, which
    would change the numbers), so a dropout in the config would otherwise disturb the probe.
    """
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "mlp_dropout"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)


def logit_softcap(config: Any) -> float | None:
    """gemma2's cap c: logits become c·tanh(logits/c). None for no cap."""
    cap = getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None


class NoAttention(nn.Module):
    """A pruned attention block: adds nothing to the residual stream, and has no parameter."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        """Zeros (B, T, d), and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """A pruned feed-forward block: adds nothing to the residual stream, and has no parameter."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros (B, T, d)."""
        return torch.zeros_like(hidden_states)


def prune_component(layer: nn.Module, family: Family, part: Part) -> dict[str, nn.Module]:
    """Take a component out of a decoder layer: its block and norms give way to modules without parameters.

    Norms keep zeros zero, so the layer's own forward then adds exactly nothing. Returns what was taken out, by name.
    """
    attention = part is Part.ATTENTION
    block = family.attention if attention else family.mlp
    names = (block, *(family.attention_norms if attention else family.mlp_norms))
    taken = {name: layer.get_submodule(name) for name in names}
    for name in names:
        setattr(layer, name, (NoAttention() if attention else NoFeedForward()) if name == block else nn.Identity())
    return taken


@contextmanager
def without_component(layer: nn.Module, family: Family, part: Part) -> Iterator[None]:
    """The layer without one of its components, for the length of a block."""
    taken = prune_component(layer, family, part)
    try:
        yield
    finally:
        for name, module in taken.items():
            setattr(layer, name, module)
