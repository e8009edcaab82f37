"""A separate Python environment, with the project built in a copy of its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.matrix.rows import Row

# Variables of the calling environment that would leak into another.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TRITON_INTERPRET", "PYTEST_ADDOPTS", "MAKEFLAGS", "MFLAGS")
NOT_COPIED = (".*", "__pycache__", "build", "out", "*.egg-info", "*.so")
# nvcc takes minutes and no row has a GPU; other tests prove the CUDA kernels.
SETTINGS = {"CUDACXX": "no-such-compiler", "CARVE_KERNELS_BUILD": "required", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
# The tools that these tests need; the rest of the extra [test] is for other tests.
TOOLS = ("pytest", "pytest-benchmark", "hypothesis")
LIMIT_S = 3600


class DoesNotInstall(Exception):
    """An environment that could not be created, with the reason."""


def find_python(version: str, environ: Mapping[str, str]) -> str:
    """The interpreter of a version: $PYTHON310 and so on, else on the path, else the newest of pyenv.

    Raises DoesNotInstall if there is none.
    """
    variable = f"PYTHON{version.replace('.', '')}"
    if given := environ.get(variable):
        if not _is(given, version):
            raise DoesNotInstall(f"{variable}: expected the command of a Python {version}, got {given}")
        return given
    name = f"python{version}"
    on_path = shutil.which(name, path=environ.get("PATH"))
    if on_path and _is(on_path, version):
        return on_path
    folders = sorted(_pyenv(environ).glob(f"versions/{version}.*"), key=lambda path: _numbers(path.name))
    for folder in reversed(folders):
        if _is(str(folder / "bin" / name), version):
            return str(folder / "bin" / name)
    raise DoesNotInstall(f"no {name} on the path or under pyenv; give one, make matrix {variable}=/path/to/{name}")


def _is(command: str, version: str) -> bool:
    """Whether a command runs a Python of this version; a shim of pyenv on the path may fail."""
    query = [command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return answer.returncode == 0 and answer.stdout.strip() == version


def _pyenv(environ: Mapping[str, str]) -> Path:
    if root := environ.get("PYENV_ROOT"):
        return Path(root)
    program = shutil.which("pyenv", path=environ.get("PATH"))
    if program:
        answer = subprocess.run([program, "root"], capture_output=True, text=True)
        if answer.returncode == 0:
            return Path(answer.stdout.strip())
    return Path(environ.get("HOME", "/"), ".pyenv")


def _numbers(name: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in name.split(".")]


class Environment:
    """A folder with a virtual environment and the sources of the project; the output of commands goes to a log."""

    def __init__(self, folder: Path, log: Path, environ: Mapping[str, str]) -> None:
        self.folder, self.source, self.log = folder, folder / "source", log
        self.python = folder / "venv" / "bin" / "python"
        self.variables = {name: value for name, value in environ.items() if name not in FOREIGN} | SETTINGS

    def install(self, row: Row, root: Path, python: str) -> None:
        """Create the environment of a row. Raises DoesNotInstall with the reason."""
        shutil.copytree(root, self.source, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self._must([python, "-m", "venv", str(self.folder / "venv")])
        self.pip(row.pinned("torch"), "setuptools>=77", "wheel", "ninja")
        torch = self.versions("torch")["torch"]
        transformers = row.pinned("transformers")
        self.pip("--no-build-isolation", "-e", f"{self.source}[cli]", transformers, f"torch=={torch}", *TOOLS)
        # torch requires one release of Triton but works with others. On macOS and Windows there is none.
        self.pip(*([] if row.triton is None else ["--no-deps"]), row.pinned("triton"))
        # Some processors need torchvision. Its compiled part may not fit this torch, so only conftest.py finds it.
        minor = int(torch.split(".")[1]) + 15
        self.pip("--no-deps", "--target", str(self.folder / "venv" / "torchvision"), f"torchvision==0.{minor}.*")

    def pip(self, *arguments: str) -> None:
        self._must([str(self.python), "-m", "pip", "install", "--progress-bar", "off", *arguments])

    def _must(self, command: Sequence[str]) -> None:
        status, output = self.run(command)
        if status != 0:
            raise DoesNotInstall(reason_of(output))

    def run(self, command: Sequence[str], **variables: str) -> tuple[int, str]:
        """Run a command in the sources: its exit status and its output."""
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self.source,
                env=self.variables | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_S,
            )
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as stopped:
            status, output = 124, f"{_text(stopped.stdout)}\nstopped after {LIMIT_S} s"
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{output}\n[{status} after {time.monotonic() - started:.0f} s]\n\n")
        return status, output

    def versions(self, *packages: str) -> dict[str, str]:
        """The installed versions, without a local label after a plus sign."""
        code = f"from importlib.metadata import version as v; print(*[v(name) for name in {packages!r}])"
        status, output = self.run([str(self.python), "-c", code])
        if status != 0:
            raise DoesNotInstall(reason_of(output))
        return dict(zip(packages, (version.split("+")[0] for version in output.split()), strict=True))


def reason_of(output: str) -> str:
    """The reason that pip gives, or the last lines of an output without ERROR."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "; ".join(dict.fromkeys(reasons)) or " ".join(lines[-3:]) or "no reason was given"


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def processor() -> str:
    """The model of this machine's CPU, and how many of its threads there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "an unnamed CPU")
    return f"{named}, {os.cpu_count()} threads"
