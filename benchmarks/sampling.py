"""What the sampled positions do to the groups: FDLO on a device's own probes, clean and raw.

fp-client probe --dir DEV --sample clean --out clean.json
fp-client probe --dir DEV --sample raw --out raw.json
python benchmarks/sampling.py clean.json raw.json --units 12
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fp_server.pruning.grouping import Eigenvectors, group


def span(members: tuple[int, ...]) -> str:
    """A group, 1-based, for people."""
    first, last = members[0] + 1, members[-1] + 1
    if len(members) == 1:
        return str(first)
    return f"{first}-{last}" if members == tuple(range(members[0], members[-1] + 1)) else ",".join(str(m + 1) for m in members)


def main() -> None:
    """One line a file and number of eigenvectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--units", type=int, default=12)
    given = parser.parse_args()
    options: tuple[Eigenvectors, ...] = ("k", "k-1")
    for file in given.files:
        similarity = np.array(json.loads(file.read_text())["similarity"])
        late = similarity[11:-1, 11:-1].min()
        print(f"{file.name}: smallest CKA {similarity.min():.3f}, from layer 12 to the last but one {late:.3f}")
        for eigenvectors in options:
            groups = group(similarity, given.units, np.random.default_rng(0), eigenvectors)
            print(f"  {eigenvectors:>3} eigenvectors: {' | '.join(span(members) for members in groups)}")


if __name__ == "__main__":
    main()
