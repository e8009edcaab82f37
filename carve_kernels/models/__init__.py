"""The embedded small model and the scenes that it was trained on."""

from __future__ import annotations

from pathlib import Path


def small() -> Path:
    """The directory of the embedded model: weights, processor, card and carve.json."""
    return Path(__file__).resolve().parent / "small"
