"""From images and texts to model inputs: images are opened, prompts built, and both go through the processor."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.Image import Transpose

from carve_kernels.checks import describe, integer
from carve_kernels.checks import path as check_path
from carve_kernels.checks import text as check_text
from carve_kernels.hf.names import templates_of
from carve_kernels.hf.processors import (
    RETURN_TOKEN_TYPES,
    adds_image_token,
    counts_of_pixels,
    image_token,
    writes_prompts,
)
from carve_kernels.ops.zoom import orientation, to_rgb

MAX_IMAGE_PIXELS = 178_956_970
"""The most pixels that `open_image` opens unless told otherwise: where Pillow itself stops by default."""

BARE_PROMPTS = "no chat template: the prompt is the bare question; copy all files of the checkpoint"
"""The warning of `bare_prompts`."""

# Where Pillow looks for an orientation, in its order.
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# The transposition that makes an image of each EXIF orientation upright.
_TRANSPOSITIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# The tokens around an image in Qwen's templates.
_IMAGE_MARKS = ("<|vision_start|>", "<|vision_end|>")
_PILLOW_LIMIT = threading.Lock()


def open_image(image: str | os.PathLike[str] | Image.Image, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image as upright RGB: EXIF-transposed, transparency over white, 16 bits scaled to 8.

    The result has none of the file's EXIF and XMP entries, so it is not rotated twice.

    Raises ValueError if the file is missing, is not an image or is truncated, if its pixels are floating-point, or if
    it has more than `max_image_pixels`; TypeError for anything but a path or a PIL image.
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
        raise ValueError(f"image: {path} is {'not a file' if os.path.exists(path) else 'missing'}")
    try:
        with _opened(path, limit) as opened:
            return _upright_rgb(opened, limit)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image: {path} is too large ({error}); raise max_image_pixels, or shrink it first") from error
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise errors of many kinds for a damaged file.
        raise ValueError(f"image: {path} cannot be read as an image ({error})") from error


def build_prompt(processor: Any, text: str, n_images: int = 1) -> str:
    """The prompt for `n_images` images and a text, by the chat template of the processor, or else of its tokenizer.

    A text-only template, which takes no list of parts, gets the image tokens before the text, as without a template.

    Raises ValueError if the text is empty or contains the image token, if the template drops images or the text, or if
    there are several templates and none is the default.
    """
    check_text("text", text)
    count = integer("n_images", n_images, low=0)
    token = image_token(processor)
    if token in text:
        raise ValueError(f"text: contains the image token {token!r}, which stands for an image; remove it")
    flat = _image_in_text(processor) * count + text
    template = template_of(processor)
    if template is None:
        return flat
    parts = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": text}]
    faults: list[str] = []
    for content in (parts, flat):
        try:
            prompt: str = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:
            # A text-only template fails on a list: it concatenates it to a text, or calls a method of texts.
            faults.append(f"fails ({error})")
            continue
        fault = _fault(prompt, token, count, text)
        if fault is None:
            return prompt
        faults.append(fault)
    raise ValueError(f"processor: its chat template {faults[0]}")


def bare_prompts(processor: Any) -> str | None:
    """A warning of prompts that no chat template makes, unless the processor writes them or takes the text alone."""
    if adds_image_token(processor) or writes_prompts(processor) or template_of(processor) is not None:
        return None
    return BARE_PROMPTS


def images_in(processor: Any, prompt: str, images: int) -> int:
    """How many images a prompt is for; of a processor that adds the token of its one image, one of those given."""
    return min(1, images) if adds_image_token(processor) else prompt.count(image_token(processor))


def prepare(
    processor: Any,
    images: list[Image.Image],
    prompt: str,
    device: str | torch.device | None = None,
    max_pixels: int | None = None,
    token_types: bool = False,
) -> Any:
    """Model inputs of one prompt, as `build_prompt` returns it, and its images.

    `max_pixels` bounds the resized image if the processor keeps the aspect ratio (Qwen2-VL and kin), and never raises
    the processor's own bound; processors of a fixed size ignore it. `token_types` asks for the types of the tokens,
    which a model may need although its processor does not return them by default. The processor itself is not changed.

    Raises ValueError if prompt and images differ in number, or if the processor refuses an image (Qwen's refuse one
    that is 200 times longer than wide).
    """
    expected = images_in(processor, prompt, len(images))
    if expected != len(images):
        raise ValueError(f"images: the prompt has {expected} image(s), got {len(images)}; give one image for each")
    settings: dict[str, Any] = {}
    bounds = (
        None if max_pixels is None else _bounds(processor.image_processor, integer("max_pixels", max_pixels, low=1))
    )
    if bounds is not None:
        settings["images_kwargs"] = bounds
    if token_types:
        settings |= RETURN_TOKEN_TYPES
    settings |= text_settings(processor, prompt)
    try:
        inputs = processor(images=images or None, text=[prompt], return_tensors="pt", **settings)
    except ValueError as error:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise ValueError(f"images: the processor refuses {sizes} pixels ({error})") from error
    return inputs if device is None else inputs.to(device)


def text_settings(processor: Any, prompt: str) -> dict[str, Any]:
    """What a processor has to be told about a prompt that a template may have made."""
    first = getattr(processor.tokenizer, "bos_token", None)
    # The template has added it; the tokenizer would add another one.
    return {"add_special_tokens": False} if first and prompt.startswith(first) else {}


def _image_in_text(processor: Any) -> str:
    """What represents an image in a text: its token between marks that the tokenizer knows, or on a line."""
    if adds_image_token(processor):
        return ""
    token = image_token(processor)
    if writes_prompts(processor):
        return token
    tokenizer = processor.tokenizer
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in _IMAGE_MARKS]
    if None in marks or tokenizer.unk_token_id in marks:
        return f"{token}\n"
    return token.join(_IMAGE_MARKS)


def template_of(processor: Any) -> str | None:
    """The chat template of a processor, or else of its tokenizer; of several named ones the default.

    Raises ValueError if there are several and none is the default.
    """
    for _, named in templates_of(processor):
        if "default" not in named and len(named) > 1:
            raise ValueError(
                f"processor: expected a chat template named default, got {', '.join(map(repr, named))}; set "
                "processor.chat_template to one of them"
            )
        return next(iter(named.values()))
    return None


def _fault(prompt: str, token: str, count: int, text: str) -> str | None:
    """What is wrong with a prompt that a chat template made, or None."""
    # A text-only template may print a list of parts as Python or JSON.
    if any(prompt.count(key) > text.count(key) for key in ("'type'", '"type"')):
        return "prints the parts of a message"
    if prompt.count(token) != count:
        return f"put {prompt.count(token)} image(s) in the prompt, expected {count}"
    return None if text.strip() in prompt else "drops the text"


def _bounds(settings: Any, max_pixels: int) -> dict[str, Any] | None:
    """The size arguments for an image processor that bounds the pixels of an image, None for another one."""
    size = dict(getattr(settings, "size", None) or {})
    if set(size) != {"shortest_edge", "longest_edge"}:
        return None
    max_pixels *= counts_of_pixels(settings)
    # Each edge is a number of pixels here. Attributes of these names override the size, in every call.
    attributes = {name: getattr(settings, name, None) for name in ("min_pixels", "max_pixels")}
    lowest, highest = (
        attributes["min_pixels"] or size["shortest_edge"],
        attributes["max_pixels"] or size["longest_edge"],
    )
    longest = min(highest or max_pixels, max_pixels)
    shortest = min(lowest or longest, longest)
    bounds: dict[str, Any] = {"size": {"shortest_edge": shortest, "longest_edge": longest}}
    for name, value in (("min_pixels", shortest), ("max_pixels", longest)):
        if attributes[name] is not None:
            bounds[name] = value
    return bounds


def _opened(path: Path, limit: int) -> Image.Image:
    if limit <= MAX_IMAGE_PIXELS:
        return Image.open(path)
    # Pillow's limit is a global: lift it while one header is read.
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
    upright = to_rgb("image", _upright(image))
    for key in _ORIENTATION_KEYS:
        upright.info.pop(key, None)
    return upright


def _upright(image: Image.Image) -> Image.Image:
    """A copy as by ImageOps.exif_transpose, which also rewrites the EXIF entries and fails on damaged ones."""
    transposition = _TRANSPOSITIONS.get(orientation(image))
    return image.copy() if transposition is None else image.transpose(transposition)
