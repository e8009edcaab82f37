"""Writes constraints.txt: `python -m tests.constrain python3.10 python3.11 ...` resolves all extras on each Python.

torch, Triton and the GPU packages that torch requires are left out: `make` installs the build that the machine needs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Versions that gradio, for which an extra is planned, does not support yet.
BOUNDS = ("pillow<13", "huggingface-hub<3")
LEFT_OUT = re.compile(r"(carve-kernels|torch|triton|setuptools|(nvidia|cuda)-.*)$")
HEAD = """\
# What `make demo` and `make test` install, resolved for every extra together; `make constraints` rewrites it.
# Other installs do not have to follow it.
"""


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """The version of a Python such as 3.10, and the version of every package it would install, by normalized name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        report = Path(folder, "report.json")
        wanted = [f"{ROOT}[all,test]", *BOUNDS]
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", str(report), *wanted], check=True)
        plan = json.loads(report.read_text(encoding="utf-8"))
    versions = {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"].split("+")[0]
        for item in plan["install"]
    }
    return plan["environment"]["python_version"], {
        name: version for name, version in versions.items() if not LEFT_OUT.match(name)
    }


def lines(resolved: dict[str, dict[str, str]]) -> list[str]:
    """A line for each package, or one for each range of Pythons with the same version."""
    pythons = sorted(resolved, key=lambda version: tuple(map(int, version.split("."))))
    written = []
    for name in sorted(set().union(*resolved.values())):
        pinned = [(python, resolved[python][name]) for python in pythons if name in resolved[python]]
        starts = [entry for before, entry in zip([("", ""), *pinned], pinned, strict=False) if entry[1] != before[1]]
        for index, (first, version) in enumerate(starts):
            bounds = [f'python_version >= "{first}"'] if index else []
            bounds += [f'python_version < "{starts[index + 1][0]}"'] if index + 1 < len(starts) else []
            written.append(f"{name}=={version}" + (f"; {' and '.join(bounds)}" if bounds else ""))
    return written


if __name__ == "__main__":
    resolved = dict(resolve(python) for python in sys.argv[1:])
    ROOT.joinpath("constraints.txt").write_text(HEAD + "\n".join(lines(resolved)) + "\n", encoding="utf-8")
