"""Processors of models that few people use yet."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.processors.kinds import CROP, SQUARE, image_processor, processor, template, tokenizer
from tests.support.processors.single import (
    AREA,
    GLM_NAMES,
    GLM_TEMPLATE,
    GLM_TOKENS,
    PIXTRAL_TOKENS,
    pixtral_images,
    qwen,
)

FILLERS = tuple(f"<|unused{number}|>" for number in range(310))


@processor()
def cosmos3_omni() -> Any:
    return qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)


@processor()
def cohere_compass() -> Any:
    marks = ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
    return transformers.CohereCompassProcessor(
        image_processor("cohere_compass", "CohereCompassImageProcessor")(size=AREA, patch_size=16),
        tokenizer(marks),
        transformers.CohereCompassVideoProcessor(),
        chat_template=template("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
    )


@processor()
def glmga() -> Any:
    return transformers.Glm46VProcessor(
        image_processor("glmga", "GlmgaImageProcessor")(size=AREA),
        tokenizer(GLM_TOKENS, GLM_NAMES),
        transformers.GlmgaVideoProcessor(),
        chat_template=GLM_TEMPLATE,
    )


@processor()
def muse_spark() -> Any:
    marks = ("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>", *FILLERS[:3])
    special = ("<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>", *marks, "<|audio|>")
    return transformers.MuseSparkProcessor(
        image_processor=image_processor("muse_glimmer", "MuseGlimmerImageProcessor")(max_image_tokens=64),
        video_processor=transformers.MuseGlimmerVideoProcessor(),
        tokenizer=tokenizer(special),
        feature_extractor=transformers.MuseSparkFeatureExtractor(),
        chat_template=template("<|patch|>", "<|video|>"),
    )


@processor()
def deepseek_vl_hybrid() -> Any:
    """The larger image is four times as large, and no multiple of the smaller one."""
    large = {"height": 256, "width": 256}
    return transformers.DeepseekVLHybridProcessor(
        image_processor("deepseek_vl_hybrid", "DeepseekVLHybridImageProcessor")(size=SQUARE, high_res_size=large),
        tokenizer(("<image_placeholder>",), {"image_token": "<image_placeholder>"}),
        num_image_tokens=16,
        chat_template=template("<image_placeholder>"),
    )


@processor()
def gemma3n() -> Any:
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
    }
    marks = ("<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>", *FILLERS[:6])
    return transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        image_processor("siglip", "SiglipImageProcessor")(size=SQUARE, do_normalize=False),
        tokenizer((*marks, "<audio_soft_token>", "<start_of_audio>", "<end_of_audio>"), names),
        chat_template=template("<image_soft_token>"),
        image_seq_length=16,
    )


@processor()
def fast_vlm() -> Any:
    return transformers.LlavaProcessor(
        image_processor("clip", "CLIPImageProcessor")(**CROP),
        tokenizer(("<image>",), {"image_token": "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


@processor()
def mistral_large4() -> Any:
    return transformers.PixtralProcessor(
        pixtral_images(14),
        tokenizer(PIXTRAL_TOKENS),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )
