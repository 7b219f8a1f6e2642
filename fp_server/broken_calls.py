"""Calls whose peer is gone, kept out of the log.

A write, a reply or a status may fail before gRPC has heard that the connection is closed; then it logs its own error with a
traceback. Where it hears of it first it cancels the call without a word. Neither is a fault of this server's.
"""

from __future__ import annotations

import logging

import grpc.aio

logger = logging.getLogger("fp_server")


def _of_the_server(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, grpc.aio.InternalError):
        return True
    logger.debug("a call broke off: %s", record.getMessage())
    return False


def install() -> None:
    """Filter what gRPC's own logger says; once is enough, and twice does no harm."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_of_the_server)
