"""Servers for the contract tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_side import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running server with devices alice and bob; killed at the end whatever happens."""
    one = Server(tmp_path / "server")
    one.start()
    yield one
    if one.process is not None:
        one.kill()


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """A command that ran in this process leaves its handler, whose stream is closed by then: a later test would hear of it."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if handler not in before and type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
