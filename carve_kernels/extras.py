"""Which extra of the install brings a package, and the error that says so where the package is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

# By the name of the module: what pip calls it, and the extra.
EXTRAS = {
    "PIL": ("pillow", "hf"),
    "huggingface_hub": ("huggingface-hub", "hf"),
    "packaging": ("packaging", "hf"),
    "rich": ("rich", "cli"),
    "safetensors": ("safetensors", "hf"),
    "skimage": ("scikit-image", "hf"),
    "transformers": ("transformers", "hf"),
    "typer": ("typer", "cli"),
}


def requirement(package: str) -> str:
    """A package with the versions that the install asks for; its name alone where they are not known."""
    try:
        lines = metadata.requires("carve-kernels") or []
    except metadata.PackageNotFoundError:
        lines = []
    found = (re.match(rf"({re.escape(package)}[^\w.;-][^;]*)", line) for line in lines)
    return next((match[1].strip() for match in found if match), package)


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Within, the import of a package that is missing raises an ImportError that names the extra.

    Of a torchvision that does not fit torch it says so: transformers calls whatever it then cannot import missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "torchvision" in str(cause):
            raise ImportError(
                f"{what} needs transformers, and the torchvision here does not fit torch and breaks it ({cause}); "
                "pip install the torchvision of this torch, from the same index, or pip uninstall torchvision"
            ) from error
        if error.name not in EXTRAS:
            raise
        package, extra = EXTRAS[error.name]
        raise ImportError(
            f"{what} needs {package}, which is missing; pip install 'carve-kernels[{extra}]'", name=error.name
        ) from error
