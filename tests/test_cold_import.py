"""A fresh process without optional packages: the operators run on the reference, and errors name the missing extra."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

BLOCK = """
import sys
import torch

BLOCKED = {
    "triton", "transformers", "packaging", "huggingface_hub", "PIL", "scipy", "skimage", "sklearn", "rich", "typer",
    "matplotlib", "safetensors",
}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

def refuse(path):
    raise OSError("blocked")

sys.meta_path.insert(0, Block())
torch.ops.load_library = refuse
"""


# Like an installation without a compiler.
NO_LIBRARY = """
from pathlib import Path
import carve_kernels.backends.native.extension
carve_kernels.backends.native.extension.LIBRARY = Path("_C.abi3.so")
"""


def process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def run(code: str) -> str:
    result = process(BLOCK + textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_no_optional_package() -> None:
    loaded = run(
        """
        before = set(sys.modules)
        import carve_kernels
        assert carve_kernels.__version__
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        """
    )
    assert loaded.split() == ["carve_kernels"]


def test_the_tensor_stages_run_on_the_reference_and_a_missing_backend_has_a_reason() -> None:
    run(
        """
        import carve_kernels
        from carve_kernels.backends import resolve

        query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 9, 32)
        tokens = torch.arange(6, dtype=torch.int32)[None]
        maps, mass, entropy = carve_kernels.capture(query, key, tokens, scale=32 ** -0.5, backend="reference")
        expected = (query.view(1, 2, 2, 32) @ key.mT * 32 ** -0.5).softmax(-1)[..., :6].mean((1, 2))
        torch.testing.assert_close(maps[:, 0], expected)

        task, general = torch.rand(2, 1, 12), torch.rand(2, 1, 12)
        for backend in ("reference", "auto"):
            saliency = carve_kernels.contrast(task, general, (3, 4), (3, 4), lam=0.1, backend=backend)
            torch.testing.assert_close(saliency, (task / (general + 0.1)).sum((0, 1)).view(3, 4))

        saliency = torch.tensor([[9.0, 0, 4, 4], [0, 9, 0, 0], [1, 0, 0, 7]])
        for backend in ("reference", "auto"):
            found = carve_kernels.regions(saliency, keep=0.5, top=2, connectivity=8, backend=backend)
            assert found.boxes.tolist() == [[0, 0, 4, 3], [3, 2, 4, 3]], found
            found = carve_kernels.regions(saliency, keep=0.45, top=2, backend=backend)
            assert found.boxes.tolist() == [[0, 0, 1, 1], [1, 1, 2, 2]], found

        table = carve_kernels.explain()
        assert "pip install" in table, table
        assert "contrast=reference" in table, table
        try:
            resolve("contrast", "cpu", torch.device("cpu"), *[torch.rand(2, 1, 12)] * 2, (3, 4), (3, 4))
        except carve_kernels.BackendUnavailable as error:
            assert "reference backend only" in str(error) and "pip install" in str(error), error
        else:
            raise AssertionError("contrast was served")
        """
    )


def test_what_needs_an_extra_names_it() -> None:
    run(
        """
        import carve_kernels
        assert callable(carve_kernels.zoom) and callable(carve_kernels.carve) and callable(carve_kernels.AttentionMaps)
        for name, use, missing in (
            ("CarveEngine", lambda: carve_kernels.CarveEngine, "packaging"),
            ("load", lambda: carve_kernels.load, "safetensors"),
            ("capture_attention", lambda: carve_kernels.capture_attention, "packaging"),
            ("layout_of", lambda: carve_kernels.layout_of, "pillow"),
            ("overlay", lambda: carve_kernels.overlay, "pillow"),
            ("carve_kernels.models.scenes", lambda: __import__("carve_kernels.models.scenes"), "pillow"),
            ("zoom", lambda: carve_kernels.zoom(None, None, (0, 0, 1, 1)), "pillow"),
        ):
            try:
                use()
            except ImportError as error:
                assert f"{name} needs {missing}, which is missing; pip install 'carve-kernels[hf]'" in str(error), error
            else:
                raise AssertionError(f"{name}: nothing is missing")
        """
    )


def test_the_plugin_serves_arrays_and_says_why_it_loads_no_model() -> None:
    run(
        """
        from carve_kernels.plugin import backend
        from carve_kernels.protocol import mismatch

        assert mismatch(backend) is None and "transformers" not in sys.modules
        found = backend.regions([[0.0, 1.0], [0.0, 5.0]], keep=0.5, top=1)
        assert found.box == (1, 0, 2, 2), found
        reason = backend.supports("small")
        assert reason.startswith("load needs ") and "pip install 'carve-kernels[hf]'" in reason, reason
        """
    )


def test_the_command_line_without_its_packages_names_the_extra() -> None:
    result = process(
        BLOCK
        + textwrap.dedent(
            """
            import runpy
            sys.argv = ["carve-kernels", "doctor"]
            runpy.run_module("carve_kernels", run_name="__main__")
            """
        )
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: carve-kernels needs typer, which is missing; pip install 'carve-kernels[cli]'\n"


def test_a_library_that_was_not_built_is_reported_once() -> None:
    code = """
    import torch
    import carve_kernels
    for _ in range(2):
        carve_kernels.contrast(torch.ones(1, 1, 4), torch.ones(1, 1, 4), (2, 2), (2, 2), lam=0.1)
        carve_kernels.regions(torch.rand(4, 4), keep=0.4, top=1)
    """
    result = process(NO_LIBRARY + textwrap.dedent(code))
    assert result.returncode == 0 and result.stdout == ""
    [line] = result.stderr.splitlines()
    assert "reference backend only: " in line and "times slower; the extension _C.abi3.so is not built" in line
    assert "pip install -e " in line


def test_the_command_line_reports_it_first_and_once(tmp_path: Path) -> None:
    code = f"""
    import runpy, sys
    sys.argv = ["carve-kernels", "demo", "--output", {str(tmp_path / "demo")!r}]
    runpy.run_module("carve_kernels", run_name="__main__")
    """
    result = process(NO_LIBRARY + textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    first, *others = result.stderr.splitlines()
    assert first.startswith("on a CPU: reference backend only: ") and "times slower" in first and "pip install" in first
    assert not any("is not built" in line for line in others)
