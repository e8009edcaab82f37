"""From a picture and a text to model inputs: opening images, building prompts, one row of inputs."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

from carve_kernels.checks import describe, integer
from carve_kernels.checks import path as check_path
from carve_kernels.checks import text as check_text
from carve_kernels.ops.zoom import to_rgb

MAX_IMAGE_PIXELS = 178_956_970
"""The most pixels that `open_image` opens unless told otherwise: where Pillow itself stops by default."""

# What makes a picture of an orientation upright.
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_PILLOW_LIMIT = threading.Lock()


def open_image(image: str | os.PathLike[str] | Image.Image, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image as an upright RGB picture: EXIF-transposed, transparency over white, 16 bits scaled to 8.

    Raises ValueError if the file is missing, is no image or is cut off, if its pixels are floating-point, or if it has
    more than `max_image_pixels`; TypeError for anything that is neither a path nor a PIL image.
    """
    limit = integer("max_image_pixels", max_image_pixels, low=1)
    if isinstance(image, Image.Image):
        try:
            return _upright_rgb(image, limit)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"image: cannot be used ({error})") from error
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(f"image: expected a path or a PIL image, got {describe(image)}")
    path = check_path("image", image)
    # Path.is_file raises for a name that is too long.
    if not os.path.isfile(path):
        raise ValueError(f"image: {path} is {'no file' if os.path.exists(path) else 'missing'}")
    try:
        with _opened(path, limit) as opened:
            return _upright_rgb(opened, limit)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image: {path} is too large ({error}); raise max_image_pixels, or shrink it first") from error
    except MemoryError:
        raise
    except Exception as error:
        # A damaged file ends Pillow's decoders in errors of many kinds.
        raise ValueError(f"image: {path} cannot be read as an image ({error})") from error


def build_prompt(processor: Any, text: str, n_images: int = 1) -> str:
    """The prompt for `n_images` images and a text, by the processor's chat template where it has one.

    Raises ValueError if the text is empty or holds the image token, or if the template drops images.
    """
    check_text("text", text)
    count = integer("n_images", n_images, low=0)
    token = processor.image_token
    if token in text:
        raise ValueError(f"text: holds the image token {token!r}, which stands for an image; take it out")
    if not getattr(processor, "chat_template", None):
        return f"{token}\n" * count + text
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    prompt: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if prompt.count(token) != count:
        raise ValueError(
            f"processor: its chat template put {prompt.count(token)} image(s) in the prompt, expected {count}"
        )
    return prompt


def prepare(
    processor: Any,
    images: list[Image.Image],
    prompt: str,
    device: str | torch.device | None = None,
    max_pixels: int | None = None,
) -> Any:
    """Model inputs of one row from its images and its prompt, as `build_prompt` makes it.

    `max_pixels` bounds the resized image where the processor keeps the image's own shape (Qwen2-VL and kin); processors
    of a fixed size ignore it. The processor itself is not changed.

    Raises ValueError if prompt and images differ in number, or if the processor refuses an image (Qwen's refuse one
    that is 200 times longer than wide).
    """
    expected = prompt.count(processor.image_token)
    if expected != len(images):
        raise ValueError(f"images: the prompt has {expected} image(s), got {len(images)}; give one image for each")
    settings: dict[str, Any] = {}
    size = dict(getattr(processor.image_processor, "size", None) or {})
    if max_pixels is not None and set(size) == {"shortest_edge", "longest_edge"}:
        longest = integer("max_pixels", max_pixels, low=1)
        settings["images_kwargs"] = {
            "size": {"shortest_edge": min(size["shortest_edge"], longest), "longest_edge": longest}
        }
    first = getattr(processor.tokenizer, "bos_token", None)
    if first and prompt.startswith(first):
        # The template has put it there; the tokenizer would put another one before it.
        settings["add_special_tokens"] = False
    try:
        inputs = processor(images=images or None, text=[prompt], return_tensors="pt", **settings)
    except ValueError as error:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise ValueError(f"images: the processor refuses {sizes} pixels ({error})") from error
    return inputs if device is None else inputs.to(device)


def _opened(path: Path, limit: int) -> Image.Image:
    if limit <= MAX_IMAGE_PIXELS:
        return Image.open(path)
    # Pillow keeps its limit in a global: lift it for the length of one header only.
    with _PILLOW_LIMIT:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _upright_rgb(image: Image.Image, limit: int) -> Image.Image:
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"expected at least one pixel, got {width} x {height}")
    if width * height > limit:
        raise ValueError(
            f"{width} x {height} = {width * height} pixels, at most {limit} are opened; raise max_image_pixels, or "
            "shrink it first"
        )
    return to_rgb("image", _upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """A copy as of ImageOps.exif_transpose, which also writes the picture's notes anew and fails at damaged ones."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:
        # Notes that cannot be read say nothing.
        turn = None
    return image.copy() if turn is None else image.transpose(turn)
