"""The environments: a Python, and the releases of torch, transformers and Triton in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """An environment. None means the newest release for this Python; `known` says why it may fail to install."""

    name: str
    python: str
    torch: str | None = None
    transformers: str | None = None
    triton: str | None = None
    known: str | None = None

    def pinned(self, package: str) -> str:
        """A package as a requirement of pip."""
        version: str | None = getattr(self, package)
        return package if version is None else f"{package}=={version}.*"


ROWS = (
    Row("3.11-2.10", "3.11", "2.10", "5.12", "3.6"),
    Row("3.11-2.11", "3.11", "2.11", "5.17", "3.6"),
    Row("3.11-2.13", "3.11", "2.13", "5.24", "3.9"),
    Row("3.10", "3.10"),
    Row("3.12", "3.12"),
    Row("3.13", "3.13"),
)


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows with these names in the order of the table; all rows if there is no name."""
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise ValueError(f"ROWS: expected some of {' '.join(known)}, got {name}")
    return [row for row in ROWS if not names or row.name in names]
