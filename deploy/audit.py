"""Known vulnerabilities of the Python packages in images: `python deploy/audit.py IMAGE…`. Exits with 1 when there are any.

It fails, too, when it could not look: a service that does not answer, or that knows no package, must not read as "none". So
every package has to be found there, and a version that is known to be vulnerable is asked for first and has to be named.
Debian's packages in the base image are not looked at. `AUDIT_SERVICE=osv` asks OSV, `AUDIT_OSV_URL` a mirror of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CANARY = "urllib3==1.26.4"
"""Has been known to be vulnerable since 2021."""
LIST = """
from importlib import metadata
for one in metadata.distributions():
    if one.metadata["Name"] != "fedpruner":
        print(one.metadata["Name"] + "==" + one.version.partition("+")[0])
"""
"""What is installed in an image, a local version such as +cpu as the release it was built from."""


def packages(image: str) -> list[str]:
    """What an image holds, a requirement each. Raises CalledProcessError."""
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", LIST]
    return sorted(set(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()))


def audit(requirements: list[str]) -> tuple[list[str], str]:
    """(what is known, a line each; why it could not be looked up, or "")."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "requirements.txt"
        file.write_text("\n".join(requirements) + "\n")
        url = os.environ.get("AUDIT_OSV_URL")
        service = ["-s", "osv", "--osv-url", url] if url else ["-s", os.environ.get("AUDIT_SERVICE", "pypi")]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "-r", file, "--no-deps", "--disable-pip", "--strict", "-f", "json", *service],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        return [], lines[-1] if lines else f"pip-audit exited {done.returncode}"
    known = [
        f"{one['name']} {one['version']}: {bug['id']}, fixed in {', '.join(bug['fix_versions']) or 'no version yet'}"
        for one in found
        for bug in one["vulns"]
    ]
    missed = len(requirements) - len(found)
    return known, f"{missed} packages were not looked up" if missed else ""


def main() -> int:
    """The canary, then every image."""
    known, problem = audit([CANARY])
    if not known:
        print(
            f"error: nothing was audited: the vulnerability service can't be used from here: {problem or 'it knows no canary'}",
            file=sys.stderr,
        )
        return 1
    failed = False
    for image in sys.argv[1:]:
        installed = packages(image)
        known, problem = audit(installed)
        print(f"{image}: {len(installed)} packages, {len(known)} known vulnerabilities" + (f"; {problem}" if problem else ""))
        print("".join(f"  {line}\n" for line in known), end="")
        failed |= bool(known or problem)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
