"""Servers for the contract tests."""

from __future__ import annotations

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
