"""Check that common/pb is what proto/ generates, or write it (`--write`)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> None:
    """Generate into `out`/common/pb."""
    names = sorted(p.name for p in (ROOT / "proto").glob("*.proto"))
    arguments = ["protoc", f"-Icommon/pb={ROOT / 'proto'}"]
    arguments += [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out", "mypy_grpc_out")]
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    arguments += [f"--plugin=protoc-gen-mypy_grpc={plugin}", *(f"common/pb/{name}" for name in names)]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")


def main() -> None:
    """Compare or write."""
    if "--write" in sys.argv:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {p.name: p.read_text() for p in (Path(scratch) / "common/pb").iterdir()}
    committed = {p.name: p.read_text() for p in (ROOT / "common/pb").glob("*_pb2*")}
    wrong = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if wrong:
        sys.exit(f"common/pb differs from proto/ in {', '.join(wrong)}; run `make proto` and commit")
    print(f"proto: {len(fresh)} generated files match")


if __name__ == "__main__":
    main()
