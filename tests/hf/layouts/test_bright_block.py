"""A bright block changes the tokens whose cells it touches, and no others: a layout is right with nothing measured.

Each family's real processor and vision tower are given a grey image, and the same one with a block. Attention returns
its values, so that tokens do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from carve_kernels import layout_of
from carve_kernels.hf import names
from carve_kernels.hf.families import FAMILIES
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.model import decoder_layers
from carve_kernels.hf.processors import RETURN_TOKEN_TYPES, lacks_token_types
from carve_kernels.types import Box, Size, View
from tests.hf.layouts.test_zoo import skip_unavailable
from tests.support.processors.kinds import pair, zoo_kind

SIZE: Size = (300, 427)
# Vision towers that compute attention themselves, make codes of an image, or have convolutions behind the patches.
OTHERS = {"chameleon", "deepseek_vl_hybrid", "emu3", "got_ocr2", "lfm3_vl"}
NAMES = sorted(name for name, family in FAMILIES.items() if family.kind is not None and name not in OTHERS)
# For `make test`: the last of each kind.
FEW = {FAMILIES[name].kind: name for name in NAMES}.values()
CASES = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in NAMES]
# The reach of a block beyond its edges: of a cell, and in pixels, which are sampled and not averaged.
NEAR, PIXELS = 0.2, 1.0


def test_nearly_all_families_are_compared() -> None:
    assert len(NAMES) >= 53


@pytest.mark.parametrize("name", CASES)
def test_a_block_changes_the_tokens_that_it_touches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unavailable(zoo_kind(name))
    model, processor = pair(name)
    monkeypatch.setattr(processor.image_processor, "resample", Image.Resampling.NEAREST)
    grey = Image.new("RGB", SIZE[::-1], "grey")
    inputs = processed(model, processor, grey)
    views = layout_of(model, processor, inputs, [grey]).views[0]
    is_image = inputs["input_ids"][0] == names.image_id(model.config)
    for view, share in ((views[0], 0.3), (views[-1], 0.6)):
        block = block_in(view, share)
        image = grey.copy()
        image.paste(Image.effect_noise((block[2] - block[0], block[3] - block[1]), 200).convert("RGB"), block)
        with local(model):
            before, after = (features(model, each) for each in (inputs, processed(model, processor, image)))
        changed = (after - before).abs().amax(1) > 1e-6
        assert bool(changed.any())
        rest = changed & is_image
        for each in views:
            touched, untouched = cells_by(each, block)
            found = changed[each.tokens.long()]
            assert bool(found[touched].all()) and not bool(found[untouched].any()), (each.grid, each.box, block)
            rest[each.tokens.long()] = False
        assert not bool(rest.any())


def block_in(view: View, share: float) -> tuple[int, int, int, int]:
    """A block of two cells a side, or one, that begins at a share of a view and of its first cell."""
    left, top, right, bottom = view.box
    across, down = (right - left) / view.grid[1], (bottom - top) / view.grid[0]
    column, row = int(share * view.grid[1]) + share, int(share * view.grid[0]) + share
    x, y = max(0, min(int(left + column * across), SIZE[1] - 9)), max(0, min(int(top + row * down), SIZE[0] - 9))
    return x, y, min(SIZE[1], x + int(1.5 * across)), min(SIZE[0], y + int(1.5 * down))


def cells_by(view: View, block: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cells a block certainly touches, and which it does not, bool [N] each."""
    (across, near_x), (down, near_y) = (
        overlaps(view.box, view.grid[1 - axis], block, axis, SIZE[1 - axis]) for axis in (0, 1)
    )
    return (down[:, None] & across).flatten(), ~(near_y[:, None] & near_x).flatten()


def overlaps(box: Box, count: int, block: tuple[int, ...], axis: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row or column of cells whether it certainly overlaps a block, and whether it may."""
    edges = torch.linspace(box[axis], box[axis + 2], count + 1)
    reach = NEAR * float(edges[1] - edges[0]) + PIXELS
    starts, ends = edges[:-1].clamp(min=block[axis]), edges[1:].clamp(max=block[axis + 2])
    return ends - starts > reach, ends - starts > -reach


def processed(model: Any, processor: Any, image: Image.Image) -> Any:
    options = RETURN_TOKEN_TYPES if lacks_token_types(processor, model) else {}
    return processor(images=[image], text=[build_prompt(processor, "x")], return_tensors="pt", **options)


class Reached(Exception):
    """The text decoder's first layer has its input."""


def features(model: Any, inputs: Any) -> torch.Tensor:
    """What the text decoder is given, [tokens, channels]."""
    found = []

    def keep(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    handle = decoder_layers(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), pytest.raises(Reached):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    # Gemma 3n gives several states of each token.
    return found[0].flatten(0, -3)[0]


@contextmanager
def local(model: Any) -> Iterator[None]:
    """Attention returns its values; that of queries, nothing, or the mean if there is one."""
    ALL_ATTENTION_FUNCTIONS.register("values", values)
    configs = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "values"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def values(_module: Any, query: torch.Tensor, _key: Any, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if value.shape[2] != query.shape[2]:
        value = value.mean(2, keepdim=True) if query.shape[2] == 1 else torch.zeros_like(query)
    return value.transpose(1, 2).contiguous(), None
