"""Test the kernels with each Triton in the table of registers: compiled for every target, and interpreted.

python -m tests.backends.triton.versions FOLDER    install each of them into a subfolder, and test

The oldest and the newest compile every head size, option and target, the others the cases of the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.backends.triton.limits import versions

ROOT = Path(__file__).resolve().parents[3]
COMPILED = ("-m", "tests.backends.triton.offline")
# The test files that run the kernels.
INTERPRETED = ("-m", "pytest", "-q", "tests/backends/triton", "tests/ops", "-k", "triton")


def install(version: str, folder: Path) -> None:
    """Install a Triton into a folder; the environment does not change."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*command, f"triton=={version}"], check=True)


def prove(folder: Path, everything: bool) -> list[str]:
    """Run the tests with the Triton of a folder, with every case if `everything`; returns those that failed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(folder.resolve())
    compiled = (*COMPILED, "--all") if everything else COMPILED
    proofs = {compiled: environment, INTERPRETED: {**environment, "TRITON_INTERPRET": "1"}}
    return [
        " ".join(arguments)
        for arguments, given in proofs.items()
        if subprocess.run([sys.executable, *arguments], cwd=ROOT, env=given).returncode != 0
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the versions are installed")
    parent: Path = parser.parse_args().folder
    failed = []
    known = versions()
    for version in known:
        install(version, parent / version)
        proven = prove(parent / version, everything=version in (known[0], known[-1]))
        failed += [f"triton {version}: {command}" for command in proven]
    print(*failed, f"{len(known)} versions of Triton, {len(failed)} proofs failed", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
