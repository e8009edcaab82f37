"""Kinds whose image tokens have no position: learned queries, cross-attention, encoder-decoder models."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.zoo.fixed import LLAMA, QWEN2, pixels
from tests.support.zoo.kinds import IMAGE, VOCABULARY, Example, config, example, kind, text, vision

QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "encoder_hidden_size": 32,
}
# Their generate calls the language model directly, not the model that a session follows.
OWN_GENERATE = "^model: .*open the session on the language model"


@kind("Idefics2ForConditionalGeneration")
def idefics2() -> Example:
    resampler = {
        "hidden_size": 64,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
    }
    settings = config(
        "idefics2",
        vision_config=vision(),
        text_config=text(model_type="mistral"),
        perceiver_config=resampler,
        image_token_id=IMAGE,
    )
    settings.text_config.sliding_window = None
    pixels = {"pixel_values": torch.randn(1, 1, 3, 56, 56), "pixel_attention_mask": torch.ones(1, 1, 56, 56).bool()}
    return example(settings, 4, pixels)


@kind("AriaForConditionalGeneration")
def aria() -> Example:
    settings = config(
        "aria",
        vision_config=vision(model_type="idefics3_vision"),
        text_config=text(model_type="aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 8},
    )
    return example(settings, 8, {**pixels(), "pixel_mask": torch.ones(1, 56, 56).bool()})


@kind("Blip2ForConditionalGeneration", generate_refused=OWN_GENERATE)
def blip_2() -> Example:
    language = {
        "model_type": "opt",
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        **text(intermediate_size=None, num_key_value_heads=None, max_position_embeddings=512),
    }
    settings = config(
        "blip-2",
        vision_config=vision(),
        qformer_config=QFORMER,
        text_config=language,
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    return example(settings, 8, pixels(), before=())


def instructblip(model_type: str, token: str, count: int, pixels: torch.Tensor) -> Example:
    settings = config(
        model_type,
        vision_config=vision(),
        qformer_config={**QFORMER, "vocab_size": VOCABULARY},
        text_config=text(**LLAMA),
        num_query_tokens=8,
        **{token: IMAGE},
    )
    found = example(settings, count, {"pixel_values": pixels}, before=())
    found.inputs["qformer_input_ids"] = torch.tensor([[1, 5, 6, 7]])
    return found


@kind("InstructBlipForConditionalGeneration", generate_refused=OWN_GENERATE)
def instructblip_image() -> Example:
    return instructblip("instructblip", "image_token_index", 8, torch.randn(1, 3, 56, 56))


@kind("InstructBlipVideoForConditionalGeneration", generate_refused=OWN_GENERATE)
def instructblip_video() -> Example:
    return instructblip("instructblipvideo", "video_token_index", 4 * 8, torch.randn(1, 4, 3, 56, 56))


@kind("DeepseekOcr2ForConditionalGeneration")
def deepseek_ocr2() -> Example:
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
        "downsample_channels": [16, 32],
    }
    reader = text(hidden_size=32, num_hidden_layers=2, vocab_size=8, **QWEN2)
    language = text(
        num_key_value_heads=4,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    )
    settings = config(
        "deepseek_ocr2",
        vision_config={"sam_config": tower, "encoder_config": reader},
        text_config=language,
        image_token_id=IMAGE,
    )
    return example(settings, 145, pixels(256))


@kind("MllamaForConditionalGeneration", refused="^model: .*MllamaForConditionalGeneration.*cross-attention")
def mllama() -> Example:
    """One placeholder in the prompt; layers 1 and 3 attend to the image by cross-attention."""
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 64,
        "image_size": 56,
        "patch_size": 14,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 4,
    }
    rotation = {"rope_type": "default", "rope_theta": 10000.0}
    settings = config(
        "mllama",
        vision_config=tower,
        text_config=text(cross_attention_layers=[1, 3], rope_parameters=rotation),
        image_token_index=IMAGE,
    )
    pixels: dict[str, Any] = {
        "pixel_values": torch.randn(1, 1, 4, 3, 56, 56),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    }
    found = example(settings, 1, pixels)
    length = found.inputs["input_ids"].shape[1]
    found.inputs["cross_attention_mask"] = torch.ones(1, length, 1, 4, dtype=torch.long)
    return found


@kind("Florence2ForConditionalGeneration", refused="an encoder-decoder model")
def florence2() -> Example:
    tower = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "projection_dim": 64,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 16,
    }
    language = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 256,
    }
    settings = config("florence2", vision_config=tower, text_config=language, image_token_id=IMAGE)
    return example(settings, 65, pixels(64))
