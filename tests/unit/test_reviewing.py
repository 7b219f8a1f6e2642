"""A round's updates read from the store and compared: the figures are those of the dense products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_components import GIVEN, RANK, Run, units

from common.blocks import read_block
from common.errors import TooLate
from common.tensorfile import TensorFile
from common.types import LoraBlock, TaskKey
from fp_server import reviewing
from fp_server.outliers import Shared, judge
from fp_server.reviewing import review_round

Made = dict[str, list[LoraBlock]]


def dense(blocks: Made, starts: dict[tuple[int, str], np.ndarray]) -> dict[str, dict[tuple[int, str], np.ndarray]]:
    """Device -> module -> 3·B·A less its start. α/r = 3."""
    return {
        device: {(b.layer, b.module): 3.0 * b.b.astype(float) @ b.a - starts.get((b.layer, b.module), 0.0) for b in made}
        for device, made in blocks.items()
    }


def twin(blocks: Made, starts: dict[tuple[int, str], np.ndarray]) -> list[Shared]:
    products = dense(blocks, starts)
    found = []
    for module in sorted({module for mine in products.values() for module in mine}):
        holders = [device for device in sorted(products) if module in products[device]]
        flat = np.array([products[device][module].ravel() for device in holders])
        found.append(Shared(module[1], tuple(holders), flat @ flat.T))
    return found


def same(found: object, expected: object) -> bool:
    return found is None if expected is None else found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("start", ["fresh", "global"])
def test_the_figures_are_those_of_what_each_device_did(tmp_path: Path, start: str) -> None:
    run = Run(tmp_path, start=start)
    blocks = run.train(GIVEN)
    starts: dict[tuple[int, str], np.ndarray] = {}
    if start == "global":  # the second round: everybody continues what the first one left
        run.commit()
        for layer, ref in run.machine.broadcast.items():
            with TensorFile(run.store.path(ref.digest)) as file:
                for module in {name.split(".", 2)[2].rsplit(".lora_", 1)[0] for name in file.tensors}:
                    block = read_block(file, layer, module)
                    starts[layer, module] = block.b[:, :RANK].astype(float) @ block.a[:RANK]
        blocks = run.train(GIVEN)
        assert starts
    event = review_round(run.machine, run.store, run.key)
    scores, outliers = judge(twin(blocks, starts), 5.0, 2.0)
    assert event.outliers == outliers and event.reject and set(event.scores) == set("abc")
    for device, score in scores.items():
        mine = event.scores[device]
        assert (mine.others, mine.against) == (score.others, score.against)
        assert same(mine.agreement, score.agreement) and same(mine.size, score.size)
    assert event == review_round(run.machine, run.store, run.key), "the same state gives the same event"


def test_many_updates_are_compared_in_panels_that_nobody_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviewing, "PANEL", 2)
    run = Run(tmp_path)
    run.train(dict.fromkeys("abc", units("1M", "2N")))
    scores = review_round(run.machine, run.store, run.key).scores
    assert set(scores) == set("abc") and sorted(score.others for score in scores.values()) == [0, 1, 1]


def test_a_run_that_was_stopped_meanwhile(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(GIVEN)
    with pytest.raises(TooLate):
        review_round(run.machine, run.store, TaskKey("r", 7, 0))
