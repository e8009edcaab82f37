"""The tokens of a vision tower that may have a class token, by the settings with which a processor counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carve_kernels.hf.layouts.cells import PATCH, settings_of

# The number of class tokens that a vision tower puts before its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def tower_settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The patch size, and what selects the tokens of a vision tower that may have a class token.

    Files of older processors lack them; transformers then counts with None, or one token too few.
    """
    yield from settings_of(config, processor, {"patch_size": PATCH})
    before = _CLASS_TOKENS.get(config.vision_config.model_type)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    count = getattr(processor, "num_additional_image_tokens", 0)
    if isinstance(count, int) and (before is None or extra_tokens(processor) == before - (strategy == "default")):
        return
    yield "vision_feature_select_strategy", getattr(processor, "vision_feature_select_strategy", strategy), strategy
    if before is None:
        raise ValueError(
            f"processor: num_additional_image_tokens is {count!r}, expected the number of tokens that the model's "
            "vision tower puts before its patches"
        )
    yield "num_additional_image_tokens", count, before


def stride_settings(processor: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """The settings by which the processor counts a token for each cell."""
    stride = getattr(processor, name, None)
    if not isinstance(stride, int):
        raise ValueError(
            f"processor: {name} is {stride!r}, expected the side of the cells of the model's vision tower in pixels, "
            "which its config does not have"
        )
    yield "vision_feature_select_strategy", getattr(processor, "vision_feature_select_strategy", None), "full"
    yield "num_additional_image_tokens", getattr(processor, "num_additional_image_tokens", 0), 0


def extra_tokens(processor: Any) -> int:
    """The number of image tokens in a prompt besides those of the patches; -1 if one is left out."""
    dropped = getattr(processor, "vision_feature_select_strategy", None) == "default"
    return int(getattr(processor, "num_additional_image_tokens", 0)) - dropped
