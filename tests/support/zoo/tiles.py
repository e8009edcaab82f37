"""Kinds whose image is split into tiles or crops, mostly with one view of the whole image."""

from __future__ import annotations

import torch

from tests.support.zoo.fixed import CLIP, LLAMA, PINPOINTS, QWEN2, SIGLIP, WINDOWS, pixels
from tests.support.zoo.grids import HYBRID
from tests.support.zoo.kinds import (
    BREAK,
    END,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    Example,
    config,
    example,
    kind,
    text,
    vision,
)


def crops(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 56, 56)}


def base_and_tiles() -> dict[str, torch.Tensor]:
    """An image of 112 x 90: the whole, then 2 x 2 tiles, whose padding is removed again."""
    return {"pixel_values": torch.randn(1, 5, 3, 56, 56), "image_sizes": torch.tensor([[112, 90]])}


# 4 x 4 of the whole image, then 8 rows of 6 with a newline each.
BASE_AND_TILES = 16 + 8 * 6 + 8


@kind("LlavaNextForConditionalGeneration")
def llava_next() -> Example:
    settings = config(
        "llava_next",
        vision_config=vision(**CLIP),
        text_config=text(**LLAMA),
        image_token_index=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
    )
    return example(settings, BASE_AND_TILES, base_and_tiles())


@kind("LlavaOnevisionForConditionalGeneration")
def llava_onevision() -> Example:
    settings = config(
        "llava_onevision",
        vision_config=vision(vision_use_head=False, **SIGLIP),
        text_config=text(**QWEN2),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return example(settings, BASE_AND_TILES, base_and_tiles())


@kind("Granite4VisionForConditionalGeneration")
def granite4_vision() -> Example:
    """Windows of 4 x 4 patches become 2 x 2 learned queries, so that every side is half as long."""
    queries = {
        "model_type": "blip_2_qformer",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 64,
        "encoder_hidden_size": 64,
        "cross_attention_frequency": 1,
    }
    settings = config(
        "granite4_vision",
        vision_config=vision(hidden_size=64, **SIGLIP),
        text_config=text(),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[1, 2],
        qformer_config=queries,
    )
    return example(settings, 4 + 4 * 4 + 4, base_and_tiles())


@kind("InternVLForConditionalGeneration")
def internvl() -> Example:
    settings = config(
        "internvl",
        vision_config=vision(image_size=[56, 56], patch_size=[14, 14]),
        text_config=text(**QWEN2),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return example(settings, 3 * 4, crops(3), start=START, end=END)


@kind("QianfanOCRForConditionalGeneration")
def qianfan_ocr() -> Example:
    settings = config(
        "qianfan_ocr",
        vision_config=vision(image_size=[56, 56], patch_size=[14, 14]),
        text_config=text(model_type="qwen3", head_dim=16),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return example(settings, 3 * 4, crops(3), start=START, end=END)


def idefics(model_type: str) -> Example:
    """As many tokens per tile as pixels per patch: SmolVLM confuses them in 5.20."""
    settings = config(
        model_type,
        vision_config=vision(image_size=16, patch_size=4),
        text_config=text(**LLAMA),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    pixels = {"pixel_values": torch.randn(1, 3, 3, 16, 16), "pixel_attention_mask": torch.ones(1, 3, 16, 16).bool()}
    return example(settings, 3 * 4, pixels, row=4)


@kind("Idefics3ForConditionalGeneration")
def idefics3() -> Example:
    return idefics("idefics3")


@kind("SmolVLMForConditionalGeneration")
def smolvlm() -> Example:
    return idefics("smolvlm")


@kind("AyaVisionForConditionalGeneration")
def aya_vision() -> Example:
    settings = config(
        "aya_vision",
        vision_config=vision(vision_use_head=False, **SIGLIP),
        text_config=text(model_type="cohere2", **WINDOWS),
        image_token_index=IMAGE,
        downsample_factor=2,
    )
    return example(settings, 2 * 4, crops(2), start=START, end=END)


@kind("Cohere2VisionForConditionalGeneration")
def cohere2_vision() -> Example:
    settings = config(
        "cohere2_vision",
        vision_config=vision(vision_use_head=False, **SIGLIP),
        text_config=text(model_type="cohere2", **WINDOWS),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return example(settings, 2 * 4, crops(2), start=START, end=END)


@kind("Ovis2ForConditionalGeneration")
def ovis2() -> Example:
    settings = config(
        "ovis2",
        vision_config=vision(vocab_size=40, hidden_stride=1, num_visual_indicator_tokens=5),
        text_config=text(**QWEN2),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[305, 306, 307, 308, 309],
        vocab_size=VOCABULARY,
        hidden_size=64,
    )
    return example(settings, 16, pixels(), start=305, end=306)


@kind("Llama4ForConditionalGeneration", broken_in="5.24.0")
def llama4() -> Example:
    tower = vision(
        intermediate_size=128,
        vision_output_dim=64,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=64,
        projector_output_dim=64,
    )
    language = text(
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=8,
        no_rope_layer_interval=2,
        interleave_moe_layer_step=2,
    )
    settings = config(
        "llama4",
        vision_config=tower,
        text_config=language,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return example(settings, 4, pixels(), start=START, end=END)


@kind("Molmo2ForConditionalGeneration", since="5.20")
def molmo2() -> Example:
    """One crop of 4 x 4 patches, pooled 2 by 2."""
    tower = {
        **vision(image_size=[56, 56], num_hidden_layers=3),
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_position_embeddings": 16,
    }
    adapter = {
        "vision_feature_layer": [-1, -2],
        "vit_layers": [-1, -2],
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "text_hidden_size": 64,
    }
    settings = config(
        "molmo2",
        vision_config=tower,
        adapter_config=adapter,
        text_config=text(head_dim=16, additional_vocab_size=16),
        image_start_token_id=START,
        image_end_token_id=END,
        image_patch_id=IMAGE,
        image_col_id=BREAK,
        low_res_image_start_token_id=305,
        frame_start_token_id=306,
        frame_end_token_id=307,
    )
    pixels = {
        "pixel_values": torch.randn(1, 16, 14 * 14 * 3),
        "image_token_pooling": torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }
    return example(settings, 4, pixels, start=START, end=END)


@kind("Lfm2VlForConditionalGeneration")
def lfm2_vl() -> Example:
    tower = vision(
        model_type="siglip2_vision_model", image_size=None, patch_size=16, num_patches=16, vision_use_head=False
    )
    language = text(model_type="lfm2", layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False)
    settings = config(
        "lfm2_vl",
        vision_config=tower,
        text_config=language,
        image_token_id=IMAGE,
        projector_hidden_size=64,
        downsample_factor=2,
    )
    pixels = {
        "pixel_values": torch.randn(1, 24, 3 * 16 * 16),
        "spatial_shapes": torch.tensor([[4, 6]]),
        "pixel_attention_mask": torch.ones(1, 24, dtype=torch.long),
    }
    return example(settings, 6, pixels)


MINICPM_PIXELS = 64 * 14
MINICPM_TOWER = vision(num_hidden_layers=3, insert_layer_id=1)


def minicpm(model_type: str, **ids: int) -> Example:
    settings = config(
        model_type,
        text_config=text(model_type="qwen3_5_text", **HYBRID),
        vision_config=MINICPM_TOWER,
        insert_layer_id=1,
        image_size=56,
        patch_size=14,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **ids,
    )
    pixels = {"pixel_values": torch.randn(1, 3, 14, MINICPM_PIXELS), "target_sizes": torch.tensor([[8, 8]])}
    if not ids:
        return example(settings, 4, pixels)
    return example(settings, 4, pixels, start=START, end=END, types="mm_token_type_ids")


@kind("MiniCPMV4_6ForConditionalGeneration")
def minicpmv4_6() -> Example:
    return minicpm("minicpmv4_6")


@kind("MiniCPMV4_7ForConditionalGeneration", since="5.20")
def minicpmv4_7() -> Example:
    ids = {"image_start_id": START, "image_end_id": END, "slice_start_id": 305, "slice_end_id": 306}
    return minicpm("minicpmv4_7", newline_id=BREAK, **ids)


@kind("MiniCPMOcrForConditionalGeneration", since="5.24")
def minicpm_ocr() -> Example:
    """Patches are merged once, not twice."""
    ids = {"image_start_id": START, "image_end_id": END, "slice_start_id": 305, "slice_end_id": 306}
    found = minicpm("minicpm_ocr", newline_id=BREAK, **ids)
    return example(found.config, 16, {name: found.inputs[name] for name in ("pixel_values", "target_sizes")})


@kind("GraniteDoclingForConditionalGeneration", since="5.24")
def granite_docling() -> Example:
    """Three tiles of 4 x 4 patches, merged 2 by 2."""
    settings = config(
        "granite_docling",
        vision_config=vision(out_hidden_size=64, scale_factor=2, deepstack_visual_indexes=[0, 1]),
        text_config=text(model_type="granite_docling_text"),
        image_token_id=IMAGE,
    )
    pixels = {"pixel_values": torch.randn(1, 3, 3, 56, 56), "pixel_attention_mask": torch.ones(1, 3).bool()}
    return example(settings, 3 * 4, pixels, row=4)


@kind("Phi4MultimodalForCausalLM")
def phi4_multimodal() -> Example:
    """A crop and the whole image, each of 16 rows of 16 with a newline, and a separator between them."""
    sound = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 8,
        "audio_token_id": VIDEO,
    }
    settings = config(
        "phi4_multimodal",
        **text(),
        original_max_position_embeddings=4096,
        vision_config=vision(image_size=448, crop_size=448, num_hidden_layers=3, image_token_id=IMAGE),
        audio_config=sound,
    )
    settings.sliding_window = None
    # The text model shares the config, so the tower switches with it: eager in both.
    settings.vision_config._attn_implementation = "eager"
    pixels = {
        "image_pixel_values": torch.randn(1, 2, 3, 448, 448),
        "image_sizes": torch.tensor([[448, 448]]),
        "image_attention_mask": torch.ones(1, 2, 32, 32),
    }
    return example(settings, 2 * 16 * 17 + 1, pixels)
