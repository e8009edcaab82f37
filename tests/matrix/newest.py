"""Test the newest transformers of the index and its dependencies with the installed torch.

    .venv/bin/python -m tests.matrix.newest FOLDER [OPTION OF PYTEST]...

FOLDER is created again. For the tests of tests/hf, its packages take precedence over those of the environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("transformers", "tokenizers", "huggingface-hub")
VERSIONS = "from carve_kernels.hf import names; print(names.version(), *names.TESTED)"


def verdict(version: str, oldest: str, newest: str, passed: bool) -> str:
    """The meaning of the outcome, given the versions in TESTED."""
    number = tuple(int(part) for part in version.split(".")[:2])
    later = number > tuple(int(part) for part in newest.split("."))
    where = f"transformers {version} is {'newer than TESTED' if later else 'within TESTED'} ({oldest} to {newest})"
    if passed:
        return f"tests/hf pass; {where}" + ("; TESTED in carve_kernels/hf/names.py may be raised" if later else "")
    return f"tests/hf FAIL; {where}" + ("; it may have renamed what names.py relies on" if later else "")


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *PACKAGES]
    if subprocess.run(install).returncode != 0:
        print("the newest transformers does not install", flush=True)
        return 1
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    query = subprocess.run([sys.executable, "-c", VERSIONS], cwd=ROOT, env=environment, capture_output=True, text=True)
    if query.returncode != 0:
        print(query.stderr, "carve_kernels does not import with the newest transformers", sep="\n", flush=True)
        return 1
    version, oldest, newest = query.stdout.split()
    print(f"transformers {version}", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", *sys.argv[2:]]
    # The whole zoo, of which the tests run a part, then the tests.
    runs = [[*tests, "-m", "not gpu", "tests/hf/layouts/test_zoo.py"], [*tests, "tests/hf"]]
    passed = all([subprocess.run(command, cwd=ROOT, env=environment).returncode == 0 for command in runs])
    print(verdict(version, oldest, newest, passed))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
