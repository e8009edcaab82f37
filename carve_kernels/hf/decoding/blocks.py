"""Blocks of tokens that attend to each other in both directions, as some models do over an image.

They are read off the masks that a model makes for a prompt in `generate`: its own code decides, and a mask that is not
causal beside whole blocks is not guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from carve_kernels.hf.decoding.generation import masks_by_generate
from carve_kernels.hf.decoding.prefix_cache import BLOCKS, NO_BLOCK, sees
from carve_kernels.hf.model import makes_own_masks, masks_by_type, text_backbone, windows_by_type


class MasksUnknown(Exception):
    """Raised with the reason why the masks of a prompt are not causal beside blocks."""


class PromptBlocks(NamedTuple):
    """The last column of each token's block in a prompt, NO_BLOCK outside of blocks, int64 [S] on the CPU; for each
    type of layers, the ways among BLOCKS in which it may attend in them, all of which give the masks of this prompt.
    """

    ids: torch.Tensor
    kinds: dict[Any, tuple[str, ...]]


def blocks_of(model: Any, inputs: Mapping[str, Any]) -> PromptBlocks:
    """The blocks of a prompt. Raises MasksUnknown."""
    length = inputs["input_ids"].shape[1]
    blocks = torch.full((length,), NO_BLOCK)
    if not makes_own_masks(model):
        return PromptBlocks(blocks, {})
    try:
        given = masks_by_generate(model, inputs)
    # It may be any model.
    except Exception as error:
        raise MasksUnknown(f"the masks of its prompts are unknown ({type(error).__name__}: {error})") from error
    masks = {kind: _visible(mask, length) for kind, mask in masks_by_type(given).items()}
    for visible in masks.values():
        if visible is not None:
            last = length - 1 - visible.flip(1).int().argmax(1)
            blocks = torch.maximum(blocks, torch.where(last.bincount(minlength=length)[last] > 1, last, NO_BLOCK))
    windows, kinds = windows_by_type(text_backbone(model).config), {}
    column = torch.arange(length)
    for type_, visible in masks.items():
        if type_ not in windows:
            raise MasksUnknown(f"its masks of {type_} layers are of an unknown kind")
        of = {kind: sees(column[:, None], column, blocks[:, None], blocks, windows[type_], kind) for kind in BLOCKS}
        # Without a mask a layer is causal.
        actual = of["causal"] if visible is None else visible
        kinds[type_] = tuple(kind for kind in BLOCKS if torch.equal(of[kind], actual))
        if not kinds[type_]:
            raise MasksUnknown("its masks are not causal beside blocks of tokens")
    return PromptBlocks(blocks, kinds)


def common_kinds(prompts: Sequence[PromptBlocks]) -> dict[Any, str]:
    """How each type of layers attends in the blocks of all these prompts. Raises MasksUnknown if no way fits all."""
    kinds = {}
    for type_ in {type_ for prompt in prompts for type_ in prompt.kinds}:
        possible = [kind for kind in BLOCKS if all(kind in prompt.kinds.get(type_, BLOCKS) for prompt in prompts)]
        if not possible:
            raise MasksUnknown(f"its {type_} layers attend to the blocks of prompts in several ways")
        kinds[type_] = possible[0]
    return kinds


def whole_blocks(blocks: torch.Tensor, length: int) -> int:
    """The largest length of a beginning of a prompt, at most `length`, that does not end inside of a block."""
    while bool((cut := (blocks[:length] >= length).nonzero()[:, 0]).numel()):
        length = int(cut[0])
    return length


def _visible(mask: Any, length: int) -> torch.Tensor | None:
    """A mask argument of a text model as bool [S, S] on the CPU; None for one that only hides padding."""
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask.all())):
        return None
    if not isinstance(mask, torch.Tensor) or mask.shape != (1, 1, length, length):
        raise MasksUnknown(f"its mask of a prompt is a {type(mask).__name__} of an unknown form")
    visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > torch.finfo(mask.dtype).min / 2
    return visible.cpu()
