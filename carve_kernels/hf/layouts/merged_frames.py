"""The grid of merged patches from `video_grid_thw`, one for each temporal patch (Qwen2-VL and later, GLM-4V).

======  ============================================================================================================
option  meaning
======  ============================================================================================================
entry   the entry with the merge size of each video, as for `merged_grid`
mask    the entry that says which tokens were not dropped because they look like those of the frame before
======  ============================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from carve_kernels.hf.families import VIDEO_FAMILIES
from carve_kernels.hf.layouts.cells import PATCH, attribute, merged, settings_of, sides
from carve_kernels.hf.layouts.merged_patches import MERGE, merge_of
from carve_kernels.hf.layouts.processed_image import Cursor
from carve_kernels.hf.layouts.processed_video import ProcessedVideo
from carve_kernels.hf.layouts.seen import check_seen, patches_of
from carve_kernels.types import View


def settings(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """The sizes of patches of several frames, and how many are merged, if that is not said for each video."""
    expected = {"patch_size": PATCH, "temporal_patch_size": _frames_of_a_patch(config)}
    if "entry" not in VIDEO_FAMILIES[config.model_type].options:
        expected["merge_size"] = MERGE
    yield from settings_of(config, processor, {f"video_processor.{name}": each for name, each in expected.items()})


def views(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    """A view of the whole frames of each temporal patch."""
    made, *patches = video.item("video_grid_thw", "[videos, 3]").tolist()
    merge, each = merge_of(video), _frames_of_a_patch(video.config)
    grid = merged("video_grid_thw", patches, merge)
    mask = video.options.get("mask")
    if mask and video.has(mask) and not bool(video.entry(mask).all()):
        raise ValueError(
            "inputs: tokens of the video were dropped because they look like those of the frame before, so they have "
            "no map of their own; call the processor with use_token_compression=False"
        )
    found = video.views(tokens, made, grid, video.box, each=each)
    if not video.has("pixel_values_videos"):
        return found
    (group, frame), patch = video.clearest(each), sides(attribute(video.config, PATCH))
    pixels = video.entry("pixel_values_videos", "[patches, values]")
    if pixels.shape[1] != 3 * each * patch[0] * patch[1]:
        raise ValueError(
            f"inputs: expected pixel_values_videos of patches of {each} x {patch[0]} x {patch[1]} pixels, as in the "
            f"model's config, got {pixels.shape[1]} numbers a patch"
        )
    start = int(video.entry("video_grid_thw")[: video.number].prod(1).sum()) + group * patches[0] * patches[1]
    seen = patches_of(pixels[start:].view(-1, 3, each, patch[0] * patch[1])[:, :, 0], grid, merge, raster=False)
    check_seen(frame, video.box, grid, (merge[0] * patch[0], merge[1] * patch[1]), seen)
    return found


def _frames_of_a_patch(config: Any) -> int:
    return int(getattr(config.vision_config, "temporal_patch_size", 1))
