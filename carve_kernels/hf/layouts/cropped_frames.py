"""The patches of the resized and maybe centre-cropped frames, pooled or not (LLaVA-NeXT-Video, Video-LLaVA).

===========  =======================================================================================================
option       meaning
===========  =======================================================================================================
pool         by which factor patches are pooled
rounded_up   pooled patches are interpolated, so that none is left out
class_token  each frame has further tokens before its patches, as many as the processor adds to an image
newline      there is a token after the last frame
===========  =======================================================================================================
"""

from __future__ import annotations

from math import ceil

from carve_kernels.hf.layouts.cells import PATCH, attribute, sides
from carve_kernels.hf.layouts.cropping import cropped_box
from carve_kernels.hf.layouts.processed_image import Cursor
from carve_kernels.hf.layouts.processed_video import ProcessedVideo
from carve_kernels.types import View


def views(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    """A view of each frame."""
    frames = video.item("pixel_values_videos", "[videos, frames, 3, H, W]")
    pixels, patch = tuple(frames.shape[-2:]), sides(attribute(video.config, PATCH))
    pool, is_rounded_up = video.options.get("pool", 1), video.options.get("rounded_up", False)
    cell = patch if is_rounded_up else (patch[0] * pool, patch[1] * pool)
    box = cropped_box(video, pixels, cell)
    rows, columns = pixels[0] // cell[0], pixels[1] // cell[1]
    grid = (ceil(rows / pool), ceil(columns / pool)) if is_rounded_up else (rows, columns)
    before = int(video.processor.num_additional_image_tokens) if video.options.get("class_token") else 0
    found = video.views(tokens, len(frames), grid, box, before=before)
    if video.options.get("newline"):
        tokens.take(1)
    return found
