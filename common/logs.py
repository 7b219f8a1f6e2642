"""How a daemon's log looks, on both sides."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(message)s"
"""Local date and time with milliseconds, the level's name, the message."""


class OneLine(logging.Formatter):
    """A message is one line, whatever the other side has written into it: it must not be able to forge other lines."""

    def __init__(self, form: str = FORMAT) -> None:
        super().__init__(form)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The record in its form, control characters escaped."""
        message = record.message
        if not message.isprintable():
            record.message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        return super().formatMessage(record)
