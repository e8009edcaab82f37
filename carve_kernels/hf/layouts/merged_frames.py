"""The grid of merged patches from `video_grid_thw`, one for each temporal patch (Qwen2-VL and later, GLM-4V).

======  ============================================================================================================
option  meaning
======  ============================================================================================================
entry   the entry with the merge size of each video, as for `merged_grid`
mask    the entry that says which tokens were not dropped because they look like those of the frame before
======  ============================================================================================================
"""

from __future__ import annotations

from carve_kernels.hf.layouts.cells import merged
from carve_kernels.hf.layouts.merged_grid import merge_of
from carve_kernels.hf.layouts.processed_image import Cursor
from carve_kernels.hf.layouts.processed_video import ProcessedVideo
from carve_kernels.types import View


def views(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    """A view of the whole frames of each temporal patch."""
    made, *patches = video.item("video_grid_thw", "[videos, 3]").tolist()
    grid = merged("video_grid_thw", patches, merge_of(video))
    mask = video.options.get("mask")
    if mask and video.has(mask) and not bool(video.entry(mask).all()):
        raise ValueError(
            "inputs: tokens of the video were dropped because they look like those of the frame before, so they have "
            "no map of their own; call the processor with use_token_compression=False"
        )
    return video.views(tokens, made, grid, video.box, each=int(video.image_processor.temporal_patch_size))
