"""Which extra of the install brings a package, and the error that says so where the package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# By the name of the module: what pip calls it, and the extra.
EXTRAS = {
    "PIL": ("pillow", "hf"),
    "rich": ("rich", "cli"),
    "safetensors": ("safetensors", "hf"),
    "skimage": ("scikit-image", "hf"),
    "transformers": ("transformers", "hf"),
    "typer": ("typer", "cli"),
}


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Within, the import of a package that is missing raises an ImportError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        package, extra = EXTRAS[error.name]
        raise ImportError(
            f"{what} needs {package}, which is missing; pip install 'carve-kernels[{extra}]'", name=error.name
        ) from error
