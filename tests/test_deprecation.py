"""Old import paths and names work, and warn with the new ones."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import warnings

import pytest

from carve_kernels.deprecation import MODULES, moved_names, with_old_keys


@pytest.mark.parametrize("old", MODULES)
def test_a_module_that_moved_is_found_by_its_old_path(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, new = f"carve_kernels.{old}", f"carve_kernels.{MODULES[old]}"
    monkeypatch.delitem(sys.modules, path, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"^{path} is {new} now$") as warned:
        found = importlib.import_module(path)
    assert found is importlib.import_module(new) and found.__name__ == found.__spec__.name == new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(path) is found
    assert len(warned) == 1


def test_the_warning_names_the_line_that_imports() -> None:
    code = "\nimport carve_kernels.picture\nfrom carve_kernels.files import sync\nfrom carve_kernels import schemas\n"
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    warned = [line for line in result.stderr.splitlines() if "DeprecationWarning" in line]
    assert [line.split(":")[1] for line in warned] == ["2", "3", "4"] and "carve_kernels.visualize now" in warned[0]


def test_a_path_that_never_was_is_not_found() -> None:
    assert importlib.util.find_spec("carve_kernels.nothing") is None
    with pytest.raises(ModuleNotFoundError, match=r"carve_kernels\.hf\.nothing"):
        importlib.import_module("carve_kernels.hf.nothing")


def test_a_name_that_moved_is_found_in_its_old_module() -> None:
    find = moved_names("carve_kernels.old", View="carve_kernels.types")
    with pytest.warns(DeprecationWarning, match=r"^carve_kernels\.old\.View is carve_kernels\.types\.View now$"):
        assert find("View") is importlib.import_module("carve_kernels.types").View
    with pytest.raises(AttributeError, match=r"^module 'carve_kernels\.old' has no attribute 'Veiw'$"):
        find("Veiw")


def test_a_record_has_its_old_keys_too() -> None:
    assert with_old_keys({"new": 1, "other": 2}, old="new") == {"new": 1, "other": 2, "old": 1}
