"""The answer about the image of an earlier prompt and a later image, after the cached prefix of the earlier prompt."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from carve_kernels.hf.decoding import Branch, Decoder, PromptGroup
from carve_kernels.hf.decoding.generation import preserved_positions
from carve_kernels.hf.engine.requests import Prompt
from carve_kernels.hf.image_inputs import ImageInputs
from carve_kernels.hf.model import attention_modules, unwrap


def has_beams(model: Any) -> bool:
    """Whether the model's generation config asks for beams, which decoding with a shared prefix has not."""
    return (unwrap(model).generation_config.num_beams or 1) > 1


def second_answer(
    model: Any,
    processor: Any,
    image_inputs: ImageInputs,
    images: tuple[Image.Image, Image.Image],
    text: str,
    steps: int,
    *,
    group: PromptGroup,
    first: Prompt,
) -> list[int]:
    """The new tokens, at most `steps`, as `generate` without sampling gives them.

    ============  =====================================================================================================
    image_inputs  has processed the first image
    images        the first image, and the later one
    text          the prompt about both
    group, first  the decoded group of an earlier prompt about the first image, and that prompt; where the text does
                  not begin as it does, or the processor cannot process the later image alone, both images are read
    ============  =====================================================================================================
    """
    inputs, features = image_inputs.inputs(list(images), text)
    if has_beams(model):
        with torch.no_grad(), preserved_positions(unwrap(model)):
            found = unwrap(model).generate(  # type: ignore[operator]
                **{**inputs, **features.entries}, max_new_tokens=steps, do_sample=False
            )
        new: list[int] = found[0, inputs["input_ids"].shape[1] :].tolist()
        return new
    branch = Branch(inputs, steps, images=features, later_images=image_inputs.subset(images[1:]))
    prefix, ids = first.prefix_ids, inputs["input_ids"][0]
    if tuple(ids[: len(prefix)].tolist()) == prefix and branch.later_images is not None:
        second = PromptGroup(group.images, group.start, prefix=group.prefix)
    else:
        branch.later_images = None
        marks = first.inputs["input_ids"][0, first.layout.tokens()[0].long()].unique()
        second = PromptGroup(features, int(torch.isin(ids, marks).nonzero()[-1]) + 1)
    second.branches.append(branch)
    Decoder(model, processor, tuple(attention_modules(model)), "auto").decode([second])
    return list(branch.ids)
