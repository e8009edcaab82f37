"""What a kind of layout of videos is given: one video of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from carve_kernels.hf.layouts.processed_image import Cursor, ProcessedImage
from carve_kernels.types import Box, Size, View


@dataclass(frozen=True)
class ProcessedVideo(ProcessedImage):
    """One video of a batch; `frames` is the number of frames that the model is shown, and `times` when each begins and
    the last one ends, where that is known.
    """

    frames: int = 0
    times: tuple[float, ...] | None = None

    what: ClassVar[str] = "video"

    @property
    def image_processor(self) -> Any:
        return self.processor.video_processor

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
