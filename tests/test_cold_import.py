"""A fresh process with everything optional blocked: the package imports, and its tensor stages run on the reference."""

from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCK = """
import sys
import torch

BLOCKED = {"triton", "transformers", "PIL", "scipy", "skimage", "sklearn", "rich", "typer", "matplotlib", "safetensors"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

def refuse(path):
    raise OSError("blocked")

sys.meta_path.insert(0, Block())
torch.ops.load_library = refuse
"""


def run(code: str) -> str:
    program = BLOCK + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_no_optional_package() -> None:
    loaded = run(
        """
        before = set(sys.modules)
        import carve_kernels
        assert carve_kernels.__version__
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        """
    )
    assert loaded.split() == ["carve_kernels"]


def test_capture_runs_on_the_reference() -> None:
    run(
        """
        import carve_kernels
        query, key = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 9, 32)
        tokens = torch.arange(6, dtype=torch.int32)[None]
        maps, mass, entropy = carve_kernels.capture(query, key, tokens, scale=32 ** -0.5, backend="reference")
        expected = (query.view(1, 2, 2, 32) @ key.mT * 32 ** -0.5).softmax(-1)[..., :6].mean((1, 2))
        torch.testing.assert_close(maps[:, 0], expected)
        """
    )


def test_contrast_runs_on_the_reference() -> None:
    run(
        """
        import carve_kernels
        task, general = torch.rand(2, 1, 12), torch.rand(2, 1, 12)
        for backend in ("reference", "auto"):
            saliency = carve_kernels.contrast(task, general, (3, 4), (3, 4), lam=0.1, backend=backend)
            torch.testing.assert_close(saliency, (task / (general + 0.1)).sum((0, 1)).view(3, 4))
        """
    )


def test_a_missing_room_says_why() -> None:
    run(
        """
        import carve_kernels
        from carve_kernels.backends import resolve
        table = carve_kernels.explain()
        assert "pip install" in table, table
        assert "contrast=reference" in table, table
        for stage, room, reason in [("contrast", "cpu", "pip install"), ("regions", "reference", "scipy")]:
            try:
                resolve(stage, room, torch.device("cpu"), *[torch.rand(2, 1, 12)] * 2, (3, 4), (3, 4))
            except carve_kernels.BackendUnavailable as error:
                assert reason in str(error), error
            else:
                raise AssertionError(f"{stage} on {room} was served")
        """
    )
