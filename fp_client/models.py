"""From what a person wrote (a directory or a hub id) to a model directory. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import ModelError

NEEDED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""The only files ever fetched from a hub: no code, no pickled weights."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def resolve(source: str, cache: Path, revision: str | None = None) -> Path:
    """A local model directory for `source`, fetched into `cache` when it is a hub id.

    Raises ModelError when the directory is missing, or the hub can't be reached or has no such model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(source) or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such model directory (a hub id looks like owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"{source}: no such directory, and fetching a hub id needs the package `huggingface_hub`") from None
    try:
        found = snapshot_download(source, revision=revision, cache_dir=cache, allow_patterns=list(NEEDED))
    except Exception as error:  # the library raises many kinds: offline, not found, gated, disk full
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{source}: can't be fetched from the hub: {first}. It is no local directory either; "
            "check the name and the network, or give a directory"
        ) from None
    return Path(found)
