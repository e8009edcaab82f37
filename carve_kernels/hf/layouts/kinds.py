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
