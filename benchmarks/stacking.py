"""Stacking 100 holders of rank 16 on a 576×1536 module: median time, and peak memory beside the holders' blocks.

    python benchmarks/stacking.py [repeats]

The holders are read from files, as the server does; the sum is dense (1,600 ≥ 576). The recompression to
rank 64 that makes the broadcast is timed beside it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from common.blocks import write_blocks
from common.types import LoraBlock, ModelManifest, ModuleShape
from fp_server.ledger import Contribution, aggregate_layer, broadcast_layer

HOLDERS, RANK, SHAPE, BROADCAST = 100, 16, (576, 1536), 64
NAME = "mlp.down_proj"
MANIFEST = ModelManifest("bench", "llama", 1, 576, 2, (ModuleShape(NAME, *SHAPE),), "0" * 64)


def main() -> None:
    """Print the figures."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    rng = np.random.default_rng(0)
    d_out, d_in = SHAPE
    dense = d_out * d_in * 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = []
        for index in range(HOLDERS):
            path = folder / f"update-{index}"
            a, b = rng.standard_normal((RANK, d_in), np.float32), rng.standard_normal((d_out, RANK), np.float32)
            write_blocks(path, [LoraBlock(0, NAME, a, b)])
            parts.append(Contribution(f"d{index:03}", 1 / HOLDERS, 2.0, RANK, path))

        def aggregate(previous: Path | None, out: Path) -> None:
            aggregate_layer(0, MANIFEST, {NAME: parts}, previous, out)

        def broadcast(_: Path | None, out: Path) -> None:
            broadcast_layer(folder / "first", 0, MANIFEST, BROADCAST, out)

        aggregate(None, folder / "first")
        print(f"{HOLDERS} holders of rank {RANK} on {d_out}x{d_in} (dense float32: {dense / 1e6:.2f} MB), {repeats} repeats")
        cases = (("stack, empty ledger", aggregate, None), ("stack, dense ledger", aggregate, folder / "first"))
        for title, work, previous in (*cases, (f"broadcast, rank {BROADCAST}", broadcast, None)):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                work(previous, folder / "out")
                seconds.append(time.perf_counter() - start)
            tracemalloc.start()
            work(previous, folder / "out")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            print(f"{title:22} median {statistics.median(seconds):.3f} s   peak {peak / 1e6:.2f} MB = {peak / dense:.2f} x dense")


if __name__ == "__main__":
    main()
