"""Processors of families with several views of an image."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.processors.kinds import image_processor, processor, template, tokenizer


@processor()
def internvl() -> Any:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    size = {"height": 56, "width": 56}
    images = image_processor("got_ocr2", "GotOcr2ImageProcessor")(
        size=size, crop_to_patches=True, min_patches=1, max_patches=6
    )
    return transformers.InternVLProcessor(
        images,
        tokenizer(("<IMG_CONTEXT>", "<video>", "<img>", "</img>"), names),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
