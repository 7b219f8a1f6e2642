"""Where a Hugging Face model family keeps its embeddings, layers, attention, MLP, norm and head.

Every supported family is a plain pre- or post-norm decoder: ``model.embed_tokens``, ``model.layers``,
``model.norm``, ``model.rotary_emb`` and ``lm_head``. What differs between them stays in their own forward
(masks, sliding windows, rotary choice, soft-capping); this table says only what the streaming code must know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from common.errors import ModelError, UnknownFamilyError


@dataclass(frozen=True)
class Family:
    """Attribute names inside the Hugging Face model, and the traits that streaming depends on.

    `attention` and `mlp` are the two components of a decoder layer (paper §3.3): the seam for component units.
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
    attention_kernel: str = "sdpa"
    """gemma2 soft-caps its attention logits, which SDPA cannot do."""


_FAMILIES = (
    Family("llama", "LlamaForCausalLM"),
    Family("mistral", "MistralForCausalLM"),
    Family("qwen2", "Qwen2ForCausalLM"),
    Family("qwen3", "Qwen3ForCausalLM"),
    Family("phi3", "Phi3ForCausalLM"),
    Family("gemma2", "Gemma2ForCausalLM", attention_kernel="eager"),
    Family("gemma3_text", "Gemma3ForCausalLM"),
    Family("smollm3", "SmolLM3ForCausalLM"),
    Family("olmo2", "Olmo2ForCausalLM"),
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
