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


_ROWS_AND_COLUMNS = {"tile": r"<row_(\d+)_col_(\d+)>", "last": True, "merge": "scale_factor"}
_SLICES = {
    "whole": "{image_start_token}",
    "first": "{image_end_token}{slice_start_token}",
    "column": "{slice_end_token}{slice_start_token}",
    "row": "{slice_end_token}.+{slice_start_token}",
    "after": "{image_end_token}|{slice_end_token}",
    "shapes": "target_sizes",
    "merge": (2, 4),
}

FAMILIES: dict[str, Family] = {
    "aya_vision": Family(
        "counted_tiles",
        {"between": r"{tile_token}_\d+|{tile_global_token}", "merge": "downsample_factor"},
        placeholder=True,
    ),
    "cohere2_vision": Family("counted_tiles", {"between": "{img_line_break_token}", "merge": "downsample_factor"}),
    "got_ocr2": Family("counted_tiles", {"pages": True, "merge": (4,)}),
    "granite4_vision": Family("unpadded_rows"),
    "granite_docling": Family(
        "marked_tiles",
        {
            **_ROWS_AND_COLUMNS,
            "whole": "{global_image_tag}",
            "optional": True,
            "merge": "vision_config.scale_factor",
            "fine": "tile_fine_mask",
        },
    ),
    "idefics3": Family("marked_tiles", {**_ROWS_AND_COLUMNS, "whole": "{global_image_tag}"}),
    "internvl": Family("counted_tiles", {"merge": "downsample_ratio"}),
    "lfm2_vl": Family(
        "marked_tiles",
        {
            "tile": r"<\|img_row_(\d+)_col_(\d+)\|>",
            "whole": "^{image_thumbnail_token}",
            "alone": "",
            "last": True,
            "optional": True,
            "shapes": "spatial_shapes",
            "merge": "downsample_factor",
        },
    ),
    "llama4": Family(
        "marked_tiles",
        {
            "first": "{start_of_img_token}",
            "column": "{tile_token}",
            "row": "{tile_global_token}",
            "whole": r"<\|image\|>",
            "last": True,
            "padded": True,
            "merge": "vision_config.pixel_shuffle_ratio",
        },
        placeholder=True,
    ),
    "llava": Family("centre_crop"),
    "llava_next": Family("unpadded_rows"),
    "llava_next_video": Family("unpadded_rows"),
    "llava_onevision": Family("unpadded_rows"),
    "minicpm_ocr": Family("marked_tiles", _SLICES),
    "minicpmv4_6": Family("marked_tiles", _SLICES),
    "minicpmv4_7": Family("marked_tiles", _SLICES),
    "molmo2": Family("low_and_high", placeholder=True),
    "ovis2": Family(
        "marked_tiles",
        {
            "whole": "<IMG_START>",
            "first": "^<IMG_GRID>",
            "column": "<IMG_COL>",
            "row": "<IMG_ROW>",
            "merge": "vision_config.hidden_stride",
        },
        placeholder=True,
    ),
    "qianfan_ocr": Family("counted_tiles", {"merge": "downsample_ratio"}),
    "qwen2_5_vl": Family("merged_grid"),
    "qwen2_vl": Family("merged_grid"),
    "smolvlm": Family("marked_tiles", {**_ROWS_AND_COLUMNS, "whole": "{global_image_token}"}),
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
