"""The kinds of layouts, each of which is a module of this package that `hf.families` names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from carve_kernels.hf.families import Family


def kind_of(family: Family) -> Any:
    """The module of a family's kind.

    ========  =====================================================================================================
    views     (image or video, tokens) -> its views; its tokens are taken from the cursor `tokens`
    settings  (config, processor) -> (name, found, expected) for each setting of the processor that must agree with
              the model's config; optional
    canvas    (config, processor, size) -> the smallest canvas of an image that the processor does not crop, as
              (size, top, left); optional, without it images are never cropped
    ========  =====================================================================================================
    """
    return import_module(f"{__package__}.{family.kind}")


def check_settings(family: Family, config: Any, processor: Any) -> None:
    """Raise ValueError at the first setting of a processor that does not agree with the model's config."""
    settings = getattr(kind_of(family), "settings", None)
    for name, found, expected in settings(config, processor) if settings else ():
        if found != expected:
            raise ValueError(
                f"processor: {name} is {found!r}, expected {expected!r} as in the model's config; "
                f"set processor.{name} = {expected!r}, or write it into the processor's file in the checkpoint"
            )
