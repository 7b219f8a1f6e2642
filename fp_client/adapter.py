"""LoRA on a device: the frozen low-rank ledger ΔW, and the trainable adapter through peft.

ΔW is never merged into the weights (they may be 4-bit): it is added to a module's output as ``(x Aᵀ) Bᵀ``. The
trainable LoRA sits on top: ``y = W_0 x + ΔW x + (α/r) B A x``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.errors import ProtocolError
from common.types import Factors, LoraBlock, Start, TrainSpec
from fp_client.nf4 import hush_bitsandbytes

NAME = "device"
"""The peft name of the trainable adapter."""


def by_layer(blocks: Iterable[LoraBlock]) -> dict[int, list[LoraBlock]]:
    """Blocks grouped by their layer."""
    out: dict[int, list[LoraBlock]] = {}
    for block in blocks:
        out.setdefault(block.layer, []).append(block)
    return out


class LowRank:
    """A forward hook that adds ``(x Aᵀ) Bᵀ`` in fp32; nothing of it is trained."""

    def __init__(self, block: LoraBlock, device: torch.device) -> None:
        self.a = torch.from_numpy(np.ascontiguousarray(block.a)).to(device)
        self.b = torch.from_numpy(np.ascontiguousarray(block.b)).to(device)

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The module's output plus ΔW x, in the output's dtype."""
        return output + ((inputs[0].to(self.a.dtype) @ self.a.T) @ self.b.T).to(output.dtype)


def linear(layer: nn.Module, index: int, module: str) -> nn.Linear:
    """A layer's linear module by name. Raises ProtocolError naming a module the layer does not have."""
    try:
        found = layer.get_submodule(module)
        found = getattr(found, "base_layer", found)  # under peft's wrapper
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        have = ", ".join(sorted(n for n, m in layer.named_modules() if isinstance(m, nn.Linear)))
        raise ProtocolError(f"layer {index + 1} of this model has no linear module {module!r} (it has {have})")
    return found


def attach_ledger(layer: nn.Module, index: int, blocks: Sequence[LoraBlock], device: torch.device) -> None:
    """Add frozen ΔW blocks to one materialised layer; they go when the layer's modules go.

    Raises ProtocolError when a block does not fit its module.
    """
    for block in blocks:
        target = linear(layer, index, block.module)
        if block.a.shape[1:] != (target.in_features,) or block.b.shape != (target.out_features, block.a.shape[0]):
            raise ProtocolError(
                f"adapter of layer {index + 1} {block.module}: A {block.a.shape} and B {block.b.shape} do not fit a module "
                f"of {target.out_features}×{target.in_features}"
            )
        if block.a.shape[0]:
            target.register_forward_hook(LowRank(block, device))


def seed_of(*parts: object) -> int:
    """A seed for torch's generators that depends on these parts alone, and is the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def fresh_a(seed: int, layer: int, module: str, rank: int, d_in: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """LoRA's usual A (Kaiming uniform with a = √5), (rank, d_in), drawn from (seed, layer, module) alone.

    So a module starts alike whatever else a device keeps, and on whichever device.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, layer, module))
    bound = 1 / math.sqrt(d_in)
    drawn: np.ndarray[tuple[int, int], np.dtype[np.float32]] = (
        torch.empty((rank, d_in)).uniform_(-bound, bound, generator=generator).numpy()
    )
    return drawn


def split_broadcast(block: LoraBlock, rank: int) -> tuple[LoraBlock, LoraBlock]:
    """ΔW's top part and the residual: b[:, :rank] @ a[:rank] and the rest. The server subtracts exactly the first.

    The broadcast's factors are sorted by singular value.
    """
    top = LoraBlock(block.layer, block.module, block.a[:rank], block.b[:, :rank])
    return top, LoraBlock(block.layer, block.module, block.a[rank:], block.b[:, rank:])


def residual(spec: TrainSpec, block: LoraBlock) -> LoraBlock:
    """What of a target's ΔW stays frozen: all of it in a `fresh` start, the part after the top r in a `global` one."""
    return split_broadcast(block, spec.rank)[1] if spec.start is Start.GLOBAL else block


@dataclass(frozen=True)
class Initial:
    """How one module starts: `frozen` ΔW (rank may be 0), and the trainable `a` (r, d_in), `b` (d_out, r)."""

    frozen: LoraBlock | None
    trainable: LoraBlock


def initial(spec: TrainSpec, layer: int, module: str, d_out: int, d_in: int, broadcast: LoraBlock | None) -> Initial:
    """The frozen part and the trainable start of a module.

    `fresh`: all of ΔW is frozen, A is drawn, B is zero. `global`: the top-r part of ΔW is the start, with (α/r)·B·A
    equal to it, and the residual is frozen; when ΔW has fewer than r components the other rows of A are drawn and
    their columns of B are zero.
    """
    a, b = fresh_a(spec.seed, layer, module, spec.rank, d_in), np.zeros((d_out, spec.rank), np.float32)
    frozen = broadcast
    if spec.start is Start.GLOBAL and broadcast is not None:
        top, frozen = split_broadcast(broadcast, spec.rank)
        have = top.a.shape[0]
        a[:have] = top.a
        b[:, :have] = top.b / np.float32(spec.alpha / spec.rank)
    return Initial(frozen, LoraBlock(layer, module, a, b))


def inject(layer: nn.Module, spec: TrainSpec, blocks: Sequence[LoraBlock], device: torch.device) -> list[nn.Parameter]:
    """Put trainable LoRA on one materialised layer through peft, started from `blocks`; fp32 whatever the base is.

    Returns the parameters to train, as `spec.train` says: A, B or both; all others are frozen.
    """
    hush_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=[block.module for block in blocks],
        init_lora_weights=False,
        bias="none",
    )
    inject_adapter_in_model(config, layer, adapter_name=NAME)
    layer.requires_grad_(False)
    trainable = []
    for block in blocks:
        module = layer.get_submodule(block.module)
        assert isinstance(module, LoraLayer)
        for factor, lora, values in ((Factors.A, module.lora_A, block.a), (Factors.B, module.lora_B, block.b)):
            weight = lora[NAME].weight
            weight.data = torch.from_numpy(np.array(values, np.float32)).to(device)
            if spec.train in (Factors.BOTH, factor):
                weight.requires_grad_(True)
                trainable.append(weight)
    return trainable


def extract(layer: nn.Module, index: int, modules: Iterable[str]) -> list[LoraBlock]:
    """The trained factors of one layer, as fp32 arrays."""
    out = []
    for name in sorted(modules):
        module = layer.get_submodule(name)
        a, b = (factor[NAME].weight.detach().cpu().numpy().copy() for factor in (module.lora_A, module.lora_B))  # type: ignore[index, union-attr]
        out.append(LoraBlock(index, name, a, b))
    return out
