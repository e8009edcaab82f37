"""The release's `carve`: the image is read once, both prompts decode in one batch, the last one continues the cache.

The question and the general instruction are decoded by plain argmax, the question about both images by the model's own
generation config, as the release does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image

from carve_kernels import checks
from carve_kernels.frontends.release.attention import (
    DEFAULT_LAYERS,
    GENERAL_INSTRUCTION,
    Array,
    StepMaps,
    answer_text,
    argmax_twin,
    by_step,
    every_layer,
    fuse_contrastive_attention,
    layers_within,
)
from carve_kernels.frontends.release.masking import att_sum_crop_pipeline, check_rule, save_path_of
from carve_kernels.frontends.second_answer import second_answer
from carve_kernels.hf import processors
from carve_kernels.hf.decoding import Branch, Decoder, PromptGroup, exclusive
from carve_kernels.hf.decoding.generation import greedy_config
from carve_kernels.hf.engine.requests import Prompt, locate_prompt
from carve_kernels.hf.image_inputs import ImageFeatures, ImageInputs
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.loading import load, locate
from carve_kernels.hf.model import check_decoder, check_steady, input_device, unwrap
from carve_kernels.hf.session import contract
from carve_kernels.types import Box, Size
from carve_kernels.view_pixels import rectangle

ANSWER_SUFFIX = "Answer the question using a single word or phrase."

VERSIONS = {
    "v1": ("first", "remove_small"),
    "v2": ("first", "size"),
    "v3": ("first", "attention_sum"),
    "v4": ("all", "attention_sum"),
}
"""The step mode and the mask rule of each version."""

FAMILIES = {"qwen2_5": ("qwen2_5_vl", "qwen2_vl"), "llava": ("llava",)}
"""The model types of each family."""

_MOST_PIXELS = 256 * 28 * 28
# qwen_vl_utils resizes images to multiples of two patches, within these numbers of pixels, before the processor does.
_PATCH = 28
_FEWEST, _MOST = 4 * _PATCH**2, 16384 * _PATCH**2
_LONGEST = 200


@dataclass
class CarveOutput:
    """What `carve` returns.

    =================  ===============================================================================================
    original_answer    the answer about the image; `refined_answer` about the image and the refined one
    sum_att_map        the saliency, float64 [H, W]; `mask_map` uint8 [H, W] of 0 and 1
    refined_image      the crop to `bbox`, x0 y0 x1 y1, black outside of the mask, magnified
    query_attention    maps float32 [N] by step and layer of the question; `general_attention` of the instruction
    output_shape       the grid of the N tokens, (rows, columns)
    =================  ===============================================================================================
    """

    original_answer: str
    refined_answer: str
    sum_att_map: Any
    mask_map: Any
    refined_image: Image.Image
    bbox: tuple[int, ...]
    query_attention: StepMaps
    general_attention: StepMaps
    output_shape: Size


class _Request(NamedTuple):
    """The image as the processor gets it, its two prompts, its grid of tokens, and the rectangle that they show."""

    resized: Image.Image
    image_inputs: ImageInputs
    task: Prompt
    general: Prompt
    features: ImageFeatures
    grid: Size
    box: Box


def load_model(model_id: str, family: str = "qwen2_5", device: str = "cuda") -> tuple[Any, Any]:
    """Load the model, in bfloat16 and eval mode, and the processor; an id that is not here is downloaded.

    The attention implementation is transformers' default for the model, not eager. Images of "qwen2_5" get at most
    256 * 28 * 28 pixels. Raises ValueError for another family, also of the checkpoint, and what `load` raises.
    """
    checks.choice("family", family, tuple(FAMILIES))
    if locate(model_id) is None:
        snapshot_download(model_id)
    model, processor = load(model_id, dtype=torch.bfloat16, device=device)
    _check_family(model, family)
    if family == "qwen2_5":
        processor.image_processor.size["longest_edge"] = _MOST_PIXELS
    return model, processor


def carve(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    *,
    family: str = "qwen2_5",
    version: str = "v4",
    layers: Sequence[int] = DEFAULT_LAYERS,
    lam: float = 1e-8,
    top_percent: float = 0.2,
    min_keep_regions: int = 3,
    outlier_percent: float = 0.1,
    max_new_tokens: int = 32,
    general_instruction: str = GENERAL_INSTRUCTION,
    device: Any = None,
    save_dir: str | None = None,
) -> CarveOutput:
    """The release's answer to a question about an image, and about the image and its refined part.

    ================  =================================================================================================
    family            "qwen2_5" or "llava"; it decides the prompt and how the image is resized
    version           "v1" to "v4", see VERSIONS
    layers, lam       as of `fuse_contrastive_attention`; top_percent to outlier_percent of `create_attention_mask`
    max_new_tokens    at most so many tokens of each answer
    device            None, or the device of the model
    save_dir          a folder for five PNG files, see `att_sum_crop_pipeline`
    ================  =================================================================================================

    Raises TypeError or ValueError, before the model runs, for an argument of the wrong kind or range.
    """
    checks.choice("version", version, tuple(VERSIONS))
    checks.choice("family", family, tuple(FAMILIES))
    step_mode, strategy = VERSIONS[version]
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image, got {checks.describe(image)}")
    checks.text("question", question)
    checks.text("general_instruction", general_instruction)
    steps = checks.integer("max_new_tokens", max_new_tokens, low=1)
    checks.number("lam", lam, low=0)
    check_rule(top_percent, min_keep_regions, outlier_percent, strategy)
    save_path_of("save_dir", save_dir)
    _check_model(model, processor, family, layers, device)
    # Without the file's entries, whose orientation the release does not apply.
    original = Image.fromarray(np.asarray(image.convert("RGB")))
    request = _request(model, processor, family, original, question, general_instruction)
    with exclusive(model):
        group, answer, maps = _first_pass(model, processor, request, steps)
        saliency = _saliency(original, request, maps, layers, lam, step_mode)
        found = att_sum_crop_pipeline(
            saliency,
            original,
            top_percent=top_percent,
            min_keep_regions=min_keep_regions,
            outlier_percent=outlier_percent,
            strategy=strategy,
            save_dir=save_dir,
        )
        refined = found["crop_masked_image"]
        refined_answer = _second_pass(model, processor, family, request, group, refined, question, steps)
    return CarveOutput(
        original_answer=answer,
        refined_answer=refined_answer,
        sum_att_map=saliency,
        mask_map=found["mask_map"],
        refined_image=refined,
        bbox=found["bbox"],
        query_attention=maps[0],
        general_attention=maps[1],
        output_shape=request.grid,
    )


def _check_family(model: Any, family: str) -> None:
    kind = unwrap(model).config.model_type
    if kind not in FAMILIES[family]:
        raise ValueError(f"family: expected the one of the model, whose model_type is {kind!r}, got {family!r}")


def _check_model(model: Any, processor: Any, family: str, layers: Sequence[int], device: Any) -> None:
    contract.ensure()
    check_decoder(model)
    processors.check(processor)
    check_steady(model)
    _check_family(model, family)
    layers_within(layers, len(every_layer(model)))
    greedy_config(model, 1)
    place = input_device(model)
    if device is not None and not _is_there(device, place):
        raise ValueError(
            f"device: expected that of the model, {place}, got {checks.describe(device)}; move the model before"
        )


def _is_there(device: Any, place: torch.device) -> bool:
    if isinstance(device, torch.device):
        return device.type == place.type
    return isinstance(device, str) and device.split(":")[0] == place.type


def _request(
    model: Any, processor: Any, family: str, image: Image.Image, question: str, general_instruction: str
) -> _Request:
    """Process an image and its two prompts."""
    resized = _resized(image) if family == "qwen2_5" else image
    image_inputs = ImageInputs.for_model(model, processor, None)

    def locate_image(text: str) -> tuple[Prompt, ImageFeatures]:
        prompt = _prompt(processor, family, text, 1)
        inputs, features = image_inputs.inputs([resized], prompt)
        return locate_prompt(model, processor, [resized], prompt, inputs, features), features

    task, features = locate_image(question)
    general, _ = locate_image(general_instruction)
    views = task.layout.views[0]
    if len(views) != 1:
        raise ValueError(f"processor: expected one that shows an image as one grid of tokens, got {len(views)} of them")
    left, top, right, bottom = views[0].box
    across, down = image.width / resized.width, image.height / resized.height
    box = left * across, top * down, right * across, bottom * down
    return _Request(resized, image_inputs, task, general, features, views[0].grid, box)


def _first_pass(
    model: Any, processor: Any, request: _Request, steps: int
) -> tuple[PromptGroup, str, tuple[StepMaps, StepMaps]]:
    """Decode the question and the general instruction by argmax; their shared group, the answer, and both maps."""
    task, general = (Branch(prompt.inputs, steps, "last") for prompt in (request.task, request.general))
    group = PromptGroup(request.features, request.task.prefix_length, request.task.layout, all_layers=True)
    group.branches += [task, general]
    twin = argmax_twin(model, processor.tokenizer.eos_token_id)
    Decoder(twin, processor, every_layer(model), "auto").decode([group])
    return group, answer_text(processor, task.ids), (by_step(task.maps), by_step(general.maps))


def _saliency(
    image: Image.Image,
    request: _Request,
    maps: tuple[StepMaps, StepMaps],
    layers: Sequence[int],
    lam: float,
    step_mode: str,
) -> Array:
    """The saliency on the pixels that the model sees, and 0 on others."""
    left, top, right, bottom = rectangle(request.box, (image.height, image.width)) or (0, 0, 0, 0)
    visible = fuse_contrastive_attention(
        *maps, (right - left, bottom - top), layers=layers, lam=lam, output_shape=request.grid, step_mode=step_mode
    )
    if visible.shape == (image.height, image.width):
        return visible
    saliency = np.zeros((image.height, image.width))
    saliency[max(0, top) : bottom, max(0, left) : right] = visible[
        max(0, -top) : image.height - top, max(0, -left) : image.width - left
    ]
    return saliency


def _second_pass(
    model: Any,
    processor: Any,
    family: str,
    request: _Request,
    group: PromptGroup,
    refined: Image.Image,
    question: str,
    steps: int,
) -> str:
    """The answer about the image and the refined one, after the cached prefix of the image where that is possible."""
    later = _resized(refined) if family == "qwen2_5" else refined
    prompt = _prompt(processor, family, question, 2)
    new = second_answer(
        model, processor, request.image_inputs, (request.resized, later), prompt, steps, group=group, first=request.task
    )
    return _last_answer(processor, new)


def _last_answer(processor: Any, new: list[int]) -> str:
    [text] = processor.batch_decode([new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answer: str = text.strip().rpartition("ASSISTANT:")[2]
    return answer.strip()


def _prompt(processor: Any, family: str, text: str, images: int) -> str:
    question = f"{text} {ANSWER_SUFFIX}"
    if family == "qwen2_5":
        return build_prompt(processor, question, images)
    return f"{'<image>' * images}\nUSER: {question}\nASSISTANT:"


def _resized(image: Image.Image) -> Image.Image:
    """An image as qwen_vl_utils gives it to the processor: resized to multiples of two patches."""
    width, height = image.size
    if max(width, height) > _LONGEST * min(width, height):
        raise ValueError(
            f"image: expected sides of a ratio of at most {_LONGEST}, got {width} x {height} pixels (of the image or "
            "of its refined part)"
        )
    sides = [max(_PATCH, round(side / _PATCH) * _PATCH) for side in (width, height)]
    pixels = math.prod(sides)
    if pixels > _MOST:
        scale = math.sqrt(width * height / _MOST)
        sides = [math.floor(side / scale / _PATCH) * _PATCH for side in (width, height)]
    elif pixels < _FEWEST:
        scale = math.sqrt(_FEWEST / (width * height))
        sides = [math.ceil(side * scale / _PATCH) * _PATCH for side in (width, height)]
    return image.resize((sides[0], sides[1]))
