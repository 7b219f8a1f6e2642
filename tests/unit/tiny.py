"""Tiny random models of every family, saved as sharded safetensors; and the obvious in-memory twins of the streamed code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from fp_client.families import FAMILIES, model_class

# Models this small gain nothing from threads, and on a busy machine waiting for them costs most of the time.
torch.set_num_threads(1)

LAYERS = 6
VOCABULARY = 320

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Windows of 8 tokens, so that sliding and full layers differ on short texts; types that differ by layer index.
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"sliding_window": 8, "resid_pdrop": 0.1, "attention_dropout": 0.1},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layer_interval": 3},
    "olmo2": {},
}


def make(family: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of the family, in a directory of its own under `directory`; several shards."""
    target = directory / family
    cls = model_class(FAMILIES[family])
    config = cls.config_class(**{**COMMON, **EXTRA[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, family)))
        model = cls(config)
        for name, parameter in model.named_parameters():
            # Larger than the usual initialization, so that layers do something; norms away from their neutral value.
            spread = 0.25 if "norm" in name else 0.15
            parameter.data.add_(torch.randn_like(parameter) * spread)
    model.to(dtype).save_pretrained(target, max_shard_size="100KB")
    return target


def whole(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same model loaded whole by transformers, frozen, without dropout."""
    transformers.utils.logging.disable_progress_bar()
    implementation = "eager" if "gemma2" in directory.name else "sdpa"
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=implementation
    ).requires_grad_(False)


def batch(rows: int = 3, length: int = 24, seed: int = 0, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Random token rows of different lengths, right-padded, with a prompt part that does not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        real = length - 4 * (row % 3)
        mask[row, real:] = 0
        labels[row, real:] = -100
        labels[row, : 3 + row] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def residual_streams(model: Any, rows: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """[h_0 … h_L], each (B, T, d). Not `output_hidden_states` as it is: its last entry is after the final norm."""
    last: list[torch.Tensor] = []
    layer = model.model.layers[-1]
    handle = layer.register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        states = model(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], output_hidden_states=True, use_cache=False
        ).hidden_states
    handle.remove()
    return [*states[:-1], last[0]]


def full_loss(model: Any, rows: dict[str, torch.Tensor]) -> float:
    """Mean response-token loss from whole logits."""
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows["labels"][:, 1:].flatten()))
