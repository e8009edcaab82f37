"""Frames that are stretched to a square, whose tokens the processor counts (InternVL, SmolVLM).

=======  ===========================================================================================================
option   meaning
=======  ===========================================================================================================
count    the processor's attribute with the tokens of a frame
squared  frames are stretched to a square whatever their size is, and `pixel_values` has a video's own dimension
=======  ===========================================================================================================
"""

from __future__ import annotations

from math import isqrt

from carve_kernels.hf.layouts.cropping import cropped_box
from carve_kernels.hf.layouts.processed_image import Cursor
from carve_kernels.hf.layouts.processed_video import ProcessedVideo
from carve_kernels.types import View


def views(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    """A view of each frame."""
    count = int(getattr(video.processor, video.options["count"]))
    side = isqrt(count)
    if side * side != count:
        raise ValueError(f"processor: expected a square number of tokens a frame, got {count}")
    if not video.options.get("squared"):
        # The frames of all videos follow each other.
        pixels = tuple(video.entry("pixel_values", "[frames, 3, H, W]").shape[-2:])
        return video.views(tokens, video.frames, (side, side), cropped_box(video, pixels, (1, 1)))
    made = len(video.item("pixel_values", "[videos, frames, 3, H, W]"))
    if made > video.frames and video.total > 1:
        raise ValueError(
            f"inputs: a video of {video.frames} frames was filled to the {made} of another one; give videos of as many "
            "frames"
        )
    return video.views(tokens, made, (side, side), video.box)
