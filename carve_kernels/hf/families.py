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


_QUERIES = "each one is a learned query that attends to the whole image"
_MERGED = Family("merged_grid")
_PIXTRAL = {"patch_size": "vision_config.patch_size", "spatial_merge_size": "spatial_merge_size"}
_PIXTRAL_CELL = ("vision_config.patch_size", "spatial_merge_size")
_SQUARE = Family("padded_square")

FAMILIES: dict[str, Family] = {
    "chameleon": Family("centre_crop", {"halvings": "vq_config.channel_multiplier"}),
    "cosmos3_edge": _MERGED,
    "deepseek_vl": _SQUARE,
    "emu3": Family(
        "sized_grid",
        {"halvings": "vq_config.channel_multiplier", "newlines": True, "settings": {"downsample_ratio": None}},
    ),
    "ernie4_5_vl_moe": _MERGED,
    "exaone4_5": _MERGED,
    "fuyu": Family("padded_grid", {"cell": ("patch_size",)}),
    "gemma3": Family("pan_and_scan", {"tokens": "mm_tokens_per_image"}, placeholder=True),
    "gemma4": Family("patch_positions"),
    "gemma4_unified": Family("patch_positions", {"pooled": True}),
    "got_ocr2": Family("centre_crop", {"cell": ("vision_config.patch_size", 4)}),
    "glm46v": _MERGED,
    "glm4v": _MERGED,
    "glm4v_moe": _MERGED,
    "glm_ocr": _MERGED,
    "hunyuan_vl": Family("merged_grid", {"lines": True}),
    "hyperclovax_vision_v2": _MERGED,
    "janus": _SQUARE,
    "kimi_k25": Family(
        "padded_grid",
        {
            "resize": "navit_resize",
            "merge": "vision_config.merge_kernel_size",
            "cell": ("vision_config.patch_size", "vision_config.merge_kernel_size"),
        },
    ),
    "lfm3_vl": _MERGED,
    "lighton_ocr": Family(
        "sized_grid", {"cell": _PIXTRAL_CELL, "settings": {**_PIXTRAL, "effective_patch_size": None}}
    ),
    "llava": Family("centre_crop", {"class_token": True}),
    "minimax_m3_vl": _MERGED,
    "mistral3": Family("sized_grid", {"cell": _PIXTRAL_CELL, "settings": _PIXTRAL}),
    "muse_glimmer": Family("merged_grid", {"merge": "vision_config.merge_size"}),
    "paddleocr_vl": _MERGED,
    "paligemma": Family("centre_crop"),
    "qwen2_5_omni_thinker": _MERGED,
    "qwen2_5_vl": _MERGED,
    "qwen2_vl": _MERGED,
    "qwen3_5": _MERGED,
    "qwen3_5_moe": _MERGED,
    "qwen3_omni_moe_thinker": _MERGED,
    "qwen3_vl": _MERGED,
    "qwen3_vl_moe": _MERGED,
    "qwen4_exp": _MERGED,
    "video_llama_3": Family("merged_grid", {"entry": "image_merge_sizes"}),
    "vipllava": Family("centre_crop", {"class_token": True}),
}
"""The layout of each model type."""

BY_PROCESSOR: dict[tuple[str, str], Family] = {
    ("llava", "PixtralProcessor"): Family("sized_grid", {"settings": {**_PIXTRAL, "spatial_merge_size": 1}}),
}
"""The layout of model types that are used with several processors, by model type and class of the processor."""


def family_of(model_type: str, processor: Any) -> Family | None:
    """The family of a model type and a processor; None for one that is not listed."""
    listed = (BY_PROCESSOR.get((model_type, kind.__name__)) for kind in type(processor).__mro__)
    return next((family for family in listed if family is not None), FAMILIES.get(model_type))


def supported() -> str:
    """The model types that have a layout, for a message."""
    return ", ".join(sorted(name for name, family in FAMILIES.items() if family.kind is not None))
