"""Images that are more, fewer or none of those in a prompt are refused by that argument, in every kind of layout."""

from __future__ import annotations

import pytest
import torch

from carve_kernels import layout_of
from carve_kernels.hf.inputs import build_prompt, prepare
from tests.support.processors.kinds import pair, zoo_kind
from tests.support.tiny_models import make_image

PHOTO, OTHER = make_image(120, 71, 1), make_image(66, 93, 2)
# A kind of layout each; of the last one the layout is measured.
KINDS = ("qwen2_vl", "llava", "gemma3", "gemma4", "mistral3", "deepseek_vl", "kimi_k25", "fuyu", "internvl", "idefics3",
         "llava_next", "molmo2", "video_llava")  # fmt: skip
EACH = "give the images of each row as its own list, in the order of the prompt"


@pytest.mark.parametrize("name", KINDS)
def test_other_numbers_of_images_are_refused(name: str) -> None:
    if not zoo_kind(name).exists():
        pytest.skip("this transformers has no such class")
    model, processor = pair(name)
    inputs = prepare(processor, [PHOTO], build_prompt(processor, "x"))
    count = int(torch.isin(inputs["input_ids"], torch.tensor(model.config.image_token_id)).sum())
    with pytest.raises(
        ValueError, match=f"^images: row 0 has {count} image tokens in its prompt, got no image; {EACH}"
    ):
        layout_of(model, processor, inputs, [[]])
    measured = name == "video_llava"
    with pytest.raises(ValueError, match="^inputs: pixel_values_images of shape" if measured else "^images: .*give"):
        layout_of(model, processor, inputs, [PHOTO, OTHER])
    assert len(layout_of(model, processor, inputs, [PHOTO]).sizes[0]) == 1
