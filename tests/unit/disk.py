"""A disk that forgets, for what syncs through `os.fsync` in this process; whole daemons have `tests/faults/shadow.py`."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class Disk:
    """A storage fake that forgets what was not synced: contents by inode, names by directory."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.contents, self.names = root, {}, {}
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)
        for directory in (root, *(p for p in root.rglob("*") if p.is_dir())):
            self.names[directory.stat().st_ino] = {p.name: p.stat().st_ino for p in directory.iterdir()}

    def fsync(self, fd: int) -> None:
        self._fsync(fd)
        info, place = os.fstat(fd), Path(f"/proc/self/fd/{fd}").readlink()
        if stat.S_ISDIR(info.st_mode):
            self.names[info.st_ino] = {p.name: p.stat().st_ino for p in place.iterdir()}
        else:
            self.contents[info.st_ino] = place.read_bytes()

    def after_the_power_went(self) -> dict[str, bytes]:
        """path -> content of every file that is still there."""
        found: dict[str, bytes] = {}

        def walk(inode: int, prefix: str) -> None:
            for name, child in self.names.get(inode, {}).items():
                if child in self.names:
                    walk(child, f"{prefix}{name}/")
                else:
                    found[prefix + name] = self.contents.get(child, b"")

        walk(self.root.stat().st_ino, "")
        return found
