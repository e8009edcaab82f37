"""A wrong argument of a frontend's function is refused by the name that was typed, before the model runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carve_kernels.frontends import release, vicrop
from tests.support.processors.kinds import pair
from tests.support.wrong_arguments import at_least, either, is_integer, one_of, optional, refusals

RANDOM = np.random.default_rng(0)
TASK, GENERAL = (RANDOM.random((2, 3, 12)) + 0.1 for _ in range(2))
SALIENCY, MASK = RANDOM.random((60, 80)), RANDOM.integers(0, 2, (60, 80)).astype(np.uint8)
IMAGE = Image.fromarray(RANDOM.integers(0, 255, (60, 80, 3), dtype=np.uint8))
RULE = {"top_percent": 0.2, "min_keep_regions": 3, "outlier_percent": 0.1, "strategy": "attention_sum"}
COUNT, STEPS = at_least(0), at_least(1, is_integer)
RULES = {"outlier_percent": COUNT, "min_keep_regions": STEPS}
SIZES: list[Any] = [(0, 0), (80,), (80, 60, 3), (80.5, 60), "80"]


def is_grid(value: Any) -> bool:
    """Whether an array of numbers [H, W]."""
    is_array = isinstance(value, (np.ndarray, torch.Tensor))
    return is_array and value.ndim == 2 and getattr(value.dtype, "kind", "f") in "biuf"


def is_image(value: Any) -> bool:
    return isinstance(value, Image.Image)


def is_range(value: Any) -> bool:
    return isinstance(value, range) or type(value) is type(iter([]))


def test_fuse_contrastive_attention() -> None:
    right = {"query_maps": TASK.tolist(), "general_maps": list(GENERAL), "image_size": (80, 60), "layers": [0, 2]}
    right |= {"lam": 1e-8, "output_shape": (3, 4), "step_mode": "all"}
    wrong: list[Any] = [TASK[0], TASK * np.nan, -TASK, [*TASK[:1], TASK[1, :2]]]
    more = {"query_maps": wrong, "general_maps": wrong, "image_size": SIZES, "output_shape": [(4, 4), (3.0, 4)]}
    accepts = {"lam": COUNT, "layers": either(one_of([1], (1, 2), (-3, -4)), is_range), "image_size": one_of((1, 2))}
    assert not refusals(release.fuse_contrastive_attention, right, accepts, more=more)


def test_dynamic_reshape_attention() -> None:
    right = {"att": TASK[0, 0], "fallback_shape": (3, 4)}
    accepts = {"fallback_shape": one_of(None), "att": is_list_of_numbers}
    assert not refusals(release.dynamic_reshape_attention, right, accepts)


def is_list_of_numbers(value: Any) -> bool:
    """Arrays of another number of tokens: then the grid is wrong."""
    return (
        isinstance(value, tuple) or value in ([], [1]) if isinstance(value, (list, tuple)) else hasattr(value, "shape")
    )


@pytest.mark.parametrize("strategy", ["attention_sum", "size", "remove_small"])
def test_create_attention_mask(strategy: str) -> None:
    right = {"sum_att_map": SALIENCY, **RULE, "strategy": strategy}
    more = {"sum_att_map": [SALIENCY[0], SALIENCY.astype("float16")], "top_percent": [1.5], "strategy": ["sum"]}
    assert not refusals(release.create_attention_mask, right, {"sum_att_map": is_zero, **RULES}, more=more)


def is_zero(value: Any) -> bool:
    """Whether a saliency of finite numbers, which is flat."""
    return is_grid(value) and bool((value == 0).all())


def test_masks_boxes_and_crops() -> None:
    more: dict[str, list[Any]] = {
        "image": [IMAGE.convert("L"), IMAGE.resize((9, 9))],
        "mask_map": [MASK * 255, MASK[0]],
    }
    right = {"image": IMAGE, "mask_map": MASK}
    # A mask of another size is named beside the image.
    assert not refusals(release.apply_mask_to_image, right, {}, more=more)
    assert not refusals(release.get_crop_bbox_from_mask, {"mask_map": MASK}, {"mask_map": is_zero}, more=more)
    right = {"crop_image": IMAGE, "original_size": (80, 60)}
    accepts = {"crop_image": is_image, "original_size": one_of((1, 2))}
    assert not refusals(release.resize_crop_to_match_original, right, accepts, more={"original_size": SIZES})


def test_att_sum_crop_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    right = {"sum_att_map": SALIENCY, "image": IMAGE, **RULE, "save_dir": None}
    more: dict[str, list[Any]] = {"sum_att_map": [SALIENCY[1:]], "image": [IMAGE.convert("L"), IMAGE.resize((9, 9))]}
    accepts = {**RULES, "save_dir": one_of(None, "", "x")}
    assert not refusals(release.att_sum_crop_pipeline, right, accepts, more=more)


def is_layer(value: Any) -> bool:
    """Whether one of the four layers of the tiny models."""
    return is_integer(value) and 0 <= value < 4


@functools.cache
def loaded(kind: str) -> tuple[Any, Any]:
    return pair(kind)


def test_carve_of_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = loaded("qwen2_5_vl")
    right = {"model": model, "processor": processor, "image": IMAGE, "question": "what digit is red"}
    right |= {"family": "qwen2_5", "version": "v4", "layers": [0, 1], "lam": 1e-8, "max_new_tokens": 1}
    right |= {**RULE, "general_instruction": "Describe.", "device": None, "save_dir": None}
    del right["strategy"]
    text = one_of("x")
    accepts = {
        **RULES,
        "lam": COUNT,
        "layers": either(one_of([1], (1, 2), (-3, -4)), is_range),
        "max_new_tokens": STEPS,
    }
    accepts |= {"question": text, "general_instruction": text, "device": one_of(None), "image": is_image}
    accepts["save_dir"] = one_of(None, "", "x")
    more: dict[str, list[Any]] = {"layers": [[99], ["a"]], "device": ["cuda"], "family": ["llava"], "version": ["v5"]}
    assert not refusals(release.carve, right, accepts, more=more)


def test_generate_with_attention() -> None:
    model, processor = loaded("qwen2_5_vl")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}], tokenize=False
    )
    inputs = processor(images=[IMAGE], text=[text], return_tensors="pt")
    right = {"model": model, "processor": processor, "inputs": inputs, "max_new_tokens": 1, "num_image_tokens": 576}
    right |= {"vision_start_token_id": None, "vision_end_token_id": None}
    token = optional(at_least(0, is_integer))
    accepts = {"max_new_tokens": STEPS, "num_image_tokens": STEPS, "vision_start_token_id": token}
    more = {"inputs": [{}, {"input_ids": [[1]]}, {"input_ids": inputs["input_ids"][0]}]}
    assert not refusals(release.generate_with_attention, right, accepts | {"vision_end_token_id": token}, more=more)


@pytest.mark.parametrize("name", ["llava", "qwen2_5"])
@pytest.mark.parametrize("kind", ["rel", "gradient"])
def test_maps_of_vicrop(kind: str, name: str) -> None:
    model, processor = loaded({"llava": "llava", "qwen2_5": "qwen2_5_vl"}[name])
    prompt = "<image>\nwhat" if name == "llava" else "what"
    right = {"image": IMAGE, "prompt": prompt, "general_prompt": prompt, "model": model, "processor": processor}
    text = one_of("x") if name != "llava" else one_of()
    accepts = {"image": is_image, "layer": is_layer, "prompt": text, "general_prompt": text}
    call = getattr(vicrop, f"{kind}_attention_{name}")
    leaves = ["general_prompt"] if kind == "gradient" else []
    assert not refusals(call, {**right, "layer": 1}, accepts, more={"layer": [99]}, leaves=leaves)


def test_vicrop_qa(tmp_path: Path) -> None:
    model, processor = loaded("llava")
    IMAGE.resize((500, 400)).save(tmp_path / "image.png")
    right = {"model_name": "llava", "method_name": "rel_att", "image_path": tmp_path / "image.png", "question": "what"}
    right |= {"model": model, "processor": processor, "short_question": "what", "layer": 1}
    # A file that is missing is an OSError.
    accepts = {
        "image_path": one_of("x", b"x"),
        "question": one_of("x"),
        "short_question": one_of("x"),
        "layer": optional(is_layer),
    }
    more: dict[str, list[Any]] = {"model_name": ["blip"], "method_name": ["pure_grad"]}
    assert not refusals(vicrop.vicrop_qa, right, accepts, more=more)


def test_boxes_and_parts() -> None:
    right = {"att_map": SALIENCY, "image_size": (80, 60), "bbox_size": 33}
    accepts = {"bbox_size": STEPS, "att_map": is_zero, "image_size": one_of((1, 2))}
    more: dict[str, list[Any]] = {"att_map": [SALIENCY[0], SALIENCY * np.nan], "image_size": SIZES}
    assert not refusals(vicrop.bbox_from_att_image_adaptive, right, accepts, more=more)
    right = {"image": IMAGE, "res_threshold": 1024}
    assert not refusals(vicrop.high_res_split_threshold, right, {"image": is_image, "res_threshold": STEPS})
