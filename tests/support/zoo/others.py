"""Kinds of models that few people use yet, of any layout."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.zoo.fixed import LLAMA, QWEN2, SIGLIP, pixels
from tests.support.zoo.grids import DEEPSTACK, GLM_IDS, GLM_TOWER, mrope, patches, qwen
from tests.support.zoo.kinds import END, IMAGE, START, VIDEO, Example, config, example, kind, text, vision

AUDIO = 310


@kind("CohereCompassForConditionalGeneration", since="5.24")
def cohere_compass() -> Example:
    rotation = {"full_attention": mrope()}
    language = text(head_dim=16, layer_types=["full_attention"] * 4, rope_parameters=rotation)
    return qwen("cohere_compass", DEEPSTACK, language, 3 * 2 * 16 * 16)


@kind("Cosmos3OmniForConditionalGeneration")
def cosmos3_omni() -> Example:
    return qwen("cosmos3_omni", DEEPSTACK, text(head_dim=16, rope_parameters=mrope()), 3 * 2 * 16 * 16)


@kind("Glm46VForConditionalGeneration", since="5.24")
def glmga() -> Example:
    language = text(model_type="glm4v_text", rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5))
    return qwen("glmga", {**GLM_TOWER, "model_type": "glm4v_vision"}, language, 3 * 2 * 14 * 14, GLM_IDS)


@kind("DeepseekVLHybridForConditionalGeneration")
def deepseek_vl_hybrid() -> Example:
    """A second tower sees the image twice as large, four times per token."""
    large = {
        "model_type": "sam_vision_model",
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
        "deepseek_vl_hybrid",
        vision_config=vision(vision_use_head=False, **SIGLIP),
        high_res_vision_config=large,
        text_config=text(**LLAMA),
        image_token_id=IMAGE,
    )
    found = {**pixels(), "high_res_pixel_values": torch.randn(1, 3, 256, 256)}
    return example(settings, 16, found)


@kind("MuseSparkForConditionalGeneration", since="5.24")
def muse_spark() -> Example:
    tower = vision(
        image_size=None,
        pos_emb_height=8,
        pos_emb_width=8,
        max_position_embeddings=64,
        layer_types=["window_attention", "full_attention"],
    )
    language = text(
        head_dim=16,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        layer_rope_theta=[10000.0] * 4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_hidden_size=32,
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
    )
    sound = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 64}
    settings = config(
        "muse_spark",
        text_config=language,
        vision_config=tower,
        audio_config=sound,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        out_hidden_size=128,
        projector_hidden_size=64,
    )
    return example(settings, 6, patches(3 * 2 * 14 * 14))


def tower(**more: Any) -> Any:
    """A tower with patches of 14 pixels in place of one of timm, which returns features of the same shape."""
    settings = config("convnext", patch_size=14, num_stages=1, hidden_sizes=[32], depths=[0])
    for name, value in more.items():
        setattr(settings, name, value)
    return settings


@kind("Gemma3nForConditionalGeneration")
def gemma3n() -> Example:
    language = text(
        head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=400,
        num_kv_shared_layers=2,
        altup_num_inputs=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
    )
    sound = {
        "hidden_size": 32,
        "input_feat_size": 16,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": [4, 4],
        "vocab_size": 8,
        "vocab_offset": 408,
    }
    settings = config(
        "gemma3n",
        audio_config=sound,
        text_config=language,
        vision_soft_tokens_per_image=16,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    )
    # The config itself takes a tower of timm only.
    vars(settings)["vision_config"] = tower(hidden_size=32, vocab_size=8, vocab_offset=400, rms_norm_eps=1e-6)
    return example(settings, 16, pixels(), start=START, end=END)


@kind("FastVlmForConditionalGeneration")
def fast_vlm() -> Example:
    settings = config(
        "fast_vlm", vision_config=tower(hidden_size=32), text_config=text(**QWEN2), image_token_index=IMAGE
    )
    return example(settings, 16, pixels())


@kind("PerceptionLMForConditionalGeneration")
def perception_lm() -> Example:
    """The whole image, then its tiles, pooled two by two."""
    tower = config("siglip_vision_model", **vision(vision_use_head=False))
    tower.model_args = {"embed_dim": 32}
    settings = config(
        "perception_lm",
        vision_config=tower,
        text_config=text(**LLAMA),
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return example(settings, 3 * 4, {"pixel_values": torch.randn(1, 3, 3, 56, 56)})


@kind("Step3p7ForConditionalGeneration", since="5.24")
def step3p7() -> Example:
    """Two crops of one token each, and the whole image."""
    tower = {"width": 32, "layers": 2, "heads": 2, "image_size": 112, "max_position_embeddings": 64, "mlp_ratio": 2.0}
    language = text(num_hidden_layers=2, head_dim=16, mlp_layer_types=["dense"] * 2, sliding_window=64)
    settings = config("step3p7", vision_config=tower, text_config=language, image_token_id=IMAGE)
    found = {
        "pixel_values": torch.randn(1, 3, 112, 112),
        "pixel_values_local": torch.randn(2, 3, 56, 56),
        "num_local_patches": torch.tensor([2]),
    }
    return example(settings, 2 + 4, found)


@kind("NemotronH_Omni_Reasoning_V3", since="5.24")
def nemotron_h_omni() -> Example:
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2.0,
        "patch_size": 14,
        "image_size": 56,
        "max_img_size": 112,
        "num_cls_tokens": 1,
        "num_registers": 1,
        "video_temporal_patch_size": 2,
    }
    language = text(
        head_dim=16,
        num_hidden_layers=None,
        layers_block_type=["mamba", "attention", "mlp", "attention"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=16,
    )
    settings = config(
        "nemotron_h_omni",
        text_config=language,
        vision_config=tower,
        projector_hidden_size=64,
        vision_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    found = {"pixel_values": torch.randn(24, 3 * 14 * 14), "image_grid_hw": torch.tensor([[4, 6]])}
    return example(settings, 6, found, start=START, end=END)


SPARSE: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
}


@kind("MistralLarge4ForConditionalGeneration", since="5.24")
def mistral_large4() -> Example:
    settings = config(
        "mistral_large4",
        vision_config=vision(model_type="pixtral", head_dim=16, image_size=112),
        text_config=text(head_dim=8, **SPARSE),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    found = {"pixel_values": torch.randn(1, 3, 56, 84), "image_sizes": torch.tensor([[56, 84]])}
    return example(settings, 6, found, row=3)
