"""For each family with a layout: settings for one image of about 1,024 tokens, and where its views then lie.

Names are those of the tests' processors. The image is three times as wide as high: strips, crops and tiles differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from carve_kernels.types import Box, Size

# (height, width) of a photograph of 3 million pixels: most models see less of it.
PHOTO = (1000, 3000)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
Part = tuple[Size, Box]
"""The grid of a view, and its box in shares of the image's sides."""


class LayoutCase(NamedTuple):
    """The views, in the order of the prompt; what is set in the model's config; and in its processor.

    `newlines` is the number of image tokens that are in no view.
    """

    parts: tuple[Part, ...]
    config: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    newlines: int = 0


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _canvases(side: int) -> list[list[int]]:
    return [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2))]


def _tiles(rows: int, columns: int, grid: Size) -> tuple[Part, ...]:
    return tuple(
        (grid, (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows))
        for row in range(rows)
        for column in range(columns)
    )


def _area(cell: int) -> dict[str, Any]:
    return {"image_processor.size": {"shortest_edge": 56 * 56, "longest_edge": 1024 * cell * cell}}


def _crop(side: int) -> dict[str, Any]:
    return {"image_processor.size": {"shortest_edge": side}, "image_processor.crop_size": _square(side)}


def _tile(side: int, **more: Any) -> dict[str, Any]:
    return {"image_processor.size": _square(side), **more}


_SIDE, _PATCH = "vision_config.image_size", "vision_config.patch_size"
_STRIP = ((18, 55), WHOLE)
_LONG_STRIP = ((19, 56), WHOLE)
_MIDDLE = ((32, 32), (1 / 3, 0.0, 2 / 3, 1.0))
_THREE_TILES = _tiles(1, 3, (16, 16))
_ALL: Part = ((16, 16), WHOLE)
_THREE = (*_THREE_TILES, _ALL)
_TWELVE = (*_tiles(2, 6, (8, 8)), ((8, 8), WHOLE))
_EIGHT_SLICES = (((6, 17), WHOLE), *_tiles(2, 4, (8, 12)))
_SIX_COLUMNS = {
    "image_processor.size": {"longest_edge": 3072},
    "image_processor.max_image_size": {"longest_edge": 512},
    "image_seq_len": 64,
}
_SIXTEEN: dict[str, Any] = {_PATCH: 16, _SIDE: 512}

CELLS_OF_28 = LayoutCase((_STRIP,), settings=_area(28))
CELLS_OF_32 = LayoutCase((_STRIP,), settings=_area(32))
# Their limit is for two frames.
TWO_FRAMES = LayoutCase(
    (_STRIP,), settings={"image_processor.size": {"shortest_edge": 56 * 56, "longest_edge": 2 * 1024 * 28 * 28}}
)
CENTRE_CROP = LayoutCase((_MIDDLE,), {_SIDE: 448}, _crop(448))
# The image has 149 rows of 448, from the 149th on.
PADDED_SQUARE = LayoutCase((((32, 32), (0.0, -1.0, 1.0, 299 / 149)),), {_SIDE: 448}, _tile(448, num_image_tokens=1024))
SOFT_TOKENS = LayoutCase((((19, 57), WHOLE),), settings={"image_processor.max_soft_tokens": 1120})
COUNTED = LayoutCase(_THREE, {_SIDE: [448, 448]}, _tile(448, image_seq_length=256))
ROWS = LayoutCase(
    (_ALL, ((16, 48), WHOLE)),
    {_SIDE: 224, "image_grid_pinpoints": _canvases(224)},
    {**_crop(224), "image_processor.image_grid_pinpoints": _canvases(224)},
    newlines=16,
)
MARKED = LayoutCase(_TWELVE, {**_SIXTEEN, "scale_factor": 4}, _SIX_COLUMNS)
SLICES = LayoutCase(_EIGHT_SLICES, settings={"image_processor.scale_resolution": 560})

CASES: dict[str, LayoutCase] = {
    "aya_vision": LayoutCase(_THREE, {_SIDE: 448}, _tile(448, img_size=448)),
    "chameleon": LayoutCase(
        (_MIDDLE,), {"vq_config.channel_multiplier": [1, 1, 2, 2, 4]}, {**_crop(512), "image_seq_length": 1024}
    ),
    "cohere2_vision": LayoutCase(
        _THREE, {_SIDE: 448}, _tile(448, **{"image_processor.patch_size": 16, "patch_size": 16})
    ),
    "cohere_compass": CELLS_OF_32,
    "cosmos3_edge": CELLS_OF_32,
    "cosmos3_omni": CELLS_OF_32,
    "deepseek_vl": PADDED_SQUARE,
    # The larger image, which comes first, has 341 rows of 1024, from the 341st on.
    "deepseek_vl_hybrid": LayoutCase(
        (((32, 32), (0.0, -1.0, 1.0, 683 / 341)),),
        {_SIDE: 448, "high_res_vision_config.image_size": 1024},
        _tile(448, **{"image_processor.high_res_size": _square(1024), "num_image_tokens": 1024}),
    ),
    "emu3": LayoutCase(
        (_STRIP,),
        {"vq_config.channel_multiplier": [1, 2, 2, 4]},
        {"image_processor.max_pixels": 1024 * 64, "image_processor.spatial_factor": 8, "downsample_ratio": 8},
        newlines=18,
    ),
    "ernie4_5_vl_moe": CELLS_OF_28,
    "exaone4_5": CELLS_OF_28,
    # Resized to 256 x 770, padded to rows of 14.
    "fast_vlm": LayoutCase((_MIDDLE,), settings=_crop(448)),
    "fuyu": LayoutCase(
        (((19, 55), (0.0, 0.0, 1.0, 266 / 256)),), settings={"image_processor.size": {"height": 392, "width": 770}}
    ),
    "gemma3": LayoutCase(
        (((32, 32), WHOLE),), {_SIDE: 896, "mm_tokens_per_image": 1024}, _tile(896, image_seq_length=1024)
    ),
    "gemma3n": LayoutCase(
        (((32, 32), WHOLE),), {"vision_soft_tokens_per_image": 1024}, _tile(448, image_seq_length=1024)
    ),
    "gemma4": SOFT_TOKENS,
    "gemma4_e": SOFT_TOKENS,
    "gemma4_unified": SOFT_TOKENS,
    "glm46v": TWO_FRAMES,
    "glm4v": TWO_FRAMES,
    "glm4v_moe": TWO_FRAMES,
    "glm_ocr": TWO_FRAMES,
    "glmga": TWO_FRAMES,
    "got_ocr2": LayoutCase((((32, 32), WHOLE),), settings=_tile(2048, num_image_tokens=1024)),
    "granite4_vision": LayoutCase(
        ROWS.parts,
        {_SIDE: 448, "image_grid_pinpoints": _canvases(448)},
        {**_crop(448), "image_processor.image_grid_pinpoints": _canvases(448)},
        newlines=16,
    ),
    "granite_docling": LayoutCase(
        _TWELVE,
        {**_SIXTEEN, "vision_config.scale_factor": 4},
        _tile(512, **{"image_processor.max_patches": 12, "image_seq_len": 64}),
    ),
    # A token before the first row, one behind each row, and one behind the last.
    "hunyuan_vl": CELLS_OF_32._replace(newlines=20),
    "hyperclovax_vision_v2": CELLS_OF_28,
    "idefics3": MARKED,
    "internvl": COUNTED,
    "janus": PADDED_SQUARE,
    # Resized to 519 x 1557, padded to cells of 28.
    "kimi_k25": LayoutCase(
        (((19, 56), (0.0, 0.0, 1568 / 1557, 532 / 519)),),
        settings={
            "image_processor.max_patches": 4096,
            "image_processor.size": {"max_height": 4096, "max_width": 4096},
        },
    ),
    "lfm2_vl": LayoutCase(
        (*_THREE_TILES, ((9, 27), WHOLE)),
        settings={
            "image_processor.tile_size": 512,
            "image_processor.min_image_tokens": 64,
            "image_processor.max_image_tokens": 256,
            "image_processor.max_num_patches": 1024,
            "image_processor.max_tiles": 4,
        },
    ),
    "lfm3_vl": CELLS_OF_32,
    "lighton_ocr": LayoutCase((_LONG_STRIP,), settings={"image_processor.size": {"longest_edge": 1568}}),
    "llama4": LayoutCase(_THREE, {_SIDE: 448}, _tile(448)),
    "llava": CENTRE_CROP,
    "llava_next": ROWS,
    "llava_next_video": ROWS,
    "llava_onevision": LayoutCase(
        ROWS.parts,
        ROWS.config,
        _tile(224, **{"image_processor.image_grid_pinpoints": _canvases(224), "num_image_tokens": 256}),
        newlines=16,
    ),
    "minicpm_ocr": LayoutCase(_EIGHT_SLICES, settings={"image_processor.scale_resolution": 280}),
    "minicpmv4_6": SLICES,
    "minicpmv4_7": SLICES,
    "minimax_m3_vl": CELLS_OF_28,
    "mistral3": LayoutCase((_LONG_STRIP,), settings={"image_processor.size": {"longest_edge": 1568}}),
    # 27 patches a side, pooled in pairs, the last with what is beyond the image.
    "mistral_large4": LayoutCase((_LONG_STRIP,), settings={"image_processor.size": {"longest_edge": 1568}}),
    "molmo2": LayoutCase(
        (((14, 14), (0.0, 0.0, 28 / 27, 28 / 27)), ((14, 42), (0.0, 0.0, 1.0, 28 / 27))),
        settings=_tile(378, **{"image_processor.max_crops": 6, "image_processor.overlap_margins": [4, 4]}),
    ),
    "muse_glimmer": LayoutCase((_STRIP,), settings={"image_processor.max_image_tokens": 1024}),
    # Its rows are cut one below the other, whatever the shape of the image.
    "muse_spark": LayoutCase((_STRIP,), settings={"image_processor.max_image_tokens": 1024}),
    "ovis2": LayoutCase(
        (_ALL, *_tiles(3, 1, (16, 16))),
        {_SIDE: 448, "vision_config.hidden_stride": 2},
        _tile(448, image_seq_length=256),
    ),
    "paddleocr_vl": CELLS_OF_28,
    "paligemma": LayoutCase(
        (((32, 32), WHOLE),),
        {_SIDE: 448},
        _tile(448, **{"image_processor.image_seq_length": 1024, "image_seq_length": 1024}),
    ),
    "phi4_multimodal": LayoutCase((((16, 48), WHOLE), _ALL), newlines=33),
    "pixtral": LayoutCase((_LONG_STRIP,), settings={"image_processor.size": {"longest_edge": 784}}),
    "qianfan_ocr": COUNTED,
    "qwen2_5_omni_thinker": CELLS_OF_28,
    "qwen2_5_vl": CELLS_OF_28,
    "qwen2_vl": CELLS_OF_28,
    "qwen3_5": CELLS_OF_32,
    "qwen3_5_moe": CELLS_OF_32,
    "qwen3_omni_moe_thinker": CELLS_OF_32,
    "qwen3_vl": CELLS_OF_32,
    "qwen3_vl_moe": CELLS_OF_32,
    "qwen4_exp": CELLS_OF_32,
    "smolvlm": MARKED,
    "video_llama_3": LayoutCase((_STRIP,), settings=_area(14)),
    "vipllava": CENTRE_CROP,
}


def expected(name: str, size: Size) -> Iterator[Part]:
    """The grids of a family's views and their boxes in pixels."""
    height, width = size
    for grid, (left, top, right, bottom) in CASES[name].parts:
        yield grid, (left * width, top * height, right * width, bottom * height)
