"""The public names: which they are, that they load on first use, and that their signatures change on purpose only."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import carve_kernels

SNAPSHOT = Path(__file__).with_name("public_api.txt")
NAMES = [
    "Attended",
    "AttentionMaps",
    "BackendUnavailable",
    "Capture",
    "CaptureSession",
    "CarveEngine",
    "CarveFailure",
    "CarveOutcome",
    "CarveResult",
    "CarvedImage",
    "Held",
    "Memory",
    "Preset",
    "Probe",
    "Profile",
    "Regions",
    "Saliency",
    "Video",
    "VideoResult",
    "VideoSaliency",
    "View",
    "VisualLayout",
    "attention",
    "capture",
    "capture_attention",
    "capture_layers",
    "carve",
    "column_sums",
    "contrast",
    "contrast_frames",
    "explain",
    "layout_of",
    "load",
    "open_video",
    "overlay",
    "profile",
    "regions",
    "saliency",
    "zoom",
]


def signatures() -> list[str]:
    """One line for each public function, and for each class and its public methods."""
    lines = []
    for name in NAMES:
        value = getattr(carve_kernels, name)
        members = {name: value}
        if inspect.isclass(value) and not issubclass(value, Exception):
            for inner, member in vars(value).items():
                called = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                if inspect.isfunction(called) and (not inner.startswith("_") or inner == "__call__"):
                    members[f"{name}.{inner}"] = called
        if not (inspect.isclass(value) and issubclass(value, Exception)):
            lines += [f"{inner}{inspect.signature(member)}" for inner, member in members.items()]
    # The fields of a named tuple.
    return [re.sub(r"ForwardRef\(('[^']*')[^)]*\)", r"\1", line) for line in lines]


def test_all_lists_the_public_names() -> None:
    assert sorted(carve_kernels.__all__) == sorted([*NAMES, "__version__"])
    assert set(carve_kernels.__all__) <= set(dir(carve_kernels))


def test_signatures_are_those_of_the_snapshot() -> None:
    """After an intended change: `python -m tests.test_public_api` rewrites the snapshot."""
    assert signatures() == SNAPSHOT.read_text().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_docstring(name: str) -> None:
    docstring = vars(getattr(carve_kernels, name)).get("__doc__") or getattr(carve_kernels, name).__doc__
    assert docstring and not docstring.startswith(f"{name}("), "a dataclass without a docstring lists its fields"


def test_the_help_of_a_preset_has_a_line_for_each_field() -> None:
    lines = (carve_kernels.Preset.__doc__ or "").splitlines()
    starts = [line.split()[0] for line in lines if re.match(r"    \w+ {2,}\S", line)]
    assert starts == ["field", *(field.name for field in dataclasses.fields(carve_kernels.Preset))]


def test_the_results_of_public_functions_have_types() -> None:
    """`contrast` returns a tensor for one view and a list for several, and says so to type checkers."""
    untyped = [name for name in NAMES if typed(name) in (inspect.Signature.empty, "Any", Any)]
    assert untyped == []


def typed(name: str) -> object:
    value = getattr(carve_kernels, name)
    return value if inspect.isclass(value) else inspect.signature(value).return_annotation


@pytest.mark.parametrize("name", NAMES)
def test_no_submodule_can_replace_a_name(name: str) -> None:
    assert importlib.util.find_spec(f"carve_kernels.{name}") is None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'contrats'"):
        carve_kernels.contrats  # noqa: B018


def test_names_load_on_first_use() -> None:
    program = (
        "import sys, carve_kernels\n"
        "assert not any(name.startswith('carve_kernels.') for name in sys.modules)\n"
        "carve_kernels.View\n"
        "assert 'carve_kernels.types' in sys.modules and 'carve_kernels.ops' not in sys.modules\n"
        "carve_kernels.contrast, carve_kernels.carve\n"
        "assert callable(carve_kernels.contrast) and callable(carve_kernels.carve)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


if __name__ == "__main__":
    importlib.import_module("tests.conftest")
    SNAPSHOT.write_text("\n".join(signatures()) + "\n")
