"""Print what pyproject.toml asks for, one requirement a line: `python requirements.py PYPROJECT [EXTRA…]`.

The images install these first, pinned by constraints.txt, so that a change of the source needs no new download.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """The project's dependencies and those of the extras named."""
    file, *extras = sys.argv[1:]
    project = tomllib.loads(Path(file).read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    print(*wanted, sep="\n")


if __name__ == "__main__":
    main()
