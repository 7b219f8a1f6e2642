"""Every family streams: built on meta, one layer at a time, bit-equal to the model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common import checkpoint as common_checkpoint
from common.checkpoint import Checkpoint
from common.errors import ModelError, UnknownFamilyError
from fp_client.families import FAMILIES, family_of
from fp_client.loader import UnitLoader, build_meta
from tests.unit import tiny


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_filled_one_at_a_time_give_the_logits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make(family, tmp_path))
    assert len(list(checkpoint.directory.glob("*.safetensors"))) > 1
    loader = UnitLoader(checkpoint)
    model = loader.model()
    for index, layer in enumerate(loader.layers(model)):
        loader.materialise(layer, index)
    rows, twin = tiny.batch(), tiny.whole(checkpoint.directory)
    with torch.no_grad():
        states = model.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        expected = twin.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
    assert torch.equal(states, expected)
    assert torch.equal(loader.head(), twin.lm_head.weight)
    chunks = list(loader.head_chunks(100))
    assert [first for first, _ in chunks] == [0, 100, 200, 300]
    assert torch.equal(torch.cat([part for _, part in chunks]), loader.head())


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "gemma3_text"])
def test_layers_of_one_model_differ_by_their_index(family: str, tmp_path: Path) -> None:
    """The tiny models would not notice a layer at a wrong index if all layers attended alike."""
    config = tiny.whole(tiny.make(family, tmp_path)).config
    assert len(set(config.layer_types)) == 2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_meta_model_holds_no_weights_and_release_returns_to_that(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.make(family, tmp_path))
    assert all(p.is_meta for p in build_meta(checkpoint).parameters())
    loader = UnitLoader(checkpoint)
    layer = loader.layers(loader.model())[2]
    loader.materialise(layer, 2)
    assert not any(p.is_meta for p in layer.parameters())
    loader.release(layer)
    assert all(p.is_meta for p in layer.parameters())


def test_every_streamed_family_is_in_the_shared_list() -> None:
    assert set(FAMILIES) == common_checkpoint.FAMILIES


def test_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnknownFamilyError, match="'mamba' is not supported"):
        Checkpoint(directory)
    with pytest.raises(UnknownFamilyError, match="'mamba' is not supported"):
        family_of("mamba")
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    with pytest.raises(UnknownFamilyError, match="text-only checkpoints \\(gemma3_text\\) are supported"):
        Checkpoint(directory)
    with pytest.raises(UnknownFamilyError, match="image-and-text"):
        family_of("gemma3")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    loader = UnitLoader(Checkpoint(directory))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\..* has shape .*, config.json asks for"):
        loader.materialise(loader.layers(loader.model())[0], 0)


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    loader = UnitLoader(Checkpoint(tiny.make("llama", tmp_path)))
    with pytest.raises(ModelError, match="token id 5000"):
        loader.model().model.embed_tokens(torch.tensor([[1, 5000]]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_are_cast_on_arrival(stored: torch.dtype, tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path, dtype=stored)
    loader = UnitLoader(Checkpoint(directory), dtype=torch.float32)
    twin = tiny.whole(directory)
    layer = loader.layers(loader.model())[1]
    loader.materialise(layer, 1)
    for (name, ours), (_, theirs) in zip(layer.named_parameters(), twin.model.layers[1].named_parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        assert torch.equal(ours, theirs), name
