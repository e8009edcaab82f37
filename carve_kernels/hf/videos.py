"""Open videos: some frames of a file, upright, with the time of each."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from PIL import Image
from PIL.Image import Transpose

from carve_kernels.checks import describe, integer, number
from carve_kernels.checks import path as check_path
from carve_kernels.extras import needed_by
from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS
from carve_kernels.types import Size, brief

MAX_FRAMES = 32
"""The most frames that `open_video` takes unless told otherwise."""

MAX_PIXELS = 2**30
"""The most pixels that the frames of a video may have together: 3 GiB in memory."""

Progress = Callable[[int, int], None]

_LOG = logging.getLogger("carve_kernels")

# By the degrees that a file's display matrix turns its frames, counterclockwise.
_TURNED = {90: Transpose.ROTATE_90, 180: Transpose.ROTATE_180, -180: Transpose.ROTATE_180, -90: Transpose.ROTATE_270}


@dataclass(frozen=True)
class Video:
    """Frames of a video, in the order of time.

    ========  =============  ==================================================================================
    name      type           meaning
    ========  =============  ==================================================================================
    frames    PIL images     upright RGB, all of one size
    seconds   floats         when each frame begins, from the beginning of the video
    duration  float          when the video ends
    fps       float          frames per second of the whole video, on the average
    total     int            number of frames of the whole video
    path      str or None    the file
    ========  =============  ==================================================================================
    """

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    duration: float
    fps: float
    total: int
    path: str | None = None

    def __repr__(self) -> str:
        size = f"{self.size[1]} x {self.size[0]}"
        return brief(self, frames=len(self.frames), size=size, duration=self.duration, path=self.path)

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("frames: expected at least one frame, got none")
        if len(self.seconds) != len(self.frames):
            raise ValueError(f"seconds: expected one for each of {len(self.frames)} frames, got {len(self.seconds)}")
        if any(later <= earlier for earlier, later in pairwise(self.seconds)):
            raise ValueError(f"seconds: expected ascending times, got {(*self.seconds,)}")
        for index, frame in enumerate(self.frames):
            if not isinstance(frame, Image.Image):
                raise TypeError(f"frames[{index}]: expected a PIL image, got {describe(frame)}")
            if frame.mode != "RGB":
                raise ValueError(f"frames[{index}]: expected an RGB image, got mode {frame.mode}; convert it first")
        sizes = {frame.size for frame in self.frames}
        if len(sizes) > 1:
            raise ValueError(f"frames: expected frames of one size, got {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> Size:
        """(height, width) of a frame."""
        return self.frames[0].height, self.frames[0].width

    @property
    def metadata(self) -> dict[str, Any]:
        """What video processors take as `video_metadata`, beside `do_sample_frames=False`.

        They compute times as number / fps, so a frame's number is that of a video with a constant rate.
        """
        height, width = self.size
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "width": width,
            "height": height,
            "duration": self.duration,
            "video_backend": "pyav",
            "frames_indices": [round(second * self.fps) for second in self.seconds],
        }

    @property
    def spacing(self) -> float:
        """The mean time from a frame to the next one; of one frame how long it lasts, where that is known."""
        if len(self) > 1:
            return (self.seconds[-1] - self.seconds[0]) / (len(self) - 1)
        return self.duration - self.seconds[0] or 1 / self.fps

    def end(self, frame: int) -> float:
        """When a frame is followed by the next one that was taken, or the video ends."""
        return self.seconds[frame + 1] if frame + 1 < len(self.seconds) else self.duration

    def crop(self, box: Sequence[int], least: int = 1) -> Video:
        """The part x0 y0 f0 x1 y1 f1 of the video, as the box of its regions is given.

        Of fewer frames than `least` the ones before, and then those after, are added where the video has them.
        """
        x0, y0, f0, x1, y1, f1 = (integer(f"box[{index}]", edge) for index, edge in enumerate(box))
        height, width = self.size
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and 0 <= f0 < f1 <= len(self)):
            raise ValueError(
                f"box: expected a part of {len(self)} frames {width} wide and {height} high, got {(*box,)}"
            )
        f0 = max(0, min(f0, f1 - least))
        f1 = min(len(self), max(f1, f0 + least))
        frames = tuple(frame.crop((x0, y0, x1, y1)) for frame in self.frames[f0:f1])
        return replace(self, frames=frames, seconds=self.seconds[f0:f1], duration=self.end(f1 - 1))


def open_video(
    path: str | os.PathLike[str],
    *,
    max_frames: int = MAX_FRAMES,
    fps: float | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    progress: Progress | None = None,
) -> Video:
    """Open frames of a video file at equal distances in time, upright.

    ================  =============  ==========================================================================
    name              type           meaning
    ================  =============  ==========================================================================
    max_frames        int            take at most so many frames
    fps               float or None  take so many for each second, while `max_frames` allows; None = `max_frames`
    max_image_pixels  int            refuse frames of more pixels
    progress          callable       called with the number of frames that were decoded, and how many have to be
    ================  =============  ==========================================================================

    The video is divided into as many equal times as frames are taken, and each is the one in the middle of its time.
    Damaged frames are left out, with a warning.

    Raises ValueError if the file is missing, is no video, has no frames or no times, or has frames of too many pixels,
    each or together (`MAX_PIXELS`); TypeError for anything but a path; ImportError if PyAV is missing.
    """
    return open_frames(
        "path", path, max_frames=max_frames, fps=fps, max_image_pixels=max_image_pixels, progress=progress
    )


def open_frames(
    name: str,
    path: str | os.PathLike[str],
    *,
    max_frames: int = MAX_FRAMES,
    fps: float | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    progress: Progress | None = None,
) -> Video:
    """`open_video` for a path that was passed as the argument `name`, which errors name."""
    integer("max_frames", max_frames, low=1)
    integer("max_image_pixels", max_image_pixels, low=1)
    if fps is not None and number("fps", fps, low=0) == 0:
        raise ValueError(f"fps: expected a number above 0, got {describe(fps)}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function of two numbers or None, got {describe(progress)}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {describe(path)}")
    file = os.fspath(check_path(name, path))
    if not os.path.isfile(file):
        raise ValueError(f"{name}: {file} is {'not a file' if os.path.exists(file) else 'missing'}")
    with needed_by("a video"):
        import av
    try:
        times, duration, rate, (width, height) = _times(av, name, file, max_image_pixels)
        chosen = _choose(times, duration, max_frames, fps)
        if (most := MAX_PIXELS // (width * height)) < len(chosen):
            raise ValueError(
                f"max_frames: {len(chosen)} frames of {width} x {height} pixels are too many for the memory, at most "
                f"{most}"
            )
        kept = dict(_decode(av, name, file, [times[index] for index in chosen], progress))
    except av.error.FFmpegError as error:
        raise ValueError(f"{name}: {file} cannot be read as a video ({error.strerror})") from error
    if not kept:
        raise ValueError(f"{name}: {file} has no frames that can be decoded")
    if len(kept) < len(chosen):
        _LOG.warning(
            "video: %s is damaged, %d of %d frames cannot be decoded", file, len(chosen) - len(kept), len(chosen)
        )
    found = sorted(kept)
    start = times[0]
    return Video(
        tuple(kept[time] for time in found),
        tuple(float(time - start) for time in found),
        duration,
        rate,
        len(times),
        file,
    )


def _times(av: Any, name: str, file: str, most_pixels: int) -> tuple[list[Any], float, float, tuple[int, int]]:
    """When each frame begins, in seconds as fractions; how long all last; frames per second; width and height."""
    with av.open(file) as container:
        stream = _stream(container, name, file)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > most_pixels:
            raise ValueError(
                f"{name}: {file} is too large: {width} x {height} pixels a frame, at most {most_pixels}; raise "
                "max_image_pixels, or shrink it first"
            )
        packets = [packet for packet in container.demux(stream) if packet.size]
        if not packets:
            raise ValueError(f"{name}: {file} has no frames")
        if any(packet.pts is None for packet in packets):
            raise ValueError(f"{name}: {file} does not say when its frames are shown; write it in another container")
        times = sorted({packet.pts * stream.time_base for packet in packets})
        last = max(packets, key=lambda packet: packet.pts)
        # Of one frame, or of a file that does not say how long the last one lasts, the stream knows its rate.
        lasts = last.duration * stream.time_base if last.duration else 0
        if not lasts and stream.average_rate:
            lasts = 1 / stream.average_rate
        duration = float(times[-1] - times[0] + lasts)
    return times, duration, len(times) / duration if duration > 0 else 1.0, (width, height)


def _choose(times: list[Any], duration: float, most: int, fps: float | None) -> list[int]:
    """The numbers of the frames that are shown in the middle of equal parts of the time."""
    wanted = most if fps is None else min(most, max(1, round(duration * fps)))
    if wanted >= len(times):
        return list(range(len(times)))
    begins = [float(time - times[0]) for time in times]
    middles = (duration * (part + 0.5) / wanted for part in range(wanted))
    return sorted({bisect_right(begins, middle) - 1 for middle in middles})


def _decode(
    av: Any, name: str, file: str, times: list[Any], progress: Progress | None
) -> Iterator[tuple[Any, Image.Image]]:
    """The frames that begin at these times, upright."""
    wanted = set(times)
    with av.open(file) as container:
        stream = _stream(container, name, file)
        stream.thread_type = "AUTO"
        done = 0
        for frame in _frames(av, container, stream):
            if frame.pts is None or (time := frame.pts * frame.time_base) not in wanted:
                continue
            image = frame.to_image().convert("RGB")
            turned = _TURNED.get(frame.rotation)
            yield time, image if turned is None else image.transpose(turned)
            done += 1
            if progress is not None:
                progress(done, len(times))
            if done == len(times):
                return


def _frames(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a file, without those that are damaged."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def _stream(container: Any, name: str, file: str) -> Any:
    if not container.streams.video:
        raise ValueError(
            f"{name}: {file} has no video, only {', '.join(s.type for s in container.streams) or 'nothing'}"
        )
    return container.streams.video[0]
