"""Try the newest transformers of the index, with what it depends on, beside the installed torch.

    .venv/bin/python -m tests.matrix.newest FOLDER [OPTION OF PYTEST]...

FOLDER is made anew. What it holds goes before the environment's own packages for the tests of tests/hf alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("transformers", "tokenizers", "huggingface-hub")
ASKED = "from carve_kernels.hf import names; print(names.version(), *names.TESTED)"


def verdict(version: str, oldest: str, newest: str, passed: bool) -> str:
    """What the outcome means, by the versions that the package says it was tested with."""
    found = tuple(int(part) for part in version.split(".")[:2])
    later = found > tuple(int(part) for part in newest.split("."))
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
    told = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, env=environment, capture_output=True, text=True)
    if told.returncode != 0:
        print(told.stderr, "carve_kernels does not import with the newest transformers", sep="\n", flush=True)
        return 1
    version, oldest, newest = told.stdout.split()
    print(f"transformers {version}", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", *sys.argv[2:]]
    # All of the zoo, of which the tests run a few, and then the tests.
    runs = [[*tests, "-m", "not gpu", "tests/hf/layouts/test_zoo.py"], [*tests, "tests/hf"]]
    passed = all([subprocess.run(command, cwd=ROOT, env=environment).returncode == 0 for command in runs])
    print(verdict(version, oldest, newest, passed))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
