"""Without what other systems lack: folders that can be opened, locks, modules and encodings of Linux."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from carve_kernels import atomic_write
from carve_kernels.hf.engine.cache import Memory
from tests.cli.conftest import LINES, Ask, Invoke, content, written

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "carve_kernels").rglob("*.py"))


@pytest.fixture
def like_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder can be opened, and there are no locks of POSIX."""
    opened = os.open

    def refuse(path: Any, *words: Any, **more: Any) -> int:
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path, *words, **more)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.usefixtures("like_windows")
def test_batch_continues_where_it_stopped(ask: Ask, folder: Path) -> None:
    assert ask(LINES[:2]).exit_code == 0
    before = written(folder)
    done = ask(LINES, "--images", "--memory", folder / "memory")
    assert done.exit_code == 0, done.output
    again = ask(LINES, "--images")
    assert again.exit_code == 0 and "3 of them before this run" in again.stdout
    assert set(before) < set(written(folder)) and not [name for name in content(folder / "out") if "batch-" in name]


@pytest.mark.usefixtures("like_windows")
def test_run_profile_and_memory(run: Invoke, carve: Invoke, checkpoint: Path, folder: Path) -> None:
    assert run().exit_code == 0
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES[:2]))
    words = ("--rows", "last", "--steps", "t_start", "--max-new-tokens", 1, "-o", folder / "carve.json")
    done = carve("profile", "-m", checkpoint, "-i", folder / "questions.jsonl", *words)
    assert done.exit_code == 0 and json.loads((folder / "carve.json").read_text())["layers"], done.output
    atomic_write.write_whole(folder / "whole", b"data")
    assert (folder / "whole").read_bytes() == b"data"
    Memory(folder / "maps")


def test_two_ids_that_are_one_name_on_a_system(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [{**LINES[0], "id": "Left"}, {**LINES[1], "id": "left"}]
    assert ask(twins).exit_code == 0
    exists = Path.exists
    # As where capitals make no difference.
    monkeypatch.setattr(
        Path,
        "exists",
        lambda path: (
            exists(path) or (exists(path.parent) and path.name.lower() in map(str.lower, os.listdir(path.parent)))
        ),
    )
    done = ask(twins, "-o", folder / "other")
    assert done.exit_code == 2 and done.stderr.startswith("error: --input: the ids 'Left' and 'left' are one folder")
    assert not (folder / "other").is_dir()
    assert ask([twins[0], LINES[1]], "-o", folder / "other").exit_code == 0


def test_every_module_imports_without_what_only_linux_has() -> None:
    program = """
        import importlib, pkgutil, sys

        import torch
        import transformers

        for name in ("fcntl", "resource", "pwd", "grp", "termios", "triton"):
            sys.modules[name] = None

        import carve_kernels

        for module in pkgutil.walk_packages(carve_kernels.__path__, "carve_kernels."):
            # Triton's kernels are not imported without Triton, and the library of operators is not a module.
            if not module.name.startswith("carve_kernels.backends.triton.") and module.name[-2:] not in ("__", "_C"):
                importlib.import_module(module.name)
        assert "reference" in carve_kernels.explain()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path in SOURCES])
def test_texts_have_an_encoding_and_no_system_is_taken_for_granted(path: Path) -> None:
    """On other systems the default encoding varies, and these names of `os` are missing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        texts = [word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        if name in ("read_text", "write_text") or (
            name == "open" and any(set(text) <= set("rwaxt+") for text in texts)
        ):
            assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
    missing = {
        "fork",
        "getuid",
        "geteuid",
        "sched_getaffinity",
        "sysconf",
        "O_DIRECTORY",
        "kill",
        "getloadavg",
        "uname",
    }
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os"
    }
    assert not used & missing, path
