"""The device's configuration, ``client.toml`` in the device directory. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from common.config import Section, load
from common.errors import ConfigError
from common.types import Quantization

FILE = "client.toml"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bytes(value: Any) -> int:
    """Bytes from an integer or a text with a suffix: ``"800MiB"``, ``"3GB"``, ``"1.5 GiB"``. Raises ValueError."""
    if type(value) is int and value >= 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip()) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError('not a size; write bytes or a suffix, for example "800MiB" or "3GB"')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def human(size: float) -> str:
    """A size for people: ``"812 MiB"``, ``"2.94 GiB"``."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}" if unit == "GiB" else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class BudgetSection(Section):
    """What a task may hold above the warmed worker, in bytes."""

    host: Bytes = 0
    """Main memory. On CPU the two are one; the smaller one that is set counts."""
    device: Bytes = 0
    """VRAM on CUDA."""


class ModelSection(Section):
    """Where the weights of one model come from."""

    source: str
    """A local directory (relative to the device directory), or a hub id."""
    quantization: Quantization = Quantization.NONE


class DataSection(Section):
    """The device's own data and its held-out split."""

    source: str
    """A .json or .jsonl file in Alpaca form (relative to the device directory), or a `datasets` id."""
    split: str = "train"
    held_out: float = Field(default=0.05, gt=0, lt=1)
    max_held_out: int = Field(default=64, ge=1)
    on_long: Literal["error", "drop"] = "error"


class CacheSection(Section):
    """Where adapter objects, fingerprints and quantized units are kept."""

    dir: str = "cache"
    max_size: Bytes = 2 << 30
    """Bound of the adapter objects kept, in bytes; the least recently used go first."""
    max_spill: Bytes = 0
    """The most that activations may take on disk while a task runs, in bytes; 0: no bound. Planned with."""


class RetrySection(Section):
    """How long an unreachable server is waited for before the daemon gives up (exit 7)."""

    attempts: int = Field(default=120, ge=1)
    first_seconds: float = Field(default=0.5, gt=0)
    longest_seconds: float = Field(default=30.0, gt=0)


class ClientConfig(Section):
    """All of ``client.toml``."""

    server: str = ""
    """host:port of the server; written by `join`."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    threads: int = Field(default=1, ge=1)
    """Threads of a task; pinned, because sums depend on it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What unquantized weights are computed in."""
    worker_idle_seconds: float = Field(default=300.0, ge=0)
    """How long a warm worker is kept without a task."""
    grace_seconds: float = Field(default=8.0, ge=1)
    """The daemon ends so soon after SIGTERM, whatever it reads or fetches then."""
    budget: BudgetSection = BudgetSection()
    models: dict[str, ModelSection] = Field(default_factory=dict)
    data: DataSection | None = None
    cache: CacheSection = CacheSection()
    retry: RetrySection = RetrySection()


def load_config(directory: Path) -> ClientConfig:
    """``client.toml`` of a device directory. Raises ConfigError naming file and key."""
    if not (directory / FILE).exists():
        raise ConfigError(f"{directory / FILE}: no such file; run `fp-client join TOKEN --dir {directory}` first")
    return load(directory / FILE, ClientConfig)


def need_server(config: ClientConfig, directory: Path) -> str:
    """The server's address. Raises ConfigError when `join` has not written it."""
    if not re.fullmatch(r"[^\s/]+:\d{1,5}", config.server):
        raise ConfigError(
            f"{directory / FILE}: server: {config.server!r} is not host:port; run `fp-client join TOKEN --dir {directory}` first"
        )
    return config.server


def need_data(config: ClientConfig, directory: Path) -> DataSection:
    """The [data] section, paths made absolute. Raises ConfigError when there is none."""
    if config.data is None:
        raise ConfigError(f'{directory / FILE}: section [data] is missing; add [data] with source = "my-data.jsonl"')
    return config.data.model_copy(update={"source": resolve(config.data.source, directory)})


def need_model(config: ClientConfig, name: str, directory: Path) -> ModelSection:
    """The section of a model, paths made absolute. Raises ConfigError when there is none."""
    if name not in config.models:
        known = ", ".join(sorted(config.models)) or "none"
        raise ConfigError(f'{directory / FILE}: no model {name!r} here (has: {known}); add [models."{name}"] with source = "DIR"')
    section = config.models[name]
    return section.model_copy(update={"source": resolve(section.source, directory)})


def resolve(source: str, directory: Path) -> str:
    """A path relative to the device directory made absolute; a hub id stays as it is."""
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or path.suffix in (".json", ".jsonl")
    if looks_local or (directory / path).exists():
        return str((directory / path).resolve())
    return source


def cache_dir(config: ClientConfig, directory: Path) -> Path:
    """The cache directory, absolute."""
    return (directory / Path(config.cache.dir).expanduser()).resolve()


EXAMPLE = """\
# A FedPruner device. Sizes are bytes or "800MiB", "3GB". Every key is in docs/join-a-device.md.
server = {server}

device = "auto"              # "cpu", "cuda", or "auto": CUDA where there is one
threads = 1                  # threads of a task; changing it changes the last bits of results
dtype = "float32"            # or "bfloat16"
worker_idle_seconds = 300    # a warm worker without a task is released after this

[budget]                     # what a task may hold above its warmed process; `fp-client plan` shows what fits
host = "1GiB"                # main memory
# device = "3GB"             # VRAM, on CUDA

# [models."smollm2-135m"]    # the name as in the operator's run file
# source = "models/SmolLM2-135M-Instruct"    # a directory here, or a hub id
# quantization = "none"      # or "nf4"

# [data]
# source = "data.jsonl"      # Alpaca form: instruction, input, output; or a `datasets` id
# held_out = 0.05            # never trained on
# max_held_out = 64          # rows
# on_long = "error"          # or "drop": responses longer than the window

[cache]
dir = "cache"
max_size = "2GiB"            # adapter objects kept

[retry]                      # an unreachable server: give up after this many tries (exit 7)
attempts = 120
longest_seconds = 30.0
"""
