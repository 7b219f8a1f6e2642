"""Frozen dataclasses of `common.types` <-> plain JSON values; strict, and without any class name in the data.

Enums become their values, tuples lists, arrays ``{"f32": base64 of little-endian bytes, "shape": […]}``.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import types
import typing
from enum import Enum
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A plain JSON value. Raises TypeError on a type that has no encoding."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value, "<f4").tobytes()
        return {"f32": base64.b64encode(raw).decode(), "shape": list(value.shape)}
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    raise TypeError(f"no JSON form for {type(value).__name__}")


def from_json(kind: type[T], value: Any) -> T:
    """The inverse of `to_json`. Raises ValueError naming the place of what does not fit."""
    return typing.cast(T, _decode(kind, value, kind.__name__))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return _decode(kind, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        if args[-1] is not Ellipsis and len(args) != len(items):
            raise ValueError(f"{where}: expected {len(args)} items, found {len(items)}")
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(_decode(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, items, strict=True)))
    if origin is np.ndarray:
        return _array(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise ValueError(f"{where}: {value!r} is not one of {[member.value for member in kind]}") from None
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not one of {list(args)}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind in (str, int, float, bool):
        return _expect(kind, value, where)
    raise TypeError(f"{where}: no JSON form for {kind}")


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    given = _expect(dict, value, where)
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(given) - names):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise ValueError(f"{where}: key {field.name!r} is missing")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in given.items()})


def _array(value: Any, where: str) -> Any:
    given = _expect(dict, value, where)
    try:
        raw, shape = base64.b64decode(given["f32"], validate=True), tuple(int(n) for n in given["shape"])
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise ValueError(f"{where}: not an array") from None
    if any(n < 0 for n in shape) or 4 * math.prod(shape) != len(raw):
        raise ValueError(f"{where}: {len(raw)} bytes do not fill shape {shape}")
    return np.frombuffer(raw, "<f4").reshape(shape).copy()
