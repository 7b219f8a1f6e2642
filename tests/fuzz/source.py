"""From bytes to choices: the same bytes make the same case, whichever engine has made the bytes."""

from __future__ import annotations

import contextlib
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

TEXTS = (
    "", "a", "toy", "toy-run", "run-1", "run-2", "../x", "/etc/passwd", "a\0b", "аlice", "a\nb", "A", "x" * 63, "x" * 64,
    "x" * 600, "backprop",
    "submodel", "stitched", "streamed", "auto", "fresh", "global", "both", "A", "B", "linear", "rbf", "clean", "raw",
    "0" * 64, "ab" * 32, "fetch", "train", "push", "probe", "WorkerError", "NoSuchError", "self_attn.q_proj", "{", "[" * 50,
)  # fmt: skip
INTEGERS = (0, 1, 2, 3, 5, 6, 7, 63, 64, 4095, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -1)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1.01, 2.0, 1e-300, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))


class Source:
    """Choices from bytes; when they are used up every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self._data) - self._at

    def byte(self) -> int:
        """The next byte, or 0."""
        if self.left <= 0:
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        return self.byte() % count if count > 1 else 0

    def of(self, items: Any) -> Any:
        """One of a sequence."""
        return items[self.below(len(items))]

    def bytes(self, most: int) -> bytes:
        """Up to `most` bytes as they are."""
        size = min(self.byte() % (most + 1), self.left)
        self._at += size
        return self._data[self._at - size : self._at]


def mutate(message: Message, source: Source, times: int = 2) -> None:
    """Change fields of a protobuf message, at any depth, to values at the edge of what they may hold, or beyond."""
    for _ in range(times if message.DESCRIPTOR.fields else 0):
        _mutate_field(message, source.of(message.DESCRIPTOR.fields), source)


def _mutate_field(message: Message, field: FieldDescriptor, source: Source) -> None:
    what = source.below(4)
    if what == 0:
        message.ClearField(field.name)
    elif field.is_repeated:
        items = getattr(message, field.name)
        count = source.of((1, 2, 7, 40))
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if items and what == 1:
                mutate(items[source.below(len(items))], source, 1)
                return
            for _ in range(count):
                copy = items.add()
                if len(items) > 1:
                    copy.CopyFrom(items[0])
                mutate(copy, source, 1)
        else:
            _try(lambda: items.extend([_value(field, source)] * count))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        mutate(getattr(message, field.name), source, 1)
    else:
        _try(lambda: setattr(message, field.name, _value(field, source)))


def _value(field: FieldDescriptor, source: Source) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return source.of(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return source.bytes(64)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return source.of(FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return bool(source.below(2))
    return source.of(INTEGERS)


def _try(change: Any) -> None:
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # nor could the wire carry it
        change()


def _odd(source: Source) -> Any:
    return source.of((None, True, [], {}, "x", source.of(TEXTS), source.of(INTEGERS), source.of(FLOATS), [1, "a"], {"a": 1}))


def changed(value: Any, source: Source) -> Any:
    """A JSON value with something in it, at any depth, another or gone."""
    if not value or not isinstance(value, (dict, list)) or source.below(4) == 0:
        return _odd(source)
    key = source.of(list(value) if isinstance(value, dict) else range(len(value)))
    out: Any = dict(value) if isinstance(value, dict) else list(value)
    if source.below(8) == 1:
        del out[key]
    else:
        out[key] = changed(out[key], source)
    return out
