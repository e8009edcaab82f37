"""The extra that installs each optional package, and the error that names it where the package is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

# By module: its name for pip, and the extra.
EXTRAS = {
    "PIL": ("pillow", "hf"),
    "av": ("av", "video"),
    "huggingface_hub": ("huggingface-hub", "hf"),
    "packaging": ("packaging", "hf"),
    "rich": ("rich", "cli"),
    "safetensors": ("safetensors", "hf"),
    "skimage": ("scikit-image", "hf"),
    "transformers": ("transformers", "hf"),
    "typer": ("typer", "cli"),
}
INSTALL_TORCHVISION = "pip install torchvision, from the same index as torch"
FIT_TORCHVISION = "pip install the torchvision of this torch, from the same index, or pip uninstall torchvision"


def requirement(package: str) -> str:
    """A package with the versions that this package requires; just its name if they are not known."""
    try:
        lines = metadata.requires("carve-kernels") or []
    except metadata.PackageNotFoundError:
        lines = []
    matches = (re.match(rf"({re.escape(package)}[^\w.;-][^;]*)", line) for line in lines)
    return next((match[1].strip() for match in matches if match), package)


def is_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: the lazy imports of transformers turn it into an ImportError."""
    seen: list[BaseException] = []
    left = [error]
    while left:
        each = left.pop()
        if isinstance(each, KeyboardInterrupt):
            return True
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            left += [each.__cause__, each.__context__]
    return False


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Turn the import error of a missing package into one that names its extra.

    A torchvision that does not fit torch is named as the cause: transformers reports other modules as missing then.
    Raises KeyboardInterrupt where Ctrl-C ended the import.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if is_interrupted(error):
            raise KeyboardInterrupt from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "torchvision" in str(cause):
            raise ImportError(
                f"{what} needs transformers, and the torchvision here does not fit torch and breaks it ({cause}); "
                f"{FIT_TORCHVISION}"
            ) from error
        if error.name not in EXTRAS:
            raise
        package, extra = EXTRAS[error.name]
        raise ImportError(
            f"{what} needs {package}, which is missing; pip install 'carve-kernels[{extra}]'", name=error.name
        ) from error
