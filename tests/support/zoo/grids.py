"""Kinds whose image is one grid of merged patches: Qwen and similar models."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.zoo.kinds import END, IMAGE, START, VIDEO, Example, config, example, kind, text, vision

HEIGHT, WIDTH, MERGE = 4, 6, 2
GRID = torch.tensor([[1, HEIGHT, WIDTH]])

QWEN2_5_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
    "num_position_embeddings": 64,
}
DEEPSTACK = {**QWEN3_TOWER, "deepstack_visual_indexes": [0, 1]}
GLM_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "image_size": 56,
}
QWEN_IDS = {"vision_start_token_id": START, "vision_end_token_id": END}
GLM_IDS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 305,
    "video_end_token_id": 306,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
# Every other layer has no softmax attention.
HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    },
}
AUDIO_TOWER = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "output_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 64,
    "n_window": 8,
}
OMNI_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": 310,
    "audio_start_token_id": 311,
    "audio_end_token_id": 312,
}


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section or (2, 3, 3)), **more}


def patches(*shape: int) -> dict[str, torch.Tensor]:
    """An image as its processor returns it: a row of numbers per patch, and the size of the grid."""
    return {"pixel_values": torch.randn(HEIGHT * WIDTH, *shape), "image_grid_thw": GRID}


def grid_of(settings: Any, *shape: int, types: str | None = "mm_token_type_ids") -> Example:
    count = HEIGHT * WIDTH // MERGE**2
    return example(settings, count, patches(*shape), start=START, end=END, types=types)


def qwen(
    model_type: str, tower: dict[str, Any], language: dict[str, Any], size: int, ids: dict[str, int] = QWEN_IDS
) -> Example:
    settings = config(
        model_type, text_config=language, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, **ids
    )
    return grid_of(settings, size)


@kind("Qwen2VLForConditionalGeneration")
def qwen2_vl() -> Example:
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return qwen("qwen2_vl", tower, text(rope_parameters=mrope()), 3 * 2 * 14 * 14)


@kind("Qwen2_5_VLForConditionalGeneration")
def qwen2_5_vl() -> Example:
    return qwen("qwen2_5_vl", QWEN2_5_TOWER, text(rope_parameters=mrope()), 3 * 2 * 14 * 14)


@kind("Qwen3VLForConditionalGeneration")
def qwen3_vl() -> Example:
    return qwen("qwen3_vl", DEEPSTACK, text(head_dim=16, rope_parameters=mrope()), 3 * 2 * 16 * 16)


@kind("Qwen3VLMoeForConditionalGeneration")
def qwen3_vl_moe() -> Example:
    language = text(head_dim=16, rope_parameters=mrope(), num_local_experts=4, **EXPERTS)
    return qwen("qwen3_vl_moe", DEEPSTACK, language, 3 * 2 * 16 * 16)


@kind("Qwen3_5ForConditionalGeneration")
def qwen3_5() -> Example:
    return qwen("qwen3_5", QWEN3_TOWER, text(**HYBRID), 3 * 2 * 16 * 16)


@kind("Qwen3_5MoeForConditionalGeneration")
def qwen3_5_moe() -> Example:
    language = text(shared_expert_intermediate_size=32, **EXPERTS, **HYBRID)
    return qwen("qwen3_5_moe", QWEN3_TOWER, language, 3 * 2 * 16 * 16)


@kind("Qwen4ExpForConditionalGeneration", since="5.17")
def qwen4_exp() -> Example:
    language = text(
        shared_expert_intermediate_size=32,
        ngram_vocab_size_base=200,
        ple_embed_dim=32,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=64,
        indexer_compress_ratio=4,
        output_gate_type="sigmoid",
        **EXPERTS,
        **HYBRID,
    )
    return qwen("qwen4_exp", QWEN3_TOWER, language, 3 * 2 * 16 * 16)


@kind("Glm4vForConditionalGeneration")
def glm4v() -> Example:
    language = text(rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5))
    return qwen("glm4v", GLM_TOWER, language, 3 * 2 * 14 * 14, GLM_IDS)


@kind("Glm4vMoeForConditionalGeneration")
def glm4v_moe() -> Example:
    language = text(
        head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5),
    )
    return qwen("glm4v_moe", GLM_TOWER, language, 3 * 2 * 14 * 14, GLM_IDS)


@kind("Glm46VForConditionalGeneration")
def glm46v() -> Example:
    language = text(model_type="glm4v_text", rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5))
    return qwen("glm46v", {**GLM_TOWER, "model_type": "glm4v_vision"}, language, 3 * 2 * 14 * 14, GLM_IDS)


@kind("GlmOcrForConditionalGeneration")
def glm_ocr() -> Example:
    language = text(head_dim=16, rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5))
    return qwen("glm_ocr", GLM_TOWER, language, 3 * 2 * 14 * 14, GLM_IDS)


@kind("Ernie4_5_VLMoeForConditionalGeneration")
def ernie4_5_vl_moe() -> Example:
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
    language = text(
        moe_intermediate_size=[32, 16],
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        rope_parameters=mrope(3, 3, 2),
    )
    return qwen("ernie4_5_vl_moe", tower, language, 3 * 14 * 14, GLM_IDS)


@kind("PaddleOCRVLForConditionalGeneration")
def paddleocr_vl() -> Example:
    settings = config(
        "paddleocr_vl",
        text_config=text(head_dim=16, rope_parameters=mrope()),
        vision_config=vision(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **QWEN_IDS,
    )
    return grid_of(settings, 3, 14, 14)


@kind("VideoLlama3ForConditionalGeneration")
def video_llama_3() -> Example:
    settings = config(
        "video_llama_3",
        text_config=text(model_type="qwen2"),
        vision_config=vision(image_size=None),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    pixels = patches(3 * 14 * 14) | {"image_merge_sizes": torch.tensor([MERGE])}
    return example(settings, HEIGHT * WIDTH // MERGE**2, pixels)


@kind("Exaone4_5_ForConditionalGeneration")
def exaone4_5() -> Example:
    settings = config(
        "exaone4_5",
        text_config=text(model_type="exaone4", sliding_window=16, sliding_window_pattern=2),
        vision_config={**QWEN2_5_TOWER, "num_key_value_heads": 1},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return grid_of(settings, 3 * 2 * 14 * 14, types=None)


@kind("HyperCLOVAXVisionV2ForConditionalGeneration", since="5.20")
def hyperclovax_vision_v2() -> Example:
    settings = config(
        "hyperclovax_vision_v2",
        text_config=text(head_dim=16, attention_multiplier=0.25),
        vision_config=QWEN2_5_TOWER,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return grid_of(settings, 3 * 2 * 14 * 14, types=None)


@kind("Cosmos3EdgeForConditionalGeneration", since="5.17")
def cosmos3_edge() -> Example:
    tower = vision(image_size=None, patch_size=16, num_patches=64)
    return qwen("cosmos3_edge", tower, text(head_dim=16, rope_parameters=mrope()), 3 * 16 * 16)


@kind("Kimi_K25ForConditionalGeneration", since="5.17")
def kimi_k25() -> Example:
    language = text(
        model_type="deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    settings = config(
        "kimi_k25",
        text_config=language,
        vision_config=vision(image_size=None, pos_emb_height=8, pos_emb_width=8),
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **QWEN_IDS,
    )
    return grid_of(settings, 3, 14, 14, types=None)


@kind("Lfm3VlForConditionalGeneration", since="5.23")
def lfm3_vl() -> Example:
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "patch_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["conv", "full_attention"],
    }
    layers = ["conv", "sliding_attention", "conv", "full_attention"]
    settings = config(
        "lfm3_vl",
        text_config=text(head_dim=16, layer_types=layers, sliding_window=16),
        vision_config=tower,
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **QWEN_IDS,
    )
    return grid_of(settings, 3 * 2 * 16 * 16, types=None)


@kind("MiniMaxM3SparseForConditionalGeneration")
def minimax_m3_vl() -> Example:
    language = text(
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        index_n_heads=1,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=4,
    )
    settings = config(
        "minimax_m3_vl",
        text_config=language,
        vision_config=vision(image_size=None),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=64,
        merged_hidden_size=256,
    )
    return example(settings, HEIGHT * WIDTH // MERGE**2, patches(3 * 2 * 14 * 14))


@kind("MuseGlimmerForConditionalGeneration", since="5.17")
def muse_glimmer() -> Example:
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
    )
    settings = config(
        "muse_glimmer",
        text_config=language,
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=128,
        projector_hidden_size=64,
    )
    return example(settings, HEIGHT * WIDTH // MERGE**2, patches(3 * 2 * 14 * 14))


@kind("HunYuanVLForConditionalGeneration", since="5.17")
def hunyuan_vl() -> Example:
    """A newline after each row, and a token before and after the image, all with the id of the image token."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "out_hidden_size": 64,
        "text_hidden_size": 64,
        "patch_size": 16,
        "max_image_size": 128,
        "min_image_size": 32,
    }
    rotation = {
        "rope_type": "xdrope",
        "rope_theta": 10000.0,
        "xdrope_section": [2, 2, 2, 2],
        "mrope_section": [2, 2, 2, 2],
        "alpha": 1000.0,
        "factor": 1.0,
    }
    settings = config(
        "hunyuan_vl",
        text_config=text(head_dim=16, rope_parameters=rotation),
        vision_config=tower,
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=304,
        image_start_token_id=START,
        image_end_token_id=END,
        image_newline_token_id=304,
    )
    return example(
        settings, 2 + HEIGHT // MERGE * (WIDTH // MERGE + 1), patches(3 * 16 * 16), types="mm_token_type_ids"
    )


@kind("Qwen2_5OmniThinkerForConditionalGeneration")
def qwen2_5_omni_thinker() -> Example:
    from transformers import Qwen2_5OmniThinkerConfig

    settings = Qwen2_5OmniThinkerConfig(
        text_config=text(rope_parameters=mrope()),
        vision_config=QWEN2_5_TOWER,
        audio_config=AUDIO_TOWER,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=310,
        **OMNI_IDS,
        **QWEN_IDS,
    )
    return grid_of(settings, 3 * 2 * 14 * 14, types=None)


@kind("Qwen3OmniMoeThinkerForConditionalGeneration")
def qwen3_omni_moe_thinker() -> Example:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    settings = Qwen3OmniMoeThinkerConfig(
        text_config=text(head_dim=16, rope_parameters=mrope(), num_local_experts=4, **EXPERTS),
        vision_config=DEEPSTACK,
        audio_config={**AUDIO_TOWER, "downsample_hidden_size": 16},
        **OMNI_IDS,
        **QWEN_IDS,
    )
    return grid_of(settings, 3 * 2 * 16 * 16, types=None)
