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


_QUERIES = Family(None, reason="each one is a learned query that attends to the whole image")
_CROSS = Family(None, reason="the image is read by cross-attention, its token only stands for it")
_MERGED = Family("merged_grid")
_PIXTRAL = {"patch_size": "vision_config.patch_size", "spatial_merge_size": "spatial_merge_size"}
_PIXTRAL_CELL = ("vision_config.patch_size", "spatial_merge_size")
_MISTRAL = Family("sized_grid", {"cell": _PIXTRAL_CELL, "settings": _PIXTRAL})
_MUSE = Family("merged_grid", {"merge": "vision_config.merge_size", "raster": True})
_SQUARE = Family("padded_square")
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
    "aria": _QUERIES,
    "aya_vision": Family(
        "counted_tiles",
        {"between": r"{tile_token}_\d+|{tile_global_token}", "merge": "downsample_factor"},
        placeholder=True,
    ),
    "blip": Family(None, reason="the image is read by cross-attention, no token stands for it"),
    "blip-2": _QUERIES,
    "chameleon": Family("centre_crop", {"halvings": "vq_config.channel_multiplier"}),
    "cohere2_vision": Family("counted_tiles", {"between": "{img_line_break_token}", "merge": "downsample_factor"}),
    "cohere_compass": _MERGED,
    "cosmos3_edge": _MERGED,
    "cosmos3_omni": _MERGED,
    "deepseek_ocr2": _QUERIES,
    "deepseek_vl": _SQUARE,
    "deepseek_vl_hybrid": Family("padded_square", {"first": "high_res_pixel_values"}),
    "emu3": Family(
        "sized_grid",
        {"halvings": "vq_config.channel_multiplier", "newlines": True, "settings": {"downsample_ratio": None}},
    ),
    "ernie4_5_vl_moe": _MERGED,
    "exaone4_5": _MERGED,
    "fast_vlm": Family("centre_crop", {"stride": "patch_size"}),
    "florence2": Family(None, reason="its encoder mixes them with the prompt"),
    "fuyu": Family("padded_grid", {"cell": ("patch_size",)}),
    "gemma3": Family("pan_and_scan", {"tokens": "mm_tokens_per_image"}, placeholder=True),
    "gemma3n": Family("centre_crop", {"square": "vision_soft_tokens_per_image"}),
    "gemma4": Family("patch_positions"),
    "gemma4_unified": Family("patch_positions", {"pooled": True}),
    "glm46v": _MERGED,
    "glm4v": _MERGED,
    "glm4v_moe": _MERGED,
    "glm_ocr": _MERGED,
    "glmga": _MERGED,
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
    "hunyuan_vl": Family("merged_grid", {"lines": True, "raster": True}),
    "hyperclovax_vision_v2": _MERGED,
    "idefics": _CROSS,
    "idefics2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "idefics3": Family("marked_tiles", {**_ROWS_AND_COLUMNS, "whole": "{global_image_tag}", "steps": True}),
    "internvl": Family("counted_tiles", {"merge": "downsample_ratio"}),
    "janus": _SQUARE,
    "kimi_k25": Family(
        "padded_grid",
        {
            "resize": "navit_resize",
            "raster": True,
            "merge": "vision_config.merge_kernel_size",
            "cell": ("vision_config.patch_size", "vision_config.merge_kernel_size"),
        },
    ),
    "kosmos-2": _QUERIES,
    "kosmos-2.5": _QUERIES,
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
    "lfm3_vl": _MERGED,
    "lighton_ocr": Family(
        "sized_grid", {"cell": _PIXTRAL_CELL, "settings": {**_PIXTRAL, "effective_patch_size": None}}
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
    "llava": Family("centre_crop", {"class_token": True}),
    "llava_next": Family("unpadded_rows"),
    "llava_next_video": Family("unpadded_rows"),
    "llava_onevision": Family("unpadded_rows"),
    "minicpm_ocr": Family("marked_tiles", _SLICES),
    "minicpmv4_6": Family("marked_tiles", _SLICES),
    "minicpmv4_7": Family("marked_tiles", _SLICES),
    "minimax_m3_vl": _MERGED,
    "mistral3": _MISTRAL,
    "mistral_large4": _MISTRAL,
    "mllama": _CROSS,
    "molmo2": Family("low_and_high", placeholder=True),
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
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
    "paddleocr_vl": Family("merged_grid", {"raster": True}),
    "paligemma": Family("centre_crop"),
    "phi4_multimodal": Family("masked_rows"),
    "qianfan_ocr": Family("counted_tiles", {"merge": "downsample_ratio"}),
    "qwen2_5_omni_thinker": _MERGED,
    "qwen2_5_vl": _MERGED,
    "qwen2_vl": _MERGED,
    "qwen3_5": _MERGED,
    "qwen3_5_moe": _MERGED,
    "qwen3_omni_moe_thinker": _MERGED,
    "qwen3_vl": _MERGED,
    "qwen3_vl_moe": _MERGED,
    "qwen4_exp": _MERGED,
    "smolvlm": Family("marked_tiles", {**_ROWS_AND_COLUMNS, "whole": "{global_image_token}", "steps": True}),
    "video_llama_3": Family("merged_grid", {"entry": "image_merge_sizes"}),
    "vipllava": Family("centre_crop", {"class_token": True}),
}
"""The layout of each model type."""

BY_PROCESSOR: dict[tuple[str, str], Family] = {
    ("llava", "PixtralProcessor"): Family("sized_grid", {"settings": {**_PIXTRAL, "spatial_merge_size": 1}}),
}
"""The layout of model types that are used with several processors, by model type and class of the processor."""


_MERGED_FRAMES = Family("merged_frames")
_GLM_FRAMES = Family("merged_frames", {"image_token": True})
_COMPRESSED = {"entry": "video_merge_sizes", "mask": "video_compression_mask"}

VIDEO_FAMILIES: dict[str, Family] = {
    "exaone4_5": _MERGED_FRAMES,
    "glm46v": _GLM_FRAMES,
    "glm4v": _GLM_FRAMES,
    "glm4v_moe": _GLM_FRAMES,
    "glm_ocr": _GLM_FRAMES,
    "hyperclovax_vision_v2": _MERGED_FRAMES,
    "internvl": Family("square_frames", {"image_token": True, "count": "image_seq_length"}),
    "lfm3_vl": _MERGED_FRAMES,
    "llava_next_video": Family("cropped_frames", {"pool": 2}),
    "llava_onevision": Family("cropped_frames", {"pool": 2, "rounded_up": True, "newline": True}),
    "qwen2_5_omni_thinker": _MERGED_FRAMES,
    "qwen2_5_vl": _MERGED_FRAMES,
    "qwen2_vl": _MERGED_FRAMES,
    "qwen3_5": _MERGED_FRAMES,
    "qwen3_5_moe": _MERGED_FRAMES,
    "qwen3_omni_moe_thinker": _MERGED_FRAMES,
    "qwen3_vl": _MERGED_FRAMES,
    "qwen3_vl_moe": _MERGED_FRAMES,
    "qwen4_exp": _MERGED_FRAMES,
    "smolvlm": Family("square_frames", {"image_token": True, "count": "image_seq_len", "squared": True}),
    "video_llama_3": Family("merged_frames", _COMPRESSED),
    "video_llava": Family("cropped_frames", {"class_token": True}),
}
"""The layout of the videos of each model type; `image_token` says that the tokens of a video are image tokens."""


def family_of(model_type: str, processor: Any) -> Family | None:
    """The family of a model type and a processor; None for one that is not listed."""
    listed = (BY_PROCESSOR.get((model_type, kind.__name__)) for kind in type(processor).__mro__)
    return next((family for family in listed if family is not None), FAMILIES.get(model_type))


def supported() -> str:
    """The model types that have a layout, for a message."""
    return ", ".join(sorted(name for name, family in FAMILIES.items() if family.kind is not None))
