"""Processors of families that are made for videos."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.processors.kinds import CROP, image_processor, processor, template, tokenizer
from tests.support.processors.tiles import llava_next_images


@processor()
def llava_next_video() -> Any:
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**CROP),
        llava_next_images(),
        tokenizer(("<image>", "<video>")),
        template("<image>", "<video>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@processor()
def video_llava() -> Any:
    return transformers.VideoLlavaProcessor(
        image_processor("video_llava", "VideoLlavaImageProcessor")(**CROP),
        transformers.VideoLlavaVideoProcessor(**CROP),
        tokenizer(("<image>", "<video>")),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )
