"""Bring a worker's code into memory before its footprint is taken.

Library code is mapped file pages that count as resident once touched, and torch, peft and bitsandbytes
set themselves up on first use. All of that belongs to the warmed worker, not to a task, so
a model of a few kilobytes goes through the same loader, probe and training that a task uses.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.checkpoint import Checkpoint
from common.tensorfile import write_tensors
from common.types import ProbeSpec, Quantization, TrainSpec, UnitId
from fp_client.loader import UnitLoader
from fp_client.probe import probe
from fp_client.submodel import load_submodel
from fp_client.train import train

_D, _M, _V, _L = 64, 128, 128, 2
_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": _D, "intermediate_size": _M, "vocab_size": _V,
    "num_hidden_layers": _L, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
_SHAPES = {
    "input_layernorm": (_D,), "post_attention_layernorm": (_D,), "self_attn.q_proj": (_D, _D), "self_attn.k_proj": (_D // 2, _D),
    "self_attn.v_proj": (_D // 2, _D), "self_attn.o_proj": (_D, _D), "mlp.gate_proj": (_M, _D), "mlp.up_proj": (_M, _D),
    "mlp.down_proj": (_D, _M),
}  # fmt: skip
_LINEAR = tuple(sorted(name for name, shape in _SHAPES.items() if len(shape) == 2))
_PREFIX = "fedpruner-warm-"
_ABANDONED = 3600.0
"""Seconds after which a directory of a warm-up, which takes some seconds, is nobody's."""


def warm_up(device: str, dtype: torch.dtype, quantization: Quantization) -> None:
    """One probe and two training steps of a tiny random llama, on the given device."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        directory = Path(name)
        _write(directory)
        checkpoint = Checkpoint(directory)
        try:
            loader = UnitLoader(checkpoint, device, dtype, quantization, directory / "store", "0" * 64)
            batch = _batch()
            probe(loader, batch, [batch], ProbeSpec(positions=16, batch_size=2, sequence_length=16))
            spec = TrainSpec(2, 2, 16, 1e-4, 2, 4.0, _LINEAR, 0)
            submodel = load_submodel(loader, [UnitId(0), UnitId(1)], spec)
            train(submodel, [batch, batch], spec, 1)
        finally:
            checkpoint.close()


def _sweep() -> None:
    """Remove what workers that were killed while they warmed up have left."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _write(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(_CONFIG))
    generator = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": generator.normal(size=(_V, _D)), "model.norm.weight": np.ones(_D)}
    for layer in range(_L):
        for name, shape in _SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = (
                generator.normal(size=shape) * 0.1 if len(shape) == 2 else np.ones(shape)
            )
    write_tensors(directory / "model.safetensors", {key: value.astype(np.float32) for key, value in tensors.items()})


def _batch() -> dict[str, Any]:
    ids = torch.arange(32).reshape(2, 16) + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
