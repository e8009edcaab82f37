"""Layouts of videos: a grid of tokens for each frame, or for each few frames that a model puts together.

=======  ===========================================================================================================
kind     meaning
=======  ===========================================================================================================
merged   the grid of merged patches from `video_grid_thw`, one for each temporal patch (Qwen2-VL and later, GLM-4V)
cropped  the patches of the resized and maybe centre-cropped frames, pooled or not (LLaVA-NeXT-Video, Video-LLaVA)
square   frames that are stretched to a square, whose tokens the processor counts (InternVL, SmolVLM)
=======  ===========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isqrt
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageStat

from carve_kernels.checks import describe, integer
from carve_kernels.hf import names
from carve_kernels.hf.layouts.cells import PATCH, attribute, check_settings, settings_of, sides
from carve_kernels.hf.layouts.centre_crop import box_of
from carve_kernels.hf.layouts.merged_grid import MERGE
from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.hf.layouts.seen import check_pixels, check_seen, patches_of
from carve_kernels.hf.processors import TOKEN_TYPES
from carve_kernels.hf.videos import Video
from carve_kernels.types import Box, Size, View, VisualLayout

_NONE: Mapping[str, Any] = MappingProxyType({})
# The pixels of a frame by which it is known how much it varies.
_POINTS = (16, 16)


class VideoFamily(NamedTuple):
    """A kind of layout of videos and its options.

    ===========  ===================================================================================================
    option       meaning
    ===========  ===================================================================================================
    image_token  the tokens of a video are image tokens
    merge_sizes  the entry with the merge size of each video
    mask         the entry that says which tokens were not dropped because they look like those of the frame before
    pool         by which factor patches are pooled
    rounded_up   pooled patches are interpolated, so that none is left out
    class_token  each frame has further tokens before its patches, as many as the processor adds to an image
    newline      there is a token after the last frame
    count        the processor's attribute with the tokens of a frame
    squared      frames are stretched to a square whatever their size is, and `pixel_values` has a video's own dimension
    ===========  ===================================================================================================
    """

    kind: str
    options: Mapping[str, Any] = _NONE


_MERGED = VideoFamily("merged")
_GLM = VideoFamily("merged", {"image_token": True})

VIDEO_FAMILIES: dict[str, VideoFamily] = {
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "internvl": VideoFamily("square", {"image_token": True, "count": "image_seq_length"}),
    "llava_next_video": VideoFamily("cropped", {"pool": 2}),
    "llava_onevision": VideoFamily("cropped", {"pool": 2, "rounded_up": True, "newline": True}),
    "qwen2_5_vl": _MERGED,
    "qwen2_vl": _MERGED,
    "qwen3_5": _MERGED,
    "qwen3_5_moe": _MERGED,
    "qwen3_vl": _MERGED,
    "qwen3_vl_moe": _MERGED,
    "smolvlm": VideoFamily("square", {"image_token": True, "count": "image_seq_len", "squared": True}),
    "video_llama_3": VideoFamily("merged", {"merge_sizes": "video_merge_sizes", "mask": "video_compression_mask"}),
    "video_llava": VideoFamily("cropped", {"class_token": True}),
}
"""The layout of the videos of each model type."""


@dataclass(frozen=True)
class ProcessedVideo(ProcessedImage):
    """One video of a batch; `frames` is the number of frames that the model is shown, and `times` when each begins and
    the last one ends, where that is known. `visible` are these frames, if all that were given are.
    """

    frames: int = 0
    times: tuple[float, ...] | None = None
    visible: Sequence[Image.Image] | None = None

    @property
    def image_processor(self) -> Any:
        return self.processor.video_processor

    def clearest(self, each: int = 1) -> tuple[int, ProcessedVideo]:
        """The number of the group of `each` frames whose first frame varies most, and the video with it as its image.

        Pixels are compared with that frame: an even one, as of a video that fades in, would tell nothing.
        """
        if self.visible is None:
            return 0, self
        first = self.visible[::each]
        numbers = range(len(first))
        number = max(
            numbers,
            key=lambda each: ImageStat.Stat(first[each].resize(_POINTS, Image.Resampling.NEAREST).convert("L")).var[0],
        )
        return number, replace(self, original=first[number])

    def item(self, name: str, shape: str | None = None) -> Any:
        """The item of this video in an entry that has one for each video."""
        found = self.entry(name, shape)
        if len(found) != self.total:
            raise ValueError(
                f"videos: the inputs hold {len(found)} video(s), got {self.total}; give every video of the prompts in "
                "order, one list a row, and select views afterwards by `view.image`"
            )
        return found[self.number]

    def views(self, tokens: Cursor, made: int, grid: Size, box: Box, *, each: int = 1, before: int = 0) -> list[View]:
        """The views of `made` groups of `each` frames, `before` tokens before each of them.

        The last group may have been filled with its last frame.
        """
        if made != ceil(self.frames / each):
            made_of = f"{made} frames" if each == 1 else f"{made} groups of {each} frames"
            raise ValueError(
                f"videos: the processor shows {made_of} of a video of {self.frames}; give the frames that it was "
                "shown, call it with do_sample_frames=False, or with return_metadata=True"
            )
        found = []
        for group in range(made):
            tokens.take(before)
            first, last = group * each, min((group + 1) * each, self.frames)
            seconds = None if self.times is None else (self.times[first], self.times[last])
            positions = tokens.take(grid[0] * grid[1])
            found.append(View(positions, grid, box, frame=(first, last), kind="frame", seconds=seconds))
        return found


@dataclass(frozen=True)
class LocatedVideos:
    """The videos of a batch: of each row its videos, and of each video its views and the size of its frames."""

    views: tuple[tuple[list[View], ...], ...]
    sizes: tuple[tuple[Size, ...], ...]
    image_token: int | None

    def layout(self) -> VisualLayout:
        """The layout of a batch without images."""
        rows = (
            tuple(replace(view, image=index) for index, video in enumerate(videos) for view in video)
            for videos in self.views
        )
        return VisualLayout(tuple(rows), self.sizes)

    def beside(self, images: VisualLayout) -> VisualLayout:
        """The layout with images as well, numbered together in the order of the prompt."""
        rows, sizes = [], []
        for row, (videos, frame_sizes) in enumerate(zip(self.views, self.sizes, strict=True)):
            of_images = [
                [view for view in images.views[row] if view.image == index] for index in range(len(images.sizes[row]))
            ]
            both = list(zip([*of_images, *videos], [*images.sizes[row], *frame_sizes], strict=True))
            both.sort(key=lambda each: int(each[0][0].tokens[0]))
            rows.append(tuple(replace(view, image=at) for at, (views, _) in enumerate(both) for view in views))
            sizes.append(tuple(size for _, size in both))
        return replace(images, views=tuple(rows), sizes=tuple(sizes))

    def without_videos(self, inputs: Any) -> dict[str, Any]:
        """The inputs as if no token of a video were an image token."""
        found = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        if self.image_token is not None:
            ids = inputs["input_ids"].clone()
            for row, videos in enumerate(self.views):
                for view in (view for video in videos for view in video):
                    ids[row, view.tokens.long()] = self.image_token + 1
            found["input_ids"] = ids
        return found


def video_layout(config: Any, processor: Any, inputs: Any, videos: Any, *, alone: bool = True) -> LocatedVideos:
    """Where the tokens of the videos of a batch are, `alone` or in prompts with images as well; see `layout_of`."""
    family = VIDEO_FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(VIDEO_FAMILIES))
        raise ValueError(f"videos: expected a model_type of {known}, got {config.model_type!r}")
    if getattr(processor, "video_processor", None) is None:
        raise ValueError("processor: expected one with a video processor, which needs torchvision")
    if family.kind == "merged":
        check_settings(_settings(config, processor, family.options))
    ids = inputs["input_ids"]
    is_video = _video_tokens(config, family, inputs, alone)
    if not is_video.any():
        raise ValueError("inputs: found no video token in the prompt; build it with a video")
    rows = _by_row(videos, len(ids))
    total, number = sum(map(len, rows)), 0
    found: list[tuple[list[View], ...]] = []
    sizes = []
    for row, given in enumerate(rows):
        cursor = Cursor(ids[row], is_video[row], getattr(processor, "tokenizer", processor))
        of_row = []
        for video in given:
            frames, times = _frames(video, inputs, number, total)
            all_of_them = not _is_shape(video) and len(video) == frames
            visible = (video.frames if isinstance(video, Video) else video) if all_of_them else None
            video = ProcessedVideo(
                config, processor, inputs, family.options, _size(video), number, total,
                frames=frames, times=times, visible=visible,
            )  # fmt: skip
            of_row.append(_KINDS[family.kind](video, cursor))
            number += 1
        if cursor.taken != len(cursor):
            raise ValueError(
                f"videos: row {row} has {len(cursor)} tokens of videos, the frames of {len(given)} video(s) need "
                f"{cursor.taken}; give the videos of each row as its own list, in the order of the prompt"
            )
        found.append(tuple(of_row))
        sizes.append(tuple(_size(video) for video in given))
    return LocatedVideos(
        tuple(found), tuple(sizes), names.image_id(config) if family.options.get("image_token") else None
    )


def has_images(images: Any) -> bool:
    """Whether there is any image in what `layout_of` takes."""
    return images is not None and (not isinstance(images, Sequence) or any(images))


def _settings(config: Any, processor: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The sizes of patches of several frames, and how many are merged, if that is not said for each video."""
    found = {"patch_size": PATCH, "temporal_patch_size": getattr(config.vision_config, "temporal_patch_size", 1)}
    merge = {} if "merge_sizes" in options else {"merge_size": MERGE}
    yield from settings_of(config, processor.video_processor, {**found, **merge}, "video_processor.")


def _video_tokens(config: Any, family: VideoFamily, inputs: Any, alone: bool) -> torch.Tensor:
    """Which tokens are those of videos. Raises ValueError where they cannot be told from those of images."""
    ids = inputs["input_ids"]
    if not family.options.get("image_token"):
        return ids == names.video_id(config)
    is_visual = ids == names.image_id(config)
    kinds = inputs.get(TOKEN_TYPES)
    if kinds is not None:
        return is_visual & (kinds == 2)
    if not alone:
        raise ValueError(
            f"videos: prompts of {config.model_type} have the same tokens for images and videos; give images in others"
        )
    return is_visual


def _merged(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    entry, mask = (video.options.get(name) for name in ("merge_sizes", "mask"))
    made, *patches = video.item("video_grid_thw", "[videos, 3]").tolist()
    merge = sides(int(video.item(entry)) if entry else attribute(video.config, MERGE))
    if patches[0] % merge[0] or patches[1] % merge[1]:
        raise ValueError(
            f"inputs: expected video_grid_thw of multiples of {merge[0]} x {merge[1]} patches, which the model merges, "
            f"got {patches[0]} x {patches[1]}"
        )
    if mask and video.has(mask) and not bool(video.entry(mask).all()):
        raise ValueError(
            "inputs: tokens of the video were dropped because they look like those of the frame before, so they have "
            "no map of their own; call the processor with use_token_compression=False"
        )
    grid, each = (patches[0] // merge[0], patches[1] // merge[1]), _frames_of_a_patch(video)
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


def _frames_of_a_patch(video: ProcessedVideo) -> int:
    return int(getattr(video.config.vision_config, "temporal_patch_size", 1))


def _cropped(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    frames = video.item("pixel_values_videos", "[videos, frames, 3, H, W]")
    pixels, patch = tuple(frames.shape[-2:]), sides(attribute(video.config, PATCH))
    pool, is_rounded_up = video.options.get("pool", 1), video.options.get("rounded_up", False)
    cell = patch if is_rounded_up else (patch[0] * pool, patch[1] * pool)
    box = box_of(video, pixels, cell)
    rows, columns = pixels[0] // cell[0], pixels[1] // cell[1]
    grid = (ceil(rows / pool), ceil(columns / pool)) if is_rounded_up else (rows, columns)
    before = int(video.processor.num_additional_image_tokens) if video.options.get("class_token") else 0
    found = video.views(tokens, len(frames), grid, box, before=before)
    number, frame = video.clearest()
    check_pixels(frame, box, (rows, columns), cell, frames[number])
    if video.options.get("newline"):
        tokens.take(1)
    return found


def _square(video: ProcessedVideo, tokens: Cursor) -> list[View]:
    count = int(getattr(video.processor, video.options["count"]))
    side = isqrt(count)
    if side * side != count:
        raise ValueError(f"processor: expected a square number of tokens a frame, got {count}")
    if not video.options.get("squared"):
        # The frames of all videos follow each other.
        frames = video.entry("pixel_values", "[frames, 3, H, W]")
        pixels = tuple(frames.shape[-2:])
        box = box_of(video, pixels, (1, 1))
        if len(frames) == video.frames:
            # Where those of a later one begin is not known.
            number, frame = video.clearest()
            check_pixels(frame, box, (side, side), (pixels[0] // side, pixels[1] // side), frames[number])
        return video.views(tokens, video.frames, (side, side), box)
    made = len(video.item("pixel_values", "[videos, frames, 3, H, W]"))
    if made > video.frames and video.total > 1:
        raise ValueError(
            f"inputs: a video of {video.frames} frames was filled to the {made} of another one; give videos of as many "
            "frames"
        )
    return video.views(tokens, made, (side, side), video.box)


_KINDS: dict[str, Callable[[ProcessedVideo, Cursor], list[View]]] = {
    "merged": _merged,
    "cropped": _cropped,
    "square": _square,
}


def _frames(video: Any, inputs: Any, number: int, total: int) -> tuple[int, tuple[float, ...] | None]:
    """How many frames of a video the model is shown, and when each begins and the last one ends, where that is known.

    Without the metadata of a processor that chose some of the frames, all that were given have to be shown.
    """
    count = video[0] if _is_shape(video) else len(video)
    listed = inputs.get("video_metadata")
    if listed is not None and len(listed) == total:
        entry = listed[number]
        named: Mapping[str, Any] = entry if isinstance(entry, Mapping) else vars(entry)
        chosen, fps, duration = named.get("frames_indices"), named.get("fps"), named.get("duration") or 0.0
        indices = [] if chosen is None else [int(index) for index in chosen]
        # Some processors fill the last group of this list, too. Frames of a `Video` may be closer than its mean rate.
        while len(indices) > (count if isinstance(video, Video) else 1) and indices[-1] == indices[-2]:
            indices.pop()
        if indices and len(indices) < count:
            # They make up a rate where they know none, but not how long the video is.
            times = [index / fps for index in indices] if fps and duration else None
            return len(indices), None if times is None else (*times, max(float(duration), times[-1]))
        if indices and fps and duration and not isinstance(video, Video):
            times = [index / fps for index in indices[:count]]
            return count, (*times, max(float(duration), times[-1])) if len(times) == count else None
    return count, (*video.seconds, video.duration) if isinstance(video, Video) else None


def _by_row(videos: Any, rows: int) -> list[list[Any]]:
    if _is_video(videos):
        videos = [videos]
    if not isinstance(videos, Sequence) or isinstance(videos, str):
        raise TypeError(f"videos: expected a list of videos or of lists of videos, got {describe(videos)}")
    nested = [[video] for video in videos] if all(map(_is_video, videos)) else [list(row) for row in videos]
    if rows == 1 and len(nested) > 1:
        nested = [[video for row in nested for video in row]]
    if len(nested) != rows:
        raise ValueError(
            f"videos: expected a list for each of the {rows} row(s) of the batch, got {len(nested)}; give one list of "
            "videos a row, in the order of the prompt"
        )
    for video in (video for row in nested for video in row):
        if isinstance(video, (list, tuple)) and not video:
            raise ValueError("videos: expected at least one frame in each video, got one without frames")
        if not _is_video(video):
            raise TypeError(
                f"videos: expected a Video, a list of frames or (frames, height, width), got {describe(video)}"
            )
    return nested


def _is_video(value: Any) -> bool:
    if isinstance(value, Video) or _is_shape(value):
        return True
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and (bool(value) and all(isinstance(frame, Image.Image) for frame in value))
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(side, int) for side in value)


def _size(video: Any) -> Size:
    """(height, width) of the frames of a video. Raises ValueError for one without frames."""
    if _is_shape(video):
        for name, side in zip(("frames", "height", "width"), video, strict=True):
            integer(f"videos: {name}", side, low=1)
        return video[1], video[2]
    if isinstance(video, Video):
        return video.size
    sizes = {(frame.height, frame.width) for frame in video}
    if len(sizes) > 1:
        raise ValueError(f"videos: expected frames of one size, got {sorted(sizes)}")
    found: Size = sizes.pop()
    return found
