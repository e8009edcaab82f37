"""The layers of the package: imports go down only, backends never sideways, heavy packages only where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "carve_kernels"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

LAYERS = {
    0: (
        "types",
        "checks",
        "numerics",
        "devices",
        "atomic_write",
        "deprecation",
        "extras",
        "arrays",
    ),
    1: ("backends",),
    2: ("ops", "visualize", "animation", "fonts"),
    3: ("pipeline", "view_pixels", "video", "presets", "maps", "complexity", "selfcheck"),
    4: ("hf", "models", "protocol", "conformance", "plugin"),
    5: ("cli", "__main__", "frontends"),
}
TOP = 6  # carve_kernels itself, which only the command line may import from

# Where a package may be imported at run time: layers by number, modules by name.
HOMES: dict[str, tuple[int | str, ...]] = {
    "transformers": (4, 5),
    "triton": ("backends.triton",),
    "PIL": ("visualize", "animation", "fonts", "ops.zoom", 3, 4, 5),
    "matplotlib": (5,),
    "rich": (5,),
    "typer": (5,),
}
# What the backends of the compiled extension share.
SHARED = "native"
EXTENSION = "carve_kernels._C"
EXTENSION_HOMES = ("backends.native.extension",)


def layer_of(module: str) -> int:
    if module == "carve_kernels":
        return TOP
    part = module.split(".")[1]
    layers = [floor for floor, parts in LAYERS.items() if part in parts]
    assert layers, f"{module} has no layer: give carve_kernels/{part} one in LAYERS"
    return layers[0]


def backend_of(module: str) -> str | None:
    """The backend of a module; "" for `backends` itself, None outside of it."""
    parts = module.split(".")
    if parts[1:2] != ["backends"] or parts[2:3] == ["native"]:
        return None
    return parts[2] if len(parts) > 2 else ""


def is_within(module: str, homes: tuple[int | str, ...]) -> bool:
    inner = module.removeprefix("carve_kernels.")
    return any(
        layer_of(module) == home if isinstance(home, int) else inner == home or inner.startswith(f"{home}.")
        for home in homes
    )


def imports(module: str, tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether for type checkers alone; the names of a package count as its modules."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in inner]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            argument = node.args[0]
            names = [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []
        for name in names:
            yield name, id(node) in typing_only


def faults(module: str, source: str) -> list[str]:
    """Every import of a module that the layers forbid."""
    tree = ast.parse(source)
    found = []
    for name, typing_only in imports(module, tree):
        root = name.split(".")[0]
        if root in HOMES and not typing_only and not is_within(module, HOMES[root]):
            found.append(f"{module} imports {name}, which belongs to {HOMES[root]}")
        if root != "carve_kernels" or module == "carve_kernels" or name == EXTENSION:
            continue
        if name == "carve_kernels":
            if layer_of(module) != 5:
                found.append(f"{module} imports the public names, which are above it")
        elif layer_of(name) > layer_of(module):
            found.append(f"{module} (layer {layer_of(module)}) imports {name} (layer {layer_of(name)}): up")
        elif backend_of(module) and backend_of(name) not in (None, SHARED, backend_of(module)):
            found.append(f"{module} imports {name}: sideways")
    named = any(name == EXTENSION for name, _ in imports(module, tree))
    loads = named or "load_library" in source or "_C.abi3" in source
    if loads and not is_within(module, EXTENSION_HOMES):
        found.append(f"{module} loads the compiled extension, which belongs to {EXTENSION_HOMES}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    assert faults(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("carve_kernels.types", "from carve_kernels.backends import resolve"),
        ("carve_kernels.ops.contrast", "def f():\n    from carve_kernels.hf import engine"),
        ("carve_kernels.pipeline", "from carve_kernels import hf"),
        ("carve_kernels.pipeline", "from carve_kernels import carve"),
        ("carve_kernels.ops.capture", "from ..hf.session import capture_attention"),
        ("carve_kernels.backends.cpu.contrast", "from carve_kernels.backends.reference import contrast"),
        ("carve_kernels.backends.cpu.contrast", "from ..reference import contrast"),
        ("carve_kernels.backends.cpu.contrast", "from carve_kernels.backends import resolve"),
        ("carve_kernels.backends.reference.contrast", "import importlib\nimportlib.import_module('carve_kernels._C')"),
        ("carve_kernels.ops.capture", "import torch\ntorch.ops.load_library('x')"),
        ("carve_kernels.ops.capture", "import triton.language as tl"),
        ("carve_kernels.pipeline", "def f():\n    import transformers"),
        ("carve_kernels.types", "from PIL import Image"),
        ("carve_kernels.hf.engine.engine", "from rich.progress import Progress"),
        ("carve_kernels.hf.engine.engine", "import matplotlib.pyplot as plt"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("carve_kernels.types", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL.Image import Image"),
        ("carve_kernels.hf.engine.engine", "from carve_kernels.pipeline import carve\nimport transformers"),
        ("carve_kernels.backends.cpu.contrast", "from carve_kernels.backends.cpu import unavailable\nimport torch"),
        ("carve_kernels.cli.demo", "import rich\nfrom carve_kernels import __version__\nfrom PIL import Image"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert faults(module, source) == []


# The parts of hf/, lowest first: model access (the files of hf/ itself), then its folders. engine serves profile.
HF_PARTS = ("", "layouts", "session", "decoding", "engine", "profile")


def part_of(module: str) -> str | None:
    """The part of hf/ that a module belongs to, None outside of hf/."""
    words = module.split(".")
    if words[1:2] != ["hf"]:
        return None
    return words[2] if len(words) > 2 and words[2] in HF_PARTS else ""


def hf_imports() -> Iterator[tuple[str, str]]:
    """Each import of one part of hf/ by a module of another part."""
    for module, path in MODULES.items():
        part = part_of(module)
        if part is None or module == "carve_kernels.hf":
            continue
        for name in {name for name, _ in imports(module, ast.parse(path.read_text()))}:
            if part_of(name) not in (None, part):
                yield module, name


def test_the_parts_of_hf_import_downwards_only() -> None:
    upward = [
        f"{module} imports {name}"
        for module, name in hf_imports()
        if HF_PARTS.index(part_of(name) or "") > HF_PARTS.index(part_of(module) or "")
    ]
    assert upward == []


def test_the_parts_of_hf_have_few_imports_of_each_other() -> None:
    """A module counts once for each other part that it imports."""
    edges = {(module, part_of(name)) for module, name in hf_imports()}
    assert 0 < len(edges) <= 45, sorted(edges)
