"""The families of models: the kind of layout of each model type, or why its image tokens have no place in the image."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class Family(NamedTuple):
    """A kind of layout, which is a module of `layouts`, and its options; or the reason why there is none.

    `placeholder` says that the processor's image token stands for an image in a prompt and is not the model's own.
    """

    kind: str | None
    options: Mapping[str, Any] = _NONE
    placeholder: bool = False
    reason: str | None = None


FAMILIES: dict[str, Family] = {
    "llava": Family("centre_crop"),
    "qwen2_5_vl": Family("merged_grid"),
    "qwen2_vl": Family("merged_grid"),
}
"""The layout of each model type."""

BY_PROCESSOR: dict[tuple[str, str], Family] = {}
"""The layout of model types that are used with several processors, by model type and class of the processor."""


def family_of(model_type: str, processor: Any) -> Family | None:
    """The family of a model type and a processor; None for one that is not listed."""
    listed = (BY_PROCESSOR.get((model_type, kind.__name__)) for kind in type(processor).__mro__)
    return next((family for family in listed if family is not None), FAMILIES.get(model_type))


def supported() -> str:
    """The model types that have a layout, for a message."""
    return ", ".join(sorted(name for name, family in FAMILIES.items() if family.kind is not None))
