"""The embedded small model and its training scenes."""

from __future__ import annotations

from pathlib import Path


def small() -> Path:
    """The directory of the embedded model: weights, processor, card and carve.json."""
    return Path(__file__).resolve().parent / "small"
