"""A Hugging Face checkpoint directory seen without torch: shards, shapes, fingerprint, manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import ModelError, UnknownFamilyError
from common.faults import fault
from common.tensorfile import TensorFile, TensorInfo
from common.types import ModelManifest, ModuleShape

logger = logging.getLogger(__name__)

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "smollm3", "olmo2"})
"""`model_type` values this project streams."""

MAX_MANIFEST = 1 << 20
"""Characters a manifest may have."""
MAX_LAYERS = 4096
"""More layers, or modules of a layer, than any model has."""

LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.+)")
EMBEDDING_KEY, NORM_KEY, HEAD_KEY = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Checkpoint:
    """The tensors of a model directory, sharded or not, opened lazily and read by offset."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError naming the missing or damaged file, UnknownFamilyError naming the family."""
        self.directory = directory
        config_path = directory / "config.json"
        if not directory.is_dir():
            raise ModelError(f"{directory}: no such model directory")
        try:
            self.config: dict[str, Any] = json.loads(config_path.read_text())
        except FileNotFoundError:
            raise ModelError(f"{directory}: has no config.json; is it a Hugging Face model directory?") from None
        except (ValueError, OSError) as error:
            raise ModelError(f"{config_path}: unreadable: {error}") from None
        self.family = str(self.config.get("model_type", "(none)"))
        if self.family not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            hint = "; of gemma3 the text-only checkpoints (gemma3_text) are supported" if self.family == "gemma3" else ""
            raise UnknownFamilyError(f"{config_path}: model family {self.family!r} is not supported (supported: {known}){hint}")
        self._files: dict[str, TensorFile] = {}
        self._where = self._index()

    def _index(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            if not (self.directory / "model.safetensors").exists():
                raise ModelError(f"{self.directory}: has neither model.safetensors nor model.safetensors.index.json")
            return dict.fromkeys(self._file("model.safetensors").tensors, "model.safetensors")
        try:
            where = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: unreadable ({type(error).__name__})") from None
        for shard in sorted(set(where.values())):
            if "/" in shard or not (self.directory / shard).exists():
                raise ModelError(f"{self.directory / shard}: shard is missing (named by {index.name})")
        for name, shard in where.items():
            if name not in self._file(shard).tensors:
                raise ModelError(f"{self.directory / shard}: has no tensor {name!r}, but {index.name} says so")
        return where

    def _file(self, shard: str) -> TensorFile:
        if shard not in self._files:
            self._files[shard] = TensorFile(self.directory / shard)
        return self._files[shard]

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def file(self, name: str) -> TensorFile:
        """The open file that holds a tensor. Raises ModelError when none does."""
        if name not in self._where:
            raise ModelError(f"{self.directory}: checkpoint has no tensor {name!r}")
        return self._file(self._where[name])

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self.file(name).info(name)

    @property
    def layers(self) -> int:
        """The number of decoder layers, from config.json; every one must be in the checkpoint."""
        count = self.config.get("num_hidden_layers")
        if type(count) is not int or count < 1:
            raise ModelError(f"{self.directory / 'config.json'}: num_hidden_layers is {count!r}")
        return count

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return HEAD_KEY not in self._where

    def modules(self) -> tuple[ModuleShape, ...]:
        """The linear modules of a layer. Raises ModelError when a layer is missing or differs from the first."""
        layers: dict[int, dict[str, tuple[int, ...]]] = {}
        for name in self._where:
            if (match := LAYER_KEY.fullmatch(name)) and name.endswith(".weight"):
                shape = self.info(name).shape
                if len(shape) == 2:
                    layers.setdefault(int(match[1]), {})[match[2].removesuffix(".weight")] = shape
        for index in range(self.layers):
            if layers.get(index) != layers.get(0) or not layers.get(index):
                raise ModelError(f"{self.directory}: layer {index + 1} is missing or has other shapes than layer 1")
        return tuple(ModuleShape(name, shape[0], shape[1]) for name, shape in sorted(layers[0].items()))

    def fingerprint(self, progress: Callable[[int, int], None] | None = None) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes, in name order; sharding does not matter."""
        whole = hashlib.sha256()
        total, done = sum(self.info(name).size for name in self.names), 0
        for name in self.names:
            info, one = self.info(name), hashlib.sha256()
            for chunk in self.file(name).chunks(name, 4 << 20):
                one.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            whole.update(f"{name}\0{info.dtype}\0{info.shape}\0{one.hexdigest()}\n".encode())
        return whole.hexdigest()

    def stamp(self) -> str:
        """A cheap key of the files' names, sizes and times: equal stamps mean the fingerprint still holds."""
        parts = []
        for shard in sorted(set(self._where.values())):
            stat = (self.directory / shard).stat()
            parts.append(f"{shard}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}")
        return hashlib.sha256("\n".join([str(self.directory.resolve()), *parts]).encode()).hexdigest()

    def manifest(self, name: str, fingerprint: str) -> ModelManifest:
        """What a server needs to know of this model."""
        embedding = self.info(EMBEDDING_KEY)
        return ModelManifest(name, self.family, self.layers, embedding.shape[1], embedding.shape[0], self.modules(), fingerprint)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def cached_fingerprint(checkpoint: Checkpoint, cache: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """The fingerprint, remembered in `cache` by the files' stamp so that a restart does not read all weights.

    Where it can't be remembered (a full disk), the next start reads them again.
    """
    path = cache / f"fingerprint-{checkpoint.stamp()[:32]}"
    if path.exists() and len(text := path.read_text().strip()) == 64:
        return text
    fingerprint = checkpoint.fingerprint(progress)
    temporary = path.with_suffix(".tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_text(fingerprint + "\n")
        fault("common.fingerprint.written")
        temporary.replace(path)
    except OSError as error:
        logger.warning("%s can't be written, so the weights are read again at the next start: %s", path, error.strerror)
    return fingerprint


def dump_manifest(manifest: ModelManifest) -> str:
    """The manifest as JSON text."""
    return json.dumps(asdict(manifest), indent=1) + "\n"


def manifest_from_json(text: str, source: str) -> ModelManifest:
    """Raises ModelError when the text is not a manifest."""
    if len(text) > MAX_MANIFEST:
        raise ModelError(f"{source}: a manifest of {len(text)} characters; no model's has more than {MAX_MANIFEST}")
    try:
        raw = json.loads(text)
        modules = tuple(ModuleShape(str(m["name"]), int(m["d_out"]), int(m["d_in"])) for m in raw["modules"])
        manifest = ModelManifest(
            str(raw["name"]), str(raw["family"]), int(raw["layers"]), int(raw["hidden"]), int(raw["vocab"]),
            modules, str(raw["fingerprint"]),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(f"{source}: not a model manifest ({type(error).__name__}: {error})") from None
    sizes = (manifest.hidden, manifest.vocab, *(n for m in modules for n in (m.d_out, m.d_in)))
    if manifest.layers > MAX_LAYERS or len(modules) > MAX_LAYERS or any(not 0 < size < 2**31 for size in sizes):
        raise ModelError(f"{source}: not a model manifest (layers, modules or sizes no model has)")
    if max(map(len, (manifest.name, manifest.family, *(m.name for m in modules))), default=0) > 200:
        raise ModelError(f"{source}: not a model manifest (a name of more than 200 characters)")
    if not modules or manifest.layers < 1 or re.fullmatch("[0-9a-f]{64}", manifest.fingerprint) is None:
        raise ModelError(f"{source}: not a model manifest (no modules, layers or fingerprint)")
    return manifest


def load_manifest(path: Path) -> ModelManifest:
    """A manifest file. Raises ModelError when it is missing or no manifest."""
    try:
        return manifest_from_json(path.read_text(), str(path))
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}; make one with `fp-client manifest`") from None
