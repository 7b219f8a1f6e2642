"""What gRPC says of calls whose peer is gone stays out of the log; other errors don't."""

from __future__ import annotations

import logging

import grpc.aio
import pytest

from fp_server import broken_calls


@pytest.fixture
def said(caplog):
    theirs = logging.getLogger("grpc._cython.cygrpc")
    broken_calls.install()
    broken_calls.install()
    assert theirs.filters.count(broken_calls._of_the_server) == 1
    yield theirs
    theirs.removeFilter(broken_calls._of_the_server)


def failing(logger, error):
    try:
        raise error
    except Exception:
        logger.exception("raised by servicer method [/x]")


def test_a_write_to_who_is_gone_is_no_error(said, caplog):
    caplog.set_level(logging.DEBUG, "fp_server")
    failing(said, grpc.aio.InternalError('Failed "execute_batch"'))
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("DEBUG", None)]
    assert "a call broke off: raised by servicer method [/x]" in caplog.text


@pytest.mark.parametrize("error", [ValueError("ours"), grpc.aio.UsageError("RPC already finished.")])
def test_other_errors_are_told_with_their_trace(said, caplog, error):
    failing(said, error)
    said.warning("no exception")
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"] and "Traceback" in caplog.text
