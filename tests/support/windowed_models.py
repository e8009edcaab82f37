"""Random text models with softcaps, sinks and sliding windows."""

from __future__ import annotations

from typing import Any

import torch

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "sliding_window": 16,
}


def model_of(name: str, **changes: Any) -> Any:
    import transformers

    config, model, options = {
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"attn_logit_softcapping": 2.0}),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 32}),
        "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        "mistral": ("MistralConfig", "MistralForCausalLM", {}),
    }[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        instance = getattr(transformers, model)(getattr(transformers, config)(**SHAPE, **options, **changes)).eval()
        with torch.no_grad():
            for key, parameter in instance.named_parameters():
                if "q_proj.weight" in key or "k_proj.weight" in key or "sinks" in key:
                    parameter.normal_(0, 0.3)
    instance.generation_config.eos_token_id, instance.generation_config.pad_token_id = None, 0
    return instance
