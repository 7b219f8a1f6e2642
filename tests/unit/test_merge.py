"""The merged model against the adapter loaded by peft on the untouched base."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigError, ModelError, StorageError
from fp_client import merge as module
from fp_client.merge import merge
from tests.unit import tiny

# peft still asks transformers under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def exported(base: Path, directory: Path, **options: Any) -> Path:
    """An adapter with random factors, other ranks on some modules, saved by peft."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "model.layers.3.mlp.up_proj"],
        "rank_pattern": {"model.layers.3.mlp.down_proj": 7},
        "alpha_pattern": {"model.layers.3.mlp.down_proj": 7},
        "init_lora_weights": False,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny.whole(base), peft.LoraConfig(**settings))
    model.save_pretrained(directory / "adapter")
    return directory / "adapter"


def logits(model: Any) -> torch.Tensor:
    rows = tiny.batch()
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    return out


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 9, "alpha_pattern": {}}, {"use_rslora": True}])
@pytest.mark.parametrize("chunk", [module.CHUNK, 100])
def test_logits_equal_peft_on_the_untouched_base(
    options: dict[str, Any], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    base = tiny.make("llama", tmp_path)
    adapter = exported(base, tmp_path, **options)
    before = logits(tiny.whole(base))
    seen: list[tuple[str, int, int]] = []
    assert merge(base, adapter, tmp_path / "merged-llama", lambda *event: seen.append(event)) == 3
    found, expected = (
        logits(tiny.whole(tmp_path / "merged-llama")),
        logits(peft.PeftModel.from_pretrained(tiny.whole(base), adapter)),
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert seen[-1][1] == seen[-1][2] == len(list(base.glob("*.safetensors")))


def test_untouched_tensors_and_files_keep_their_bytes(tmp_path: Path) -> None:
    base = tiny.make("qwen2", tmp_path, dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text("{}")
    merge(base, exported(base, tmp_path), tmp_path / "out")
    assert {p.name for p in base.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    changed = set()
    for shard in base.glob("*.safetensors"):
        old, new = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert {name: (t.dtype, t.shape) for name, t in old.items()} == {name: (t.dtype, t.shape) for name, t in new.items()}
        changed |= {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{n}.weight" for n in ("0.self_attn.q_proj", "3.mlp.down_proj", "3.mlp.up_proj")}


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make("llama", tmp_path)
    adapter = exported(base, tmp_path)
    out = tmp_path / "there" / "out"
    with pytest.raises(ConfigError, match="already exists"):
        merge(base, adapter, tmp_path)
    with pytest.raises(ConfigError, match=r"has no adapter_config.json"):
        merge(base, tmp_path, out)
    with pytest.raises(ModelError, match=r"A .* do not fit the base weight"):
        merge(tiny.make("llama", tmp_path / "wider", hidden_size=64), adapter, out)
    with pytest.raises(ModelError, match=r"has no weight 'model.layers.3"):
        merge(tiny.make("llama", tmp_path / "short", num_hidden_layers=2), adapter, out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (({"use_dora": True}, "use_dora is set"), ({"peft_type": "IA3"}, "only LORA")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=message):
            merge(base, adapter, out)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {}}))
    with pytest.raises(ModelError, match=r"has rank 7, adapter_config.json says 4"):
        merge(base, adapter, out)
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        merge(base, adapter, out)
    assert not list(out.parent.iterdir())
