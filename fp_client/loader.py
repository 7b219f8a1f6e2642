"""The Hugging Face model without its weights, and a loader that brings in one unit at a time.

The model is built on the meta device, so that its own forward (masks, rotary embeddings, sliding windows) runs
while its weights come and go. Tensors are read by offset, never mapped: mapped pages count as the process's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.checkpoint import EMBEDDING_KEY, HEAD_KEY, NORM_KEY, Checkpoint
from common.errors import ModelError
from common.types import Quantization
from fp_client.families import Family, backbone, decoder_layers, family_of, model_class, silence_dropout
from fp_client.nf4 import Nf4Store, read_linear
from fp_client.shapes import shape_of
from fp_client.tensors import read_into_tensor, read_rows, read_tensor, stored_dtype

HEAD_ROWS = 4096
"""Vocabulary rows of the head read at a time when the head does not stay."""


def model_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration of a checkpoint, with its own dropouts silenced. Raises ModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{checkpoint.directory / 'config.json'}: transformers can't use it: {error}") from None
    silence_dropout(config)
    config.use_cache = False
    return config


def build_meta(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """The causal language model with every parameter on the meta device and its rotary buffers on `device`.

    It is in train mode with dropout 0, frozen, with no cache. Raises ModelError, UnknownFamilyError.
    """
    family = family_of(checkpoint.family)
    config = model_config(checkpoint)
    config._attn_implementation = family.attention_kernel
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = model_class(family)(config)
    finally:
        torch.set_default_dtype(before)
    stack = backbone(model, family)
    # Rotary frequencies are non-persistent buffers: in no checkpoint, so they are computed again.
    rotary = stack.get_submodule(family.rotary)
    setattr(stack, family.rotary, type(rotary)(config).to(device))
    model.requires_grad_(False)
    return model.train()


class RowEmbedding(nn.Module):
    """Token embedding that reads only the rows a batch uses; no matrix stays in memory.

    forward: token ids (B, T) -> (B, T, d), scaled as the family does (gemma multiplies by sqrt(d)).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.checkpoint, self.device, self.dtype, self.scale = checkpoint, device, dtype, scale
        self.resident: torch.Tensor | None = None
        """(V, d): set when the tied head is resident anyway."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Raises ModelError for a token id outside the vocabulary."""
        file, info = self.checkpoint.file(EMBEDDING_KEY), self.checkpoint.info(EMBEDDING_KEY)
        vocabulary, width = info.shape
        ids, inverse = torch.unique(input_ids, return_inverse=True)
        if ids.numel() and (int(ids[0]) < 0 or int(ids[-1]) >= vocabulary):
            raise ModelError(f"token id {int(ids[-1])}: the model has {vocabulary}; is the tokenizer another model's?")
        if self.resident is not None:
            out = nn.functional.embedding(input_ids, self.resident)
        else:
            stored = stored_dtype(self.checkpoint, EMBEDDING_KEY)
            rows = torch.empty((ids.numel(), width), dtype=stored)
            for row, token in zip(rows, ids.tolist(), strict=True):
                read_into_tensor(file, EMBEDDING_KEY, row, token * width * stored.itemsize)
            out = rows.to(self.device, self.dtype)[inverse.to(self.device)]
        # The scale is rounded to the compute dtype, as the family itself does.
        return out if self.scale == 1.0 else out.mul_(torch.tensor(self.scale, dtype=self.dtype, device=self.device))


class UnitLoader:
    """Reads one decoder layer at a time into a model made by `build_meta`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantization: Quantization = Quantization.NONE,
        store: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        """`dtype`: of weights kept in full, and the compute dtype. nf4 needs `store` and the base `fingerprint`."""
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.family: Family = family_of(checkpoint.family)
        self.quantization = quantization
        self.modules = tuple(sorted(module.name for module in shape_of(checkpoint.config).modules))
        """The linear modules of a whole layer."""
        self.store: Nf4Store | None = None
        if quantization is Quantization.NF4:
            if store is None or not fingerprint:
                raise ValueError("nf4 needs a store directory and the base model's fingerprint")
            self.store = Nf4Store(store, checkpoint, fingerprint)

    def model(self) -> Any:
        """A fresh model: embedding by rows, final norm in place, decoder layers on meta, no head."""
        model = build_meta(self.checkpoint, self.dtype, self.device)
        stack = backbone(model, self.family)
        embedding = stack.get_submodule(self.family.embedding)
        scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
        setattr(stack, self.family.embedding, RowEmbedding(self.checkpoint, self.device, self.dtype, scale))
        norm = stack.get_submodule(self.family.norm)
        norm.weight = nn.Parameter(self.tensor(NORM_KEY), requires_grad=False)
        return model

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        return decoder_layers(model, self.family)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the device in the compute dtype. Raises ModelError naming what is missing."""
        return read_tensor(self.checkpoint, name, self.device, self.dtype)

    def materialise(self, layer: nn.Module, index: int) -> None:
        """Fill one decoder layer with layer `index`'s weights, quantizing its linear modules if asked to.

        Only what the layer still has is read: a pruned component's weights never are. LoRA on it is left alone.
        """
        quantized = self._quantized(layer, index)
        for name, parameter in list(layer.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            if _is_lora(name) or (leaf == "weight" and parent in quantized):
                continue
            full = f"model.layers.{index}.{_base_name(name)}"
            if self.checkpoint.info(full).shape != tuple(parameter.shape):
                found = self.checkpoint.info(full).shape
                path = self.checkpoint.file(full).path
                raise ModelError(f"{path}: tensor {full!r} has shape {found}, config.json asks for {tuple(parameter.shape)}")
            setattr(layer.get_submodule(parent), leaf, nn.Parameter(self.tensor(full), requires_grad=False))

    def ready(self, index: int) -> bool:
        """Whether a layer only needs reading; a quantized one must be made first where it is not on disk, or damaged there."""
        return self.store is None or self.store.holds(index, self.modules)

    def _quantized(self, layer: nn.Module, index: int) -> set[str]:
        if self.store is None:
            return set()
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear) and not _is_lora(name)}
        with self.store.open(index, self.modules) as file:
            for name, linear in linears.items():
                parent, _, leaf = name.rpartition(".")
                filled = read_linear(file, _base_name(name), linear, self.device, self.dtype)
                setattr(layer.get_submodule(parent), leaf, filled)
        return set(linears)

    def release(self, layer: nn.Module) -> None:
        """Give a layer's memory back: its weights return to the meta device; LoRA on it stays, frozen ΔW goes."""
        for name, module in list(layer.named_modules()):
            if _is_lora(name):
                continue
            if isinstance(module, nn.Linear):
                weight: Any = module.weight
                if getattr(weight, "module", None) is not None:
                    # bitsandbytes' weight points back at its module: only the garbage collector would free the two.
                    weight.module = None
                bare = nn.Linear(
                    module.in_features, module.out_features, module.bias is not None, device="meta", dtype=self.dtype
                ).requires_grad_(False)
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, bare)
            else:
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

    @property
    def head_name(self) -> str:
        """The head's tensor: its own, or the embedding's when they are tied."""
        return HEAD_KEY if HEAD_KEY in self.checkpoint else EMBEDDING_KEY

    def head(self) -> torch.Tensor:
        """The head matrix (V, d) in the compute dtype."""
        return self.tensor(self.head_name)

    def head_chunks(self, rows: int = HEAD_ROWS) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows (≤ rows, d)) of the head, one chunk at a time."""
        for first in range(0, self.checkpoint.info(self.head_name).shape[0], rows):
            yield first, read_rows(self.checkpoint, self.head_name, first, first + rows, self.device, self.dtype)


def _is_lora(name: str) -> bool:
    """Whether a parameter or module belongs to peft's LoRA and not to the base model."""
    return ".lora_" in name


def _base_name(name: str) -> str:
    """A name as the checkpoint has it: peft puts a wrapped module under ``base_layer``."""
    return name.replace(".base_layer", "")
