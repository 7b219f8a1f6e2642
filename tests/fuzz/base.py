"""What all targets have in common: valid values to begin from, and messages and files made of bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from server_side import MANIFEST, blocks_of, run_toml

from common import config as configuration
from common import types
from common.blocks import write_blocks
from fp_server import events as e
from fp_server.config import RunConfig
from fuzz.source import Source, mutate


@dataclass(frozen=True)
class Target:
    """What is fuzzed: `run` raises whatever is a finding; `seeds` are valid inputs to begin from."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    longest: int = 4096


def shared_memory(prefix: str) -> Path:
    """A temporary directory, in memory where there is such a place."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


KEY = types.TaskKey("toy-run", 0, 0)
CONFIG = configuration.parse(run_toml(), RunConfig, "seed")
SPEC = CONFIG.run_spec(MANIFEST)
REF = types.ObjectRef("ab" * 32, 1000)
PROBE = types.ProbeTask(KEY, CONFIG.probe_spec(1), (types.UnitObject(0, REF),))
UNITS = tuple(types.UnitId(n) for n in (0, 2, 5))
ASSIGNMENT = types.Assignment(
    KEY,
    UNITS,
    tuple((u,) for u in UNITS),
    ((1.0,),) * 3,
    # The mode that `plan_report` offers: a device refuses a task that says "auto", as the run does.
    replace(CONFIG.train_spec(MANIFEST, 1e-4, 7), gradient=types.Gradient.SUBMODEL),
    (types.UnitObject(2, REF),),
    1,
    True,
)
METRICS = types.UpdateMetrics(3.0, 2.5, 100.0, 1 << 20, 1 << 20, 1.5, 0.75, 0.5, 0.25, (0.1, 0.2))


def message_of(kind: type[Message], seeds: list[Any], data: bytes) -> Any:
    """A message: an even first byte takes the rest as it is, an odd one mutates a valid one. None: no protobuf at all."""
    if not data or data[0] % 2 == 0:
        try:
            return kind.FromString(data[1:])
        except DecodeError:
            return None
    source = Source(data[1:])
    message = kind()
    message.CopyFrom(source.of(seeds))
    mutate(message, source, 1 + source.below(4))
    return message


def next_message(seeds: list[Any], source: Source) -> Any:
    """One of several messages of a case: a valid one as it is, or one of the next bytes, which may be None."""
    if source.below(2) == 0:
        return source.of(seeds)
    return message_of(type(seeds[0]), seeds, source.bytes(250))


def as_seeds(seeds: list[Any]) -> list[bytes]:
    return [b"\0" + one.SerializeToString() for one in seeds] + [bytes((1, n, 0, n, 1, n)) for n in range(len(seeds))]


def read_back(event: Any) -> None:
    """An event is kept for ever: what the log is given it must give back."""
    again = e.decode(*e.encode(event))
    assert e.encode(again) == e.encode(event), "the log gives back something else"


@cache
def valid_update() -> bytes:
    directory = shared_memory("fuzz-")
    try:
        write_blocks(directory / "update", blocks_of(ASSIGNMENT, "alice"))
        return (directory / "update").read_bytes()
    finally:
        shutil.rmtree(directory)


def patched(data: bytes, valid: bytes) -> bytes:
    """An even first byte: the rest as it is. An odd one: the valid file with bytes overwritten, cut or added."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    source, out = Source(data[1:]), bytearray(valid)
    for _ in range(1 + source.below(6)):
        at = min(len(out), source.byte() << 8 | source.byte())
        match source.below(4):
            case 0:
                piece = source.bytes(8)
                out[at : at + len(piece)] = piece
            case 1:
                del out[at : at + source.byte()]
            case 2:
                out[at:at] = source.bytes(8)
            case 3:
                out[at:at] = out[at : at + source.byte()]
    return bytes(out)


class File:
    """Bytes as an open file with a name."""

    def __init__(self, data: bytes) -> None:
        self.fd, self.size = os.memfd_create("fuzz"), len(data)
        os.write(self.fd, data)
        self.path = Path(f"/proc/self/fd/{self.fd}")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)
