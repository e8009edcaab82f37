"""Prompts about a video, and what a processor makes of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from carve_kernels.checks import text as check_text
from carve_kernels.extras import INSTALL_TORCHVISION
from carve_kernels.hf.image_inputs import moved, pixel_dtype
from carve_kernels.hf.inputs import image_token, template_of, text_settings
from carve_kernels.hf.model import input_device, unwrap
from carve_kernels.hf.processors import (
    RETURN_TOKEN_TYPES,
    is_for_training,
    is_pixels,
    is_text,
    is_without_videos,
    lacks_token_types,
    takes_settings,
)
from carve_kernels.hf.videos import Video

# How many seconds there are between two temporal patches of each video, by which models number positions.
_SECONDS = ("second_per_grid_ts", "video_second_per_grid")


def video_token(processor: Any) -> str:
    """The text that stands for a video in a prompt."""
    return str(getattr(processor, "video_token", "<video>"))


def check_takes_videos(model: Any, processor: Any) -> None:
    """Raise ValueError for a model or a processor that takes images only."""
    family = unwrap(model).config.model_type
    if is_without_videos(processor):
        raise ValueError(
            f"video: expected a processor of {family} with its video part, which needs torchvision; "
            f"{INSTALL_TORCHVISION}, and load it again"
        )
    if getattr(processor, "video_processor", None) is None:
        raise ValueError(f"video: expected a model that takes videos; {family} takes images only")


def build_video_prompt(processor: Any, text: str, n_videos: int = 1) -> str:
    """The prompt for videos and a text, by the chat template of the processor or its tokenizer, where there is one.

    Raises ValueError if the text is empty or contains the token of videos or of images, or if the template drops the
    video or the text.
    """
    check_text("text", text)
    token = video_token(processor)
    for kind, special in (("a video", token), ("an image", image_token(processor))):
        if special in text:
            raise ValueError(
                f"text: contains the {kind.split()[1]} token {special!r}, which stands for {kind}; remove it"
            )
    template = template_of(processor)
    if template is None:
        return token * n_videos + text
    content = [*({"type": "video"} for _ in range(n_videos)), {"type": "text", "text": text}]
    try:
        prompt: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        raise ValueError(f"processor: its chat template fails for a video ({error})") from error
    for what, wanted, expected in (("video token", token, n_videos), ("text", text, 1)):
        if prompt.count(wanted) != expected:
            raise ValueError(
                f"processor: its chat template has the {what} {prompt.count(wanted)} times in a prompt about "
                f"{n_videos} video(s), expected {expected}"
            )
    return prompt


def video_inputs(model: Any, processor: Any, videos: Video | Sequence[Video], prompt: str) -> dict[str, Any]:
    """The processor's entries for a prompt about videos, on the model's device; every frame of them is shown."""
    check_takes_videos(model, processor)
    given = [videos] if isinstance(videos, Video) else list(videos)
    count = prompt.count(video_token(processor))
    if count != len(given):
        raise ValueError(f"videos: the prompt has {count} video(s), got {len(given)}; give one video for each")
    options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": [video.metadata for video in given]}
    # Frames 1 or 3 pixels high would be taken for ones whose channels come first.
    options["input_data_format"] = "channels_last"
    options |= text_settings(processor, prompt)
    if hasattr(processor.video_processor, "use_token_compression"):
        # Tokens that were dropped would have no place.
        options["use_token_compression"] = False
    if lacks_token_types(processor, unwrap(model)):
        options |= RETURN_TOKEN_TYPES
    if not takes_settings(processor):
        # What it then makes of the frames is compared with them when their tokens are located.
        options = {}
    try:
        # SmolVLM's in 5.12 takes the videos of each prompt only, the others as well.
        frames = [[list(video.frames) for video in given]]
        inputs = processor(text=[prompt], videos=frames, return_tensors="pt", **options)
    except ValueError as error:
        sizes = " and ".join(f"{len(video)} x {video.size[0]} x {video.size[1]}" for video in given)
        cause = str(error).partition("\n")[0]
        raise ValueError(f"video: the processor refuses frames x height x width of {sizes} ({cause})") from error
    entries = {name: value for name, value in inputs.items() if not is_for_training(name)}
    for name in _SECONDS:
        if name in entries:
            # Processors compute them as if the frames were from the whole file, or two a second.
            patch = processor.video_processor.temporal_patch_size
            entries[name] = torch.tensor([patch * video.spacing for video in given])
    return moved(entries, input_device(model), pixel_dtype(model))


def divided(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the prompt without pixels (grids stay: positions need them), and those of the videos."""
    without_pixels = {name: value for name, value in inputs.items() if not is_pixels(name)}
    return without_pixels, {name: value for name, value in inputs.items() if not is_text(name)}
