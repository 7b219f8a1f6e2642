"""The shelf between two visits of a layer."""

from __future__ import annotations

from pathlib import Path

import torch

from fp_client.spill import Spill


def test_the_file_begins_anew_when_nothing_is_in_it(tmp_path: Path) -> None:
    """Rows have another length each step: without it the file would grow by a step's activations every step."""
    with Spill(0, tmp_path) as shelf:
        largest = 0
        for step in range(8):
            rows = [torch.full((2, 50 + 7 * step - 3 * j, 4), float(10 * step + j)) for j in range(4)]
            for j, row in enumerate(rows):
                shelf.put(j, row)
            largest = max(largest, sum(4 * row.numel() for row in rows))
            assert shelf.spilled <= largest
            for j in (2, 0, 3, 1):
                assert torch.equal(shelf.take(j), rows[j])
        assert shelf.spilled == 0


def test_a_place_serves_again_while_others_are_taken(tmp_path: Path) -> None:
    with Spill(0, tmp_path) as shelf:
        for key in range(3):
            shelf.put(key, torch.full((10,), float(key)))
        shelf.take(1)
        shelf.put("new", torch.full((10,), 7.0))
        assert shelf.spilled == 3 * 40
        assert [float(shelf.get(key)[0]) for key in (0, 2, "new")] == [0.0, 2.0, 7.0]
