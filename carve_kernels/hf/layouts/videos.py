"""Where the tokens of the videos of a batch are: each frame, or each few that a model puts together, has a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from carve_kernels.checks import describe, integer
from carve_kernels.hf import names
from carve_kernels.hf.families import VIDEO_FAMILIES, Family
from carve_kernels.hf.layouts.kinds import kind_of
from carve_kernels.hf.layouts.processed_image import Cursor
from carve_kernels.hf.layouts.processed_video import ProcessedVideo
from carve_kernels.hf.layouts.rows import by_row
from carve_kernels.hf.processors import TOKEN_TYPES
from carve_kernels.hf.videos import Video
from carve_kernels.types import Size, View, VisualLayout


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
    ids = inputs["input_ids"]
    is_video = _video_tokens(config, family, inputs, alone)
    if not is_video.any():
        raise ValueError("inputs: found no video token in the prompt; build it with a video")
    rows = by_row("videos", videos, len(ids), _is_video)
    for video in (video for row in rows for video in row):
        _check(video)
    kind, total, number = kind_of(family), sum(map(len, rows)), 0
    found: list[tuple[list[View], ...]] = []
    sizes = []
    for row, given in enumerate(rows):
        cursor = Cursor(ids[row], is_video[row], getattr(processor, "tokenizer", processor))
        of_row = []
        for video in given:
            frames, times = _frames(video, inputs, number, total)
            video = ProcessedVideo(
                config, processor, inputs, family.options, _size(video), number, total, frames=frames, times=times
            )
            of_row.append(kind.views(video, cursor))
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


def _video_tokens(config: Any, family: Family, inputs: Any, alone: bool) -> torch.Tensor:
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


def _check(video: Any) -> None:
    if isinstance(video, (list, tuple)) and not video:
        raise ValueError("videos: expected at least one frame in each video, got one without frames")
    if not _is_video(video):
        raise TypeError(f"videos: expected a Video, a list of frames or (frames, height, width), got {describe(video)}")


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
