"""Processors of families with several views of an image."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import transformers

from tests.support.processors.kinds import CROP, SQUARE, image_processor, processor, template, tokenizer

PINPOINTS = [[56, 112], [112, 56], [112, 112]]
ROWS_AND_COLUMNS = [(row, column) for row in range(1, 7) for column in range(1, 7)]
IMG_CONTEXT = ("<IMG_CONTEXT>", "<video>", "<img>", "</img>")
IMG_CONTEXT_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
COHERE_TOKENS = ("<|IMG_PATCH|>", "<v>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>")


def got_ocr2_images(**settings: Any) -> Any:
    return image_processor("got_ocr2", "GotOcr2ImageProcessor")(size=SQUARE, **settings)


@processor()
def internvl() -> Any:
    return transformers.InternVLProcessor(
        got_ocr2_images(crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer(IMG_CONTEXT, IMG_CONTEXT_NAMES),
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )


@processor()
def qianfan_ocr() -> Any:
    return transformers.QianfanOCRProcessor(
        got_ocr2_images(crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer((*IMG_CONTEXT, "<image>"), IMG_CONTEXT_NAMES),
        image_seq_length=4,
        chat_template=template("<image>"),
    )


@processor()
def aya_vision() -> Any:
    return transformers.AyaVisionProcessor(
        got_ocr2_images(crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer((*COHERE_TOKENS, "<image>", "TILE", "TILE_GLOBAL")),
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=template("<image>"),
    )


@processor()
def cohere2_vision() -> Any:
    """As many tokens a tile as the square of patch_size."""
    names = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    return transformers.Cohere2VisionProcessor(
        transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, max_patches=6),
        tokenizer(COHERE_TOKENS, names),
        chat_template=template("<|IMG_PATCH|>"),
    )


def llava_next_images() -> Any:
    return image_processor("llava_next", "LlavaNextImageProcessor")(**CROP, image_grid_pinpoints=PINPOINTS)


@processor()
def llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        llava_next_images(),
        tokenizer(("<image>",)),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


@processor()
def granite4_vision() -> Any:
    return transformers.Granite4VisionProcessor(
        llava_next_images(),
        tokenizer(("<image>",)),
        patch_size=14,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        chat_template=template("<image>"),
    )


@processor()
def llava_onevision() -> Any:
    images = image_processor("llava_onevision", "LlavaOnevisionImageProcessor")(
        size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer(("<image>", "<video>")),
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )


@processor()
def idefics3() -> Any:
    images = image_processor("idefics3", "Idefics3ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 16}
    )
    marks = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    return transformers.Idefics3Processor(
        images, tokenizer(("<image>", "<v>", *marks)), image_seq_len=4, chat_template=template("<image>")
    )


@processor()
def smolvlm() -> Any:
    images = image_processor("smolvlm", "SmolVLMImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 16}
    )
    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    marks = [f"<row_{row}_col_{column}>" for row, column in ROWS_AND_COLUMNS]
    # A package that spells out the number of frames.
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):
        return transformers.SmolVLMProcessor(
            images,
            tokenizer(("<image>", "<video>", *list(names.values())[1:], "<end_of_utterance>", *marks), names),
            transformers.SmolVLMVideoProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 16}),
            image_seq_len=4,
            chat_template=template("<image>", "<video>"),
        )


@processor()
def ovis2() -> Any:
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    return transformers.Ovis2Processor(
        image_processor("ovis2", "Ovis2ImageProcessor")(size=SQUARE, crop_to_patches=True, max_patches=6),
        tokenizer(("<IMG_ATOM>", "<v>", "<a>", "<b>", "<c>", *marks, "<image>"), {"image_token": "<image>"}),
        image_seq_length=16,
        chat_template=template("<image>"),
    )


@processor()
def llama4() -> Any:
    marks = ("<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>")
    return transformers.Llama4Processor(
        transformers.Llama4ImageProcessor(size=SQUARE, max_patches=6),
        tokenizer(("<|patch|>", "<v>", *marks)),
        patch_size=14,
        chat_template=template("<|image|>"),
    )


@processor()
def molmo2() -> Any:
    marks = ("<im_start>", "<im_end>", "<im_col>", "<low_res_im_start>", "<frame_start>", "<frame_end>", "<|image|>")
    return transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(size=SQUARE, max_crops=6, overlap_margins=[1, 1]),
        transformers.Molmo2VideoProcessor(),
        tokenizer(("<im_patch>", "<im_low>", *marks, "<|video|>"), bos=False),
        chat_template=template("<|image|>", "<|video|>"),
    )


@processor()
def lfm2_vl() -> Any:
    images = transformers.Lfm2VlImageProcessor(
        tile_size=64,
        min_image_tokens=2,
        max_image_tokens=6,
        max_num_patches=24,
        encoder_patch_size=16,
        downsample_factor=2,
        min_tiles=2,
        max_tiles=6,
    )
    marks = [f"<|img_row_{row}_col_{column}|>" for row, column in ROWS_AND_COLUMNS]
    special = ("<image>", "<v>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *marks)
    return transformers.Lfm2VlProcessor(
        images, tokenizer(special, {"image_token": "<image>"}), chat_template=template("<image>")
    )


def minicpm(name: str, images: Any) -> Any:
    """A processor of the family; the newer ones take images and videos of the first."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "newline_token": "<newline>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    return getattr(transformers, f"MiniCPM{name}Processor")(
        images(scale_resolution=112),
        transformers.MiniCPMV4_6VideoProcessor(scale_resolution=112),
        tokenizer(tuple(names.values()), names),
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )


@processor()
def minicpmv4_6() -> Any:
    return minicpm("V4_6", image_processor("minicpmv4_6", "MiniCPMV4_6ImageProcessor"))


@processor()
def minicpmv4_7() -> Any:
    return minicpm("V4_7", image_processor("minicpmv4_6", "MiniCPMV4_6ImageProcessor"))


@processor()
def minicpm_ocr() -> Any:
    return minicpm("Ocr", functools.partial(transformers.MiniCPMOcrImageProcessor, patch_size=14))


@processor()
def granite_docling() -> Any:
    marks = [f"<row_{row}_col_{column}>" for row, column in ROWS_AND_COLUMNS]
    special = ("<image>", "<v>", "<fake_token_around_image>", "<global-img>", *marks)
    return transformers.GraniteDoclingProcessor(
        image_processor("granite_docling", "GraniteDoclingImageProcessor")(size=SQUARE, max_patches=6),
        tokenizer(special, {"image_token": "<image>"}),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


@processor()
def got_ocr2() -> Any:
    """Tiles of the size of the zoo's tower, which has 16 x 16 patches and a sixteenth of the tokens."""
    if "replace_image_token" not in vars(transformers.GotOcr2Processor):
        pytest.skip(f"the processor of transformers {transformers.__version__} puts no tokens of an image in a text")
    size = {"height": 256, "width": 256}
    found = transformers.GotOcr2Processor(
        image_processor("got_ocr2", "GotOcr2ImageProcessor")(size=size),
        tokenizer(("<imgpad>", "<v>", "<img>", "</img>"), {"image_token": "<imgpad>"}),
        chat_template=template("<img><imgpad></img>"),
    )
    found.num_image_tokens = 16
    return found


@processor()
def phi4_multimodal() -> Any:
    names = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
    return transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(dynamic_hd=6),
        transformers.Phi4MultimodalFeatureExtractor(),
        tokenizer(("<|image|>", "<|audio|>"), names),
        chat_template=template("<|image|>"),
    )
