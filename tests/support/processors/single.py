"""Processors of families with one grid an image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import transformers

from tests.support.processors.kinds import CROP, SQUARE, image_processor, processor, template, tokenizer

QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|nl|>")
QWEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
GLM_TOKENS = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|nl|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
GLM_NAMES = {"image_token": "<|image|>", "video_token": "<|video|>"}
GLM_TEMPLATE = template("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>")
AREA = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}


def qwen(name: str, video: str, patch: int = 14, names: dict[str, str] | None = None, **more: Any) -> Any:
    images = image_processor("qwen2_vl", "Qwen2VLImageProcessor")(size=AREA, patch_size=patch)
    videos = getattr(transformers, video)(patch_size=patch)
    return getattr(transformers, name)(
        image_processor=images,
        tokenizer=tokenizer(QWEN_TOKENS, QWEN_NAMES | (names or {})),
        video_processor=videos,
        chat_template=QWEN_TEMPLATE,
        **more,
    )


def add_all(names: Sequence[str], make: Callable[[], Any]) -> None:
    """One processor for several models."""
    for name in names:
        made = functools.partial(make)
        made.__name__ = name  # type: ignore[attr-defined]
        processor()(made)


@processor()
def qwen2_vl() -> Any:
    return qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor")


@processor()
def qwen2_5_vl() -> Any:
    return qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")


@processor()
def qwen3_vl() -> Any:
    return qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)


add_all(("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), qwen3_vl)


@processor()
def exaone4_5() -> Any:
    return qwen("Exaone4_5_Processor", "Qwen2VLVideoProcessor")


@processor()
def hyperclovax_vision_v2() -> Any:
    return qwen("HyperCLOVAXVisionV2Processor", "Qwen2VLVideoProcessor")


@processor()
def lfm3_vl() -> Any:
    return qwen("Lfm3VlProcessor", "Qwen3VLVideoProcessor", 16)


def omni(name: str, patch: int) -> Any:
    fillers = [f"<|unused{number}|>" for number in range(305, 310)]
    sound = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    return getattr(transformers, name)(
        image_processor=image_processor("qwen2_vl", "Qwen2VLImageProcessor")(size=AREA, patch_size=patch),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=patch),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16),
        tokenizer=tokenizer((*QWEN_TOKENS, *fillers, *sound.values()), QWEN_NAMES | sound),
        chat_template=QWEN_TEMPLATE,
    )


@processor()
def qwen2_5_omni_thinker() -> Any:
    return omni("Qwen2_5OmniProcessor", 14)


@processor()
def qwen3_omni_moe_thinker() -> Any:
    return omni("Qwen3OmniMoeProcessor", 16)


def glm(folder: str, name: str) -> Any:
    return getattr(transformers, f"{name}Processor")(
        image_processor(folder, f"{name}ImageProcessor")(size=AREA),
        tokenizer(GLM_TOKENS, GLM_NAMES),
        getattr(transformers, f"{name}VideoProcessor")(),
        chat_template=GLM_TEMPLATE,
    )


@processor()
def glm4v() -> Any:
    return glm("glm4v", "Glm4v")


@processor()
def glm46v() -> Any:
    return glm("glm46v", "Glm46V")


add_all(("glm4v_moe",), glm4v)
add_all(("glm_ocr",), glm46v)


@processor()
def ernie4_5_vl_moe() -> Any:
    names = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
    }
    return transformers.Ernie4_5_VLMoeProcessor(
        image_processor("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessor")(size=AREA),
        tokenizer(GLM_TOKENS, names),
        transformers.Ernie4_5_VLMoeVideoProcessor(),
        chat_template=GLM_TEMPLATE,
    )


@processor()
def paddleocr_vl() -> Any:
    return transformers.PaddleOCRVLProcessor(
        image_processor("paddleocr_vl", "PaddleOCRVLImageProcessor")(size=AREA),
        tokenizer(QWEN_TOKENS, QWEN_NAMES),
        chat_template=QWEN_TEMPLATE,
    )


@processor()
def video_llama_3() -> Any:
    return transformers.VideoLlama3Processor(
        image_processor("video_llama_3", "VideoLlama3ImageProcessor")(size=AREA),
        tokenizer(QWEN_TOKENS, QWEN_NAMES),
        transformers.VideoLlama3VideoProcessor(),
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )


@processor()
def cosmos3_edge() -> Any:
    return transformers.Cosmos3EdgeProcessor(
        image_processor("cosmos3_edge", "Cosmos3EdgeImageProcessor")(size=AREA),
        tokenizer(QWEN_TOKENS, QWEN_NAMES),
        transformers.Cosmos3EdgeVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )


@processor()
def minimax_m3_vl() -> Any:
    return transformers.MiniMaxM3VLProcessor(
        image_processor("minimax_m3_vl", "MiniMaxM3VLImageProcessor")(size=AREA),
        tokenizer(("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>[")),
        transformers.MiniMaxM3VLVideoProcessor(),
        chat_template=template("]<]image[>[", "]<]video[>["),
    )


@processor()
def muse_glimmer() -> Any:
    marks = ("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>")
    return transformers.MuseGlimmerProcessor(
        image_processor=image_processor("muse_glimmer", "MuseGlimmerImageProcessor")(max_image_tokens=64),
        video_processor=transformers.MuseGlimmerVideoProcessor(),
        tokenizer=tokenizer(("<|patch|>", "<|video|>", "<|image_start|>", "<|image_end|>", *marks)),
        chat_template=template("<|patch|>", "<|video|>"),
    )


@processor()
def hunyuan_vl() -> Any:
    names = {"image_token": "<image>", "image_start_token": "<start>", "image_end_token": "<end>"}
    return transformers.HunYuanVLProcessor(
        image_processor("hunyuan_vl", "HunYuanVLImageProcessor")(size=AREA),
        tokenizer(("<image>", "<video>", "<start>", "<end>", "<newline>"), names),
        chat_template=template("<start><image><end>"),
    )


@processor()
def kimi_k25() -> Any:
    return transformers.Kimi_K25Processor(
        image_processor("kimi_k25", "Kimi_K25ImageProcessor")(max_patches=256),
        tokenizer(("<|media_pad|>", "<|video|>", "<|media_begin|>", "<|media_end|>", "<|media_content|>")),
        transformers.Kimi_K25VideoProcessor(),
        chat_template=template("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"),
    )


@processor()
def llava() -> Any:
    return transformers.LlavaProcessor(
        image_processor("clip", "CLIPImageProcessor")(**CROP),
        tokenizer(("<image>",)),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


add_all(("vipllava",), llava)


@processor()
def paligemma() -> Any:
    images = image_processor("siglip", "SiglipImageProcessor")(size=SQUARE)
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, tokenizer(("<image>",), {"image_token": "<image>"}))


@processor()
def chameleon() -> Any:
    images = image_processor("chameleon", "ChameleonImageProcessor")
    names = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>", "sep_token": "<reserved>"}
    return transformers.ChameleonProcessor(
        images(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer(("<image>", "<video>", "<racm3:break>", "<eoss>", "<reserved>"), names),
        image_seq_length=16,
    )


@processor()
def gemma3() -> Any:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return transformers.Gemma3Processor(
        image_processor("gemma3", "Gemma3ImageProcessor")(size=SQUARE),
        tokenizer(("<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>"), names),
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )


GEMMA4_NAMES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
GEMMA4_TOKENS = ("<|image|>", "<|video|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>")


def gemma(name: str, images: Any) -> Any:
    sizes = {"patch_size": 14, "pooling_kernel_size": 2}
    return getattr(transformers, f"{name}Processor")(
        feature_extractor=getattr(transformers, f"{name}AudioFeatureExtractor")(),
        image_processor=images(max_soft_tokens=70, **sizes),
        tokenizer=tokenizer(GEMMA4_TOKENS, GEMMA4_NAMES),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(**sizes),
        chat_template=template("<|image|>", "<|video|>"),
    )


@processor()
def gemma4() -> Any:
    return gemma("Gemma4", image_processor("gemma4", "Gemma4ImageProcessor"))


add_all(("gemma4_e",), gemma4)


@processor()
def gemma4_unified() -> Any:
    return gemma("Gemma4Unified", image_processor("gemma4_unified", "Gemma4UnifiedImageProcessor"))


PIXTRAL_TOKENS = ("[IMG]", "<video>", "<start>", "[IMG_END]", "[IMG_BREAK]")


# In transformers 5.12 the vision tower of Pixtral has positions for images up to its image_size only.
PIXTRAL_IS_BOUNDED = hasattr(import_module("transformers.models.pixtral.modeling_pixtral"), "position_ids_in_meshgrid")


def pixtral_images(patch: int) -> Any:
    sides = {"height": patch, "width": patch}
    return image_processor("pixtral", "PixtralImageProcessor")(size={"longest_edge": 112}, patch_size=sides)


@processor()
def pixtral() -> Any:
    return transformers.PixtralProcessor(
        pixtral_images(14), tokenizer(PIXTRAL_TOKENS), patch_size=14, chat_template=template("[IMG]")
    )


@processor()
def mistral3() -> Any:
    return transformers.PixtralProcessor(
        pixtral_images(14),
        tokenizer(PIXTRAL_TOKENS),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )


@processor()
def lighton_ocr() -> Any:
    names = {"image_token": "[IMG]", "image_end_token": "[IMG_END]", "image_break_token": "[IMG_BREAK]"}
    return transformers.LightOnOcrProcessor(
        pixtral_images(28),
        tokenizer(PIXTRAL_TOKENS, names),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )


@processor()
def janus() -> Any:
    names = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    made = transformers.JanusProcessor(
        image_processor("janus", "JanusImageProcessor")(size=SQUARE),
        tokenizer(("<image>", "<video>", "<start>", "<end>"), names),
        chat_template=template("<image>"),
    )
    # No argument in transformers 5.12.
    made.num_image_tokens = 16
    return made


@processor()
def deepseek_vl() -> Any:
    return transformers.DeepseekVLProcessor(
        image_processor("deepseek_vl", "DeepseekVLImageProcessor")(size=SQUARE),
        tokenizer(("<image_placeholder>",), {"image_token": "<image_placeholder>"}),
        num_image_tokens=16,
        chat_template=template("<image_placeholder>"),
    )


# By what the processor tokenizes a text whose first token it drops; that of transformers 5.12 only encodes its marks.
FUYU_READS = "__call__" if "replace_image_token" in vars(transformers.FuyuProcessor) else "encode"


def _prefixed(self: Any, text: str, **options: Any) -> Any:
    return getattr(transformers.PreTrainedTokenizerFast, FUYU_READS)(self, f"x{text}", **options)


@processor()
def fuyu() -> Any:
    patch: Any = {"height": 14, "width": 14}
    # The one on Pillow fails in transformers 5.24.
    images = transformers.FuyuImageProcessor(size={"height": 112, "width": 168}, patch_size=patch)
    made = tokenizer(("|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|", "<0x04>"), {"image_token": "|SPEAKER|"})
    # The processor drops the first token of a text, which Fuyu's tokenizer adds.
    made.__class__ = type("PrefixTokenizer", (type(made),), {FUYU_READS: _prefixed})
    return transformers.FuyuProcessor(images, made)


@processor()
def emu3() -> Any:
    names = {
        "image_token": "<image>",
        "boi_token": "<start>",
        "eoi_token": "<end>",
        "image_wrapper_token": "<wrapper>",
        "eof_token": "<eof>",
    }
    made = transformers.Emu3Processor(
        transformers.Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=40 * 40, spatial_factor=2),
        tokenizer(("<image>", "<video>", "<start>", "<end>", "<wrapper>", "<eof>"), names),
        chat_template=template("<image>"),
    )
    # As the encoder of the zoo.
    made.downsample_ratio = 2
    return made


@processor()
def idefics2() -> Any:
    return transformers.Idefics2Processor(
        image_processor("idefics2", "Idefics2ImageProcessor")(size={"shortest_edge": 56, "longest_edge": 112}),
        tokenizer(
            ("<image>", "<fake_token_around_image>", "<end_of_utterance>"),
            {
                "image_token": "<image>",
                "image_boundary_token": "<fake_token_around_image>",
                "end_of_utterance_token": "<end_of_utterance>",
            },
        ),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


@processor()
def aria() -> Any:
    return transformers.AriaProcessor(
        image_processor("aria", "AriaImageProcessor")(),
        tokenizer(("<image>",), {"image_token": "<image>"}),
        chat_template=template("<image>"),
    )


@processor()
def deepseek_ocr2() -> Any:
    return transformers.DeepseekOcr2Processor(
        image_processor("deepseek_ocr2", "DeepseekOcr2ImageProcessor")(),
        tokenizer(("<image>",), {"image_token": "<image>"}),
        chat_template=template("<image>"),
    )
