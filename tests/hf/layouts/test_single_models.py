"""Families with one grid an image, with models of other patches, merges and image sizes: tokens are measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from carve_kernels import layout_of
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.measured import measure
from tests.hf.layouts.test_measured import TOLERANCE, photograph
from tests.hf.layouts.test_zoo import skip_unavailable
from tests.support.processors.kinds import pairs, zoo_kind
from tests.support.zoo.kinds import set_text_attention

# For each: what is changed in the model's config, its image processor and its processor.
MODELS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("qwen2_vl", {"vision_config.spatial_merge_size": 3}, {"merge_size": 3}, {}),
    ("qwen2_vl", {"vision_config.spatial_merge_size": 1}, {"merge_size": 1}, {}),
    (
        "qwen3_vl",
        {"vision_config.patch_size": 8, "vision_config.spatial_merge_size": 4},
        {"patch_size": 8, "merge_size": 4},
        {},
    ),
    ("paddleocr_vl", {"vision_config.spatial_merge_size": 3}, {"merge_size": 3}, {}),
    ("hunyuan_vl", {"vision_config.spatial_merge_size": 3}, {"merge_size": 3}, {}),
    ("kimi_k25", {"vision_config.merge_kernel_size": [3, 3]}, {"merge_size": 3}, {}),
    ("video_llama_3", {}, {"merge_size": 2}, {}),
    ("gemma4", {"vision_config.pooling_kernel_size": 3}, {"pooling_kernel_size": 3}, {}),
    ("mistral3", {"spatial_merge_size": 3, "vision_config.image_size": 126}, {}, {"spatial_merge_size": 3}),
    ("lighton_ocr", {"spatial_merge_size": 1}, {}, {"spatial_merge_size": 1, "effective_patch_size": 14}),
    ("llava", {"vision_feature_select_strategy": "full"}, {}, {"vision_feature_select_strategy": "full"}),
    ("llava", {"vision_feature_layer": [-2, -1]}, {}, {}),
    # Their last pixels make no whole patch, or their last patches are not pooled.
    ("gemma3", {"vision_config.image_size": 70}, {"size": (70, 70)}, {}),
    ("paligemma", {"vision_config.image_size": 60}, {"size": (60, 60)}, {}),
    ("janus", {"vision_config.image_size": 60}, {"size": (60, 60)}, {}),
]


@pytest.mark.parametrize(("name", "config", "image_processor", "processor"), MODELS, ids=str)
def test_tokens_lie_where_they_are_measured(
    name: str, config: dict[str, Any], image_processor: dict[str, Any], processor: dict[str, Any]
) -> None:
    kind = zoo_kind(name)
    skip_unavailable(kind)
    settings = kind.make().config
    for path, value in config.items():
        owner, _, attribute = path.rpartition(".")
        setattr(getattr(settings, owner) if owner else settings, attribute, value)
    torch.manual_seed(0)
    model = getattr(transformers, kind.class_name)(settings).float().eval()
    set_text_attention(model, "sdpa")
    for parameter in model.parameters():
        # Some begin as zeros, through which nothing is seen.
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter)
    made = pairs()[name].make()
    for attribute, value in image_processor.items():
        size = {"height": value[0], "width": value[1]} if isinstance(value, tuple) else value
        setattr(made.image_processor, attribute, type(made.image_processor.size)(**size) if size != value else value)
    for attribute, value in processor.items():
        setattr(made, attribute, value)
    for size in ((131, 97), (60, 203)) if name != "janus" else ((131, 97), (97, 103)):
        image = photograph(size)
        inputs = made(images=[image], text=[build_prompt(made, "x")], return_tensors="pt")
        off = deviations(layout_of(model, made, inputs, [image]), measure(model, made, size))
        assert len(off) > 0
        assert float(off.max()) <= TOLERANCE
