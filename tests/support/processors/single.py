"""Processors of families with one grid an image."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.processors.kinds import image_processor, processor, template, tokenizer

QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|nl|>")
QWEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
QWEN_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}


def qwen(name: str, video: str, patch: int = 14) -> Any:
    images = image_processor("qwen2_vl", "Qwen2VLImageProcessor")(size=QWEN_SIZE, patch_size=patch)
    videos = getattr(transformers, video)(patch_size=patch)
    return getattr(transformers, name)(images, tokenizer(QWEN_TOKENS, QWEN_NAMES), videos, chat_template=QWEN_TEMPLATE)


@processor()
def qwen2_vl() -> Any:
    return qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor")


@processor()
def qwen3_vl() -> Any:
    return qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)
