"""Kinds whose image is one grid of a fixed or a given size, row by row, and kinds for videos only."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

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

CLIP = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model"}
LLAMA = {"model_type": "llama"}
QWEN2 = {"model_type": "qwen2"}
# Windows larger than the prompt.
WINDOWS: dict[str, Any] = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def pixels(size: int = 56) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def pixels_with_size() -> dict[str, torch.Tensor]:
    """4 x 6 patches of 14 pixels."""
    return {"pixel_values": torch.randn(1, 3, 56, 84), "image_sizes": torch.tensor([[56, 84]])}


@kind("LlavaForConditionalGeneration")
def llava() -> Example:
    settings = config(
        "llava",
        vision_config=vision(**CLIP),
        text_config=text(**LLAMA),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return example(settings, 16, pixels())


@kind("LlavaForConditionalGeneration")
def pixtral() -> Example:
    settings = config(
        "llava",
        vision_config=vision(model_type="pixtral", head_dim=16, image_size=112),
        text_config=text(model_type="mistral", head_dim=16),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )
    settings.text_config.sliding_window = None
    return example(settings, 24, pixels_with_size(), row=6)


@kind("VipLlavaForConditionalGeneration")
def vipllava() -> Example:
    settings = config(
        "vipllava",
        vision_config=vision(num_hidden_layers=3, **CLIP),
        text_config=text(**LLAMA),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-2, -1],
    )
    return example(settings, 16, pixels())


@kind("Gemma3ForConditionalGeneration")
def gemma3() -> Example:
    settings = config(
        "gemma3",
        vision_config=vision(**SIGLIP),
        text_config=text(head_dim=16, query_pre_attn_scalar=16, **WINDOWS),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return example(settings, 4, pixels(), start=START, end=END, types="token_type_ids")


def gemma4_pixels() -> dict[str, torch.Tensor]:
    """4 x 6 patches, merged 2 by 2."""
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(4), indexing="xy"), -1).reshape(1, -1, 2)
    return {"pixel_values": torch.rand(1, 24, 3 * 14 * 14), "image_position_ids": places}


GEMMA4_TOWER = {
    **vision(image_size=None),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 64,
    "pooling_kernel_size": 2,
}
GEMMA4_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boi_token_id": START,
    "eoi_token_id": END,
    "audio_config": None,
}


@kind("Gemma4ForConditionalGeneration")
def gemma4() -> Example:
    language = text(
        head_dim=16,
        hidden_size_per_layer_input=0,
        per_layer_config={},
        vocab_size_per_layer_input=VOCABULARY,
        use_bidirectional_attention="vision",
        **WINDOWS,
    )
    settings = config("gemma4", vision_config=GEMMA4_TOWER, text_config=language, **GEMMA4_IDS)
    return example(settings, 6, gemma4_pixels(), start=START, end=END, types="mm_token_type_ids")


@kind("Gemma4ForConditionalGeneration")
def gemma4_e() -> Example:
    """As E2B: some layers reuse the keys of others, full layers have larger heads, each layer has a separate input."""
    language = text(
        num_hidden_layers=6,
        head_dim=16,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 3,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        per_layer_config={layer: {"head_dim": 32} for layer in ("1", "3", "5")},
        vocab_size_per_layer_input=VOCABULARY,
    )
    settings = config("gemma4", vision_config=GEMMA4_TOWER, text_config=language, **GEMMA4_IDS)
    return example(settings, 6, gemma4_pixels(), start=START, end=END, types="mm_token_type_ids")


@kind("Gemma4UnifiedForConditionalGeneration")
def gemma4_unified() -> Example:
    tower = {
        "patch_size": 14,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 64,
        "mm_posemb_size": 64,
        "output_proj_dims": 64,
    }
    language = text(head_dim=16, per_layer_config={}, **WINDOWS)
    settings = config("gemma4_unified", vision_config=tower, text_config=language, **GEMMA4_IDS)
    places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(2), indexing="xy"), -1).reshape(1, -1, 2)
    pixels = {"pixel_values": torch.rand(1, 6, 3 * 28 * 28), "image_position_ids": places}
    return example(settings, 6, pixels, start=START, end=END, types="mm_token_type_ids")


@kind("PaliGemmaForConditionalGeneration")
def paligemma() -> Example:
    settings = config(
        "paligemma",
        vision_config=vision(vision_use_head=False, projection_dim=64, num_image_tokens=16, **SIGLIP),
        text_config=text(model_type="gemma", head_dim=16, num_image_tokens=16),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    # The whole prompt is a bidirectional prefix.
    found = example(settings, 16, pixels(), before=())
    found.inputs["token_type_ids"] = torch.zeros_like(found.inputs["input_ids"])
    return found


@kind("Mistral3ForConditionalGeneration")
def mistral3() -> Example:
    settings = config(
        "mistral3",
        vision_config=vision(model_type="pixtral", head_dim=16, image_size=112),
        text_config=text(model_type="mistral", head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    settings.text_config.sliding_window = None
    return example(settings, 6, pixels_with_size(), row=3)


@kind("LightOnOcrForConditionalGeneration")
def lighton_ocr() -> Example:
    settings = config(
        "lighton_ocr",
        vision_config=vision(model_type="pixtral", head_dim=16, image_size=112),
        text_config=text(model_type="qwen3", head_dim=16),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return example(settings, 6, pixels_with_size())


@kind("DeepseekVLForConditionalGeneration")
def deepseek_vl() -> Example:
    settings = config(
        "deepseek_vl",
        vision_config=vision(vision_use_head=False, **SIGLIP),
        text_config=text(**LLAMA),
        image_token_id=IMAGE,
    )
    return example(settings, 16, pixels())


@kind("GotOcr2ForConditionalGeneration")
def got_ocr2() -> Example:
    tower = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 256,
        "patch_size": 16,
        "mlp_dim": 64,
        "window_size": 4,
        "global_attn_indexes": [1],
    }
    settings = config(
        "got_ocr2", vision_config=tower, text_config=text(**QWEN2), image_token_index=IMAGE, image_seq_length=16
    )
    return example(settings, 16, pixels(256))


@kind("JanusForConditionalGeneration")
def janus() -> Example:
    tower = vision(intermediate_size=None, projection_dim=64, num_image_tokens=16, mlp_ratio=2.0)
    codes = {
        "embed_dim": 8,
        "num_embeddings": 32,
        "latent_channels": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "num_patches": 4,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
    }
    settings = config("janus", vision_config=tower, vq_config=codes, text_config=text(**LLAMA), image_token_id=IMAGE)
    return example(settings, 16, pixels())


@kind("FuyuForCausalLM")
def fuyu() -> Example:
    """No vision tower: patches are tokens of the text model."""
    language = text(
        model_type="persimmon",
        num_key_value_heads=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    settings = config("fuyu", text_config=language, hidden_size=64, image_size=56, patch_size=14, image_token_id=IMAGE)
    named = inspect.signature(transformers.FuyuForCausalLM.forward).parameters
    patches = "pixel_values" if "pixel_values" in named else "image_patches"
    return example(settings, 6, {patches: torch.randn(1, 6, 3 * 14 * 14)}, before=())


@kind("ChameleonForConditionalGeneration")
def chameleon() -> Example:
    """Images become codes of the vocabulary."""
    letters = [(first, second) for first in "ABCD" for second in "ABCD"]
    words = {f"IMGIMG{first}{second}Z": 310 + place for place, (first, second) in enumerate(letters)}
    codes = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "resolution": 64,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    }
    settings = config(
        "chameleon",
        **text(),
        vq_config=codes,
        vocabulary_map={**words, "<image>": IMAGE},
        image_token_id=IMAGE,
    )
    return example(settings, 16, pixels(16))


@kind("Emu3ForConditionalGeneration")
def emu3() -> Example:
    codes = {
        "codebook_size": 32,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "hidden_size": 32,
        "num_attention_heads": 1,
        "attn_resolutions": [],
        "temporal_downsample_factor": 1,
    }
    words = {f"<|visual token {code:06d}|>": 310 + code for code in range(32)}
    words |= {"<|extra_200|>": BREAK, "<image>": IMAGE}
    settings = config("emu3", text_config=text(), vq_config=codes, vocabulary_map=words, image_token_id=IMAGE)
    return example(settings, 8 * 9, {**pixels(16), "image_sizes": torch.tensor([[16, 16]])})


@kind("LlavaNextVideoForConditionalGeneration")
def llava_next_video() -> Example:
    settings = config(
        "llava_next_video",
        vision_config=vision(**CLIP),
        text_config=text(**LLAMA),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=4,
        image_grid_pinpoints=PINPOINTS,
    )
    return example(settings, 3 * 4, {"pixel_values_videos": torch.randn(1, 3, 3, 56, 56)}, token=VIDEO)


@kind("VideoLlavaForConditionalGeneration")
def video_llava() -> Example:
    settings = config(
        "video_llava",
        vision_config=vision(**CLIP),
        text_config=text(**LLAMA),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=8 * 17,
    )
    return example(settings, 8 * 17, {"pixel_values_videos": torch.randn(1, 8, 3, 56, 56)}, token=VIDEO)
