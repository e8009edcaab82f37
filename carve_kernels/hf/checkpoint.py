"""Where a checkpoint lies on this machine: in a directory, in the package, or in the local hub cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from carve_kernels import checks
from carve_kernels.models import small

SMALL = "small"


class Checkpoint(NamedTuple):
    """A path that is there, and what to do where something in it is missing, or broken."""

    folder: Path
    mend: str
    mend_broken: str


def find(model: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint that a name means: a directory, "small" (the embedded model), or an id such as Org/Name.

    A directory goes before an id of its name. "small" is always the embedded model: a directory called so is "./small",
    or a Path, which is never a name. Nothing is downloaded.

    Raises TypeError or ValueError if the name means nothing here; for an id with the command that fetches it.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model: expected a directory, {SMALL!r} or an id, got {checks.describe(model)}")
    checks.path("model", model)
    name = os.fspath(model)
    if model == SMALL:
        return Checkpoint(small(), *["install carve_kernels again"] * 2)
    fetch = f"fetch it with: hf download {name}"
    found = locate(model)
    if found is not None:
        if os.path.exists(os.path.expanduser(name)):
            return Checkpoint(found, "copy it whole", "copy it again")
        # Without force it keeps a file that is there.
        return Checkpoint(found, fetch, f"{fetch} --force-download")
    if isinstance(model, str) and _is_id(name):
        raise ValueError(
            f"model: {name!r} is no directory, and the local hub cache has no main revision of a model of this id; "
            f"nothing is downloaded here: {fetch}"
        )
    raise ValueError(f"model: expected a checkpoint directory, {name} is missing")


def locate(name: str | os.PathLike[str]) -> Path | None:
    """The path itself where it is there, else the folder of this id in the local hub cache, or None."""
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if not isinstance(name, str) or not _is_id(name):
        return None
    try:
        # No file is named: what the loader needs is a part of what a model's page holds.
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
