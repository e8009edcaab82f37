"""fit="pad": images are padded to a canvas that the processor does not crop; boxes stay in pixels of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from carve_kernels import checks
from carve_kernels.hf.layouts import canvas_of, layout_of
from carve_kernels.presets import FITS
from carve_kernels.types import Box, Size, VisualLayout


class Letterbox:
    """Pads images for a model and its processor."""

    def __init__(self, model: Any, processor: Any, max_image_pixels: int) -> None:
        self._model, self._processor, self._limit = model, processor, max_image_pixels

    def pad(self, image: Image.Image) -> Image.Image:
        """The image centred on its canvas of the processor's mean colour; the image itself if it is not cropped."""
        (height, width), top, left = self._canvas(image)
        if (width, height) == image.size:
            return image
        padded = Image.new("RGB", (width, height), self._colour)
        padded.paste(image, (left, top))
        return padded

    def layout(self, inputs: Any, images: Sequence[Image.Image]) -> VisualLayout:
        """`layout_of` the inputs of one prompt about padded images, in pixels of the images themselves."""
        canvases = [self._canvas(image) for image in images]
        layout = layout_of(self._model, self._processor, inputs, [[size for size, _, _ in canvases]])
        views = tuple(replace(view, box=_shift(view.box, *canvases[view.image][1:])) for view in layout.views[0])
        return replace(layout, views=(views,), sizes=(tuple((image.height, image.width) for image in images),))

    @classmethod
    def of(cls, fit: str | None, model: Any, processor: Any, max_image_pixels: int) -> Letterbox | None:
        """The letterbox of a `fit` argument; None leaves images to the processor."""
        checks.choice("fit", fit, FITS)
        return None if fit is None else cls(model, processor, max_image_pixels)

    @property
    def _colour(self) -> tuple[int, ...]:
        mean = tuple(getattr(self._processor.image_processor, "image_mean", None) or ())
        # Truncated, not rounded, as in LLaVA's own padding.
        return tuple(int(255 * channel) for channel in mean) if len(mean) == 3 else (0, 0, 0)

    def _canvas(self, image: Image.Image) -> tuple[Size, int, int]:
        canvas = canvas_of(self._model, self._processor, (image.height, image.width))
        height, width = canvas[0]
        if (width, height) != image.size and width * height > self._limit:
            raise ValueError(
                f"fit: an image of {image.width} x {image.height} needs a canvas of {width} x {height} pixels, the "
                f"limit is {self._limit}; shrink the image, or raise max_image_pixels"
            )
        return canvas


def _shift(box: Box, top: int, left: int) -> Box:
    """A box on the canvas, in pixels of the image."""
    return box[0] - left, box[1] - top, box[2] - left, box[3] - top
