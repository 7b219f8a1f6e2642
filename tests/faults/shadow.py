"""The storage fake: what is left of a data directory when the power goes, and nothing but what was synced is on the disk.

`shadow.c`, loaded before everything else, notes each fsync of SQLite and of Python alike. `lose` then makes the directory what a
disk that dropped all other writes and renames would hold; or, with a generator, one that kept some of them, as disks do.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shadow.c")


def compiler() -> str | None:
    """A C compiler, or None."""
    return shutil.which(os.environ.get("CC", "cc"))


def build(directory: Path) -> Path:
    """The library, built when it is missing or older than its source."""
    library = directory / "shadow.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        directory.mkdir(parents=True, exist_ok=True)
        command = [compiler() or "cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
    return library


def environment(root: Path, shadow: Path) -> dict[str, str]:
    """What makes a process (that has the library) note its syncs below `root` in `shadow`."""
    return {"FP_SHADOW_ROOT": str(root), "FP_SHADOW_DIR": str(shadow)}


def begin(root: Path, shadow: Path) -> None:
    """All that is below `root` now is on the disk."""
    shutil.rmtree(shadow, ignore_errors=True)
    shadow.mkdir(parents=True)
    for path, directories, files in os.walk(root):
        here = Path(path)
        lines = []
        for name in [*directories, *files]:
            about = (here / name).lstat()
            lines.append(f"{about.st_ino} {'d' if name in directories else 'f'} {name}\n")
            if name in files:
                shutil.copyfile(here / name, shadow / f"f.{about.st_ino}")
                os.link(here / name, shadow / f"pin.{about.st_ino}")
        (shadow / f"d.{here.stat().st_ino}").write_text("".join(lines))


def lose(root: Path, shadow: Path, rng: random.Random | None = None) -> None:
    """The power goes: rebuild `root` from what was synced. Without `rng` nothing else survives; with it, each unsynced change
    of a directory or file by chance. The process that wrote there is dead."""
    left = root.with_name(root.name + ".left")
    shutil.rmtree(left, ignore_errors=True)
    _rebuild(root, root.stat().st_ino, left, shadow, rng)
    shutil.rmtree(root)
    left.rename(root)
    begin(root, shadow)


def _rebuild(real: Path | None, inode: int, out: Path, shadow: Path, rng: random.Random | None) -> None:
    out.mkdir(mode=0o700)
    note = shadow / f"d.{inode}"
    synced = {}
    for line in note.read_text().splitlines() if note.exists() else ():
        number, kind, name = line.split(" ", 2)
        synced[name] = (int(number), kind)
    now = {}
    if real is not None and real.is_dir() and real.stat().st_ino == inode:
        for path in real.iterdir():
            now[path.name] = (path.lstat().st_ino, "d" if path.is_dir() else "f")
    entries = {}
    for name in sorted({*synced, *now}):
        chosen = now if rng is not None and rng.random() < 0.5 else synced
        if name in chosen:
            entries[name] = chosen[name]
    for name, (number, kind) in entries.items():
        there = real / name if real is not None and now.get(name) == (number, kind) else None
        if kind == "d":
            _rebuild(there, number, out / name, shadow, rng)
            continue
        kept = shadow / f"f.{number}"
        if there is not None and rng is not None and rng.random() < 0.5:
            kept = there
        if kept.exists():
            shutil.copyfile(kept, out / name)
        else:
            (out / name).touch()  # a name whose bytes were never synced
        pin = there if there is not None else shadow / f"pin.{number}"
        if pin.exists():
            shutil.copymode(pin, out / name)
