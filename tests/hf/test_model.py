"""Finding the model, its decoder and its attention, with and without wrappers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from carve_kernels import CarveEngine, capture_attention
from carve_kernels.hf.model import (
    attention_modules,
    check_decoder,
    decoder_layers,
    image_token_positions,
    text_backbone,
    unwrap,
)
from tests.support import tiny_models


class Tuner(nn.Module):
    """As PEFT's LoraModel: the model is its child `model`, and every other name is the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Adapted(nn.Module):
    """As PEFT's PeftModel."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "lora": lambda model: Adapted(Tuner(model)),
    "prompt tuning": Adapted,
    "all": lambda model: torch.compile(nn.DataParallel(Adapted(Tuner(model)))),
}


@pytest.fixture(scope="module", params=[tiny_models.tiny_llava, tiny_models.tiny_qwen2_vl, tiny_models.tiny_qwen2_5_vl])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_unwrapped(model: Any, wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper](model)
    assert unwrap(wrapped) is model
    assert text_backbone(wrapped) is model.model.language_model
    assert decoder_layers(wrapped) is model.model.language_model.layers
    expected = {number: layer.self_attn for number, layer in enumerate(model.model.language_model.layers)}
    assert attention_modules(wrapped) == expected


def test_text_models_and_models_without_a_head() -> None:
    llama = tiny_models.tiny_llama()
    assert text_backbone(llama) is llama.model
    assert text_backbone(llama.model) is llama.model
    assert list(attention_modules(llama)) == [0, 1, 2, 3]
    llava = tiny_models.tiny_llava()[0]
    assert text_backbone(llava.model) is llava.model.language_model


def test_parts_of_the_model_may_be_compiled() -> None:
    model = tiny_models.tiny_llava()[0]
    expected = attention_modules(model)
    layers = model.model.language_model.layers
    layers[1] = torch.compile(layers[1])
    model.model.language_model = torch.compile(model.model.language_model)
    assert attention_modules(model) == expected


def test_layers_without_softmax_attention_are_absent() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **{**tiny_models.TEXT, "num_hidden_layers": 3},
        vocab_size=50,
        head_dim=32,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = Qwen3NextForCausalLM(config)
    assert list(attention_modules(model)) == [1]
    model.model.config.layer_types = None
    assert list(attention_modules(model)) == [1]


def test_other_modules_are_refused() -> None:
    for value in (nn.Linear(2, 2), SimpleNamespace(), None):
        with pytest.raises(TypeError, match="expected a transformers model or a wrapper"):
            unwrap(value)  # type: ignore[arg-type]
    tower = tiny_models.tiny_llava()[0].model.vision_tower
    with pytest.raises(TypeError, match="no text decoder with `layers` in CLIPVisionModel"):
        text_backbone(tower)


def test_blip_is_refused_for_its_cross_attention() -> None:
    """Its text decoder has no `layers`, and reads the image by cross-attention."""
    language = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    language |= {"vocab_size": 50, "encoder_hidden_size": 32, "bos_token_id": 1}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.BlipConfig(text_config=language, vision_config={**vision, "intermediate_size": 32})
    model = transformers.BlipForConditionalGeneration(config)
    message = (
        r"^model: found no text decoder .* BlipForConditionalGeneration, whose .*crossattention.* uses cross-attention"
    )
    for refuses in (
        check_decoder,
        lambda each: capture_attention(each, layers="all"),
        lambda each: CarveEngine(each, None),
    ):
        with pytest.raises(TypeError, match=message):
            refuses(model)


def test_image_tokens_include_video_tokens_and_need_a_name_in_the_config() -> None:
    model = tiny_models.tiny_qwen2_vl()[0]
    image, video = model.config.image_token_id, model.config.video_token_id
    ids = torch.tensor([[1, image, image, 2, 3], [0, 0, 2, video, video]])
    rows = image_token_positions(model, ids)
    assert [row.tolist() for row in rows] == [[1, 2], [3, 4]]
    assert all(row.dtype == torch.int32 for row in rows)
    with pytest.raises(ValueError, match="'llama' names no image token"):
        image_token_positions(tiny_models.tiny_llama(), ids)
