"""The exported adapter, read by PEFT itself on the untouched base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import ConfigError, NotFound, StorageError
from common.tensorfile import write_tensors
from common.types import ModelManifest, ModuleShape
from fp_server.export import adapter_config, export_peft, module_name

LAYERS = 12
MODULES = (
    ModuleShape("mlp.down_proj", 32, 48),
    ModuleShape("self_attn.k_proj", 16, 32),
    ModuleShape("self_attn.q_proj", 32, 32),
)
MANIFEST = ModelManifest("tiny", "llama", LAYERS, 32, 64, MODULES, "f" * 64)
TRAINED = (0, 1, 10)
"""Layer 1 and not layer 11: a name that matched too much would reach it."""


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ledgers(directory: Path) -> tuple[dict[int, Path], dict[tuple[int, str], np.ndarray]]:
    """Ledger files of every kind of module (factors of many ranks, redundant ones, dense, absent), and their ΔW."""
    rng = np.random.default_rng(0)
    paths: dict[int, Path] = {}
    deltas: dict[tuple[int, str], np.ndarray] = {}
    for layer in TRAINED:
        tensors: dict[str, np.ndarray] = {}
        for index, m in enumerate(MODULES):
            rank = 1 + layer % 7 + index
            a = 0.3 * rng.standard_normal((rank, m.d_in), np.float32)
            b = 0.3 * rng.standard_normal((m.d_out, rank), np.float32)
            key = f"layers.{layer}.{m.name}"
            if (layer, index) == (0, 1):
                continue
            if (layer, index) == (1, 0):
                a, b = np.vstack([a, a]), np.hstack([b, b])
            delta = b.astype(np.float64) @ a.astype(np.float64)
            if (layer, index) == (10, 2):
                tensors[f"{key}.delta"] = delta.astype(np.float32)
            else:
                tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"] = a, b
            deltas[layer, m.name] = delta
        paths[layer] = directory / f"ledger-{layer}"
        write_tensors(paths[layer], tensors)
    return paths, deltas


def load(adapter: Path) -> PeftModel:
    """As a person would load it. A missing or unexpected key would be a warning, and so an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 still reads an attribute that transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(tiny(), str(adapter)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20)).logits


def test_peft_loads_it_and_gives_the_ledgers_logits(tmp_path: Path) -> None:
    paths, deltas = ledgers(tmp_path)
    dropped = export_peft(paths, MANIFEST, tmp_path / "adapter", "the/base")
    assert set(dropped.values()) == {0.0} and len(dropped) == len(deltas)
    merged = tiny()
    for (layer, module), delta in deltas.items():
        merged.get_submodule(module_name(layer, module)).weight.data += torch.from_numpy(delta).float()
    model = load(tmp_path / "adapter")
    got, want = logits(model), logits(merged)
    assert (want - logits(tiny())).abs().max() > 0.01
    assert (got - want).abs().max() < 1e-5
    wrapped = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == {module_name(layer, module) for layer, module in deltas}
    for name in wrapped:
        layer = model.base_model.model.get_submodule(name)
        rank = layer.lora_A["default"].weight.shape[0]
        assert layer.r["default"] == rank and layer.scaling["default"] == 1.0
    # Columns that repeat others, and a dense ΔW of low rank, come out at their true rank.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"][module_name(1, "mlp.down_proj")] == 2
    assert config["rank_pattern"][module_name(10, "self_attn.q_proj")] == 6
    assert config["base_model_name_or_path"] == "the/base"


def test_a_bounded_rank_is_the_best_approximation_and_says_what_it_drops(tmp_path: Path) -> None:
    paths, deltas = ledgers(tmp_path)
    dropped = export_peft(paths, MANIFEST, tmp_path / "adapter", "the/base", rank=2)
    model = load(tmp_path / "adapter")
    for (layer, module), delta in deltas.items():
        lora = model.base_model.model.get_submodule(module_name(layer, module))
        got = lora.get_delta_weight("default").detach().double().numpy()
        u, s, vt = np.linalg.svd(delta)
        assert np.abs(got - (u[:, :2] * s[:2]) @ vt[:2]).max() < 1e-5
        assert dropped[module_name(layer, module)] == pytest.approx((s[2:] ** 2).sum() / (s**2).sum(), abs=1e-7)


@pytest.mark.parametrize("layers", [12, 120])
def test_full_names_mean_one_module_each_to_peft(layers: int) -> None:
    """Every name's rank is its own although PEFT reads the pattern's keys as regular expressions."""
    names = {(layer, m.name): 1 + layer for layer in range(layers) for m in MODULES}
    config = adapter_config(names, "b")
    pattern = config["rank_pattern"]
    assert isinstance(pattern, dict) and config["alpha_pattern"] == pattern
    for layer, module in names:
        name = module_name(layer, module)
        assert get_pattern_key(list(reversed(pattern)), name) == name
    # An untrained layer takes no other layer's rank.
    only = adapter_config({(1, "self_attn.q_proj"): 4}, "b")["rank_pattern"]
    for layer in (0, 10, 11, 21, 101):
        name = module_name(layer, "self_attn.q_proj")
        assert get_pattern_key(list(only), name) == name and name not in only  # type: ignore[operator, call-overload]


def test_the_configuration_is_one_peft_writes_itself(tmp_path: Path) -> None:
    """No key that PEFT's own configuration lacks."""
    known = set(LoraConfig().to_dict())
    assert set(adapter_config({(0, "a"): 1}, "b")) <= known


def test_the_same_ledger_gives_the_same_bytes(tmp_path: Path) -> None:
    paths, _ = ledgers(tmp_path)
    for name in ("x", "y"):
        export_peft(paths, MANIFEST, tmp_path / name, "b")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for file in (tmp_path / "x").iterdir():
        assert file.read_bytes() == (tmp_path / "y" / file.name).read_bytes()


def test_an_empty_ledger_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    key = "layers.0.mlp.down_proj.lora_"
    write_tensors(tmp_path / "zero", {f"{key}A": np.zeros((2, 48), np.float32), f"{key}B": np.zeros((32, 2), np.float32)})
    for given in ({}, {0: tmp_path / "zero"}):
        with pytest.raises(NotFound, match="no layer has been trained yet"):
            export_peft(given, MANIFEST, tmp_path / "out" / "adapter", "b")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_directory_and_a_damaged_ledger_are_refused(tmp_path: Path) -> None:
    paths, _ = ledgers(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_peft(paths, MANIFEST, tmp_path / "there", "b")
    with pytest.raises(ConfigError, match="at least 1"):
        export_peft(paths, MANIFEST, tmp_path / "out", "b", rank=0)
    paths[10].write_bytes(paths[10].read_bytes()[:-1])
    with pytest.raises(StorageError, match="damaged ledger"):
        export_peft(paths, MANIFEST, tmp_path / "out", "b")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_directory_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    paths, _ = ledgers(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        export_peft(paths, MANIFEST, tmp_path / "file" / "adapter", "b")
