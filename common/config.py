"""Strict TOML configuration: an unknown key, a missing one or a wrong type is an error that names it."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class Section(BaseModel):
    """Base of every configuration section: frozen, no unknown keys, no silent conversions, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def parse(text: str, kind: type[S], source: str) -> S:
    """A configuration from TOML text. Raises ConfigError listing every wrong key with its place."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    # JSON mode: strict, yet a string is still a path or an enumeration member.
    return check(json.dumps(raw, default=str), kind, source)


def check(text: str, kind: type[S], source: str) -> S:
    """A configuration from JSON text. Raises ConfigError listing every wrong key with its place."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            place = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"{place}: unknown key{_meant(kind, problem['loc'])}")
            elif problem["type"] == "missing":
                lines.append(f"{place}: missing")
            else:
                lines.append(f"{place}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r:.80})")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _meant(kind: type[Section], place: Sequence[str | int]) -> str:
    """The key that an unknown one may be a slip of, as a question; empty where none is near."""
    *above, wrong = place
    sections = [kind]
    for part in above:  # a field, or what a dictionary or a list of sections calls one of them
        sections = [
            inner for section in sections for name, field in section.model_fields.items() if name == part
            for inner in _sections(field.annotation)
        ] or sections  # fmt: skip
    known = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(str(wrong), known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections in a field's type, also within a dictionary, a list or a choice."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections(inner)


def load(path: Path, kind: type[S]) -> S:
    """A configuration file. Raises ConfigError when it is missing or wrong."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    return parse(text, kind, str(path))
