"""Input and output of decoding: prompts grouped by image prefix, and the result of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from carve_kernels.hf.decoding.prefix_cache import PrefixCache
from carve_kernels.hf.image_inputs import ImageFeatures
from carve_kernels.maps import AttentionMaps
from carve_kernels.types import RowsSpec, VisualLayout


@dataclass(frozen=True)
class Decoded:
    """The new tokens of a prompt, its maps if rows were captured, and how many tokens were processed for it only."""

    ids: tuple[int, ...]
    maps: AttentionMaps | None
    tokens: int


@dataclass(eq=False)
class Branch:
    """One prompt of a group.

    ==============  ==================================================================================================
    inputs          what the processor returned, without the pixels
    max_new_tokens  0 ends the forward after the last captured layer
    rows            the captured rows, or None
    images          the features of all of its images where they are not the group's
    later_images    the features of the images after the group's prefix, if there are any
    ids             the new tokens, set by `decode`
    maps            the captured maps, set by `decode` if there are rows
    ==============  ==================================================================================================
    """

    inputs: Mapping[str, Any]
    max_new_tokens: int
    rows: RowsSpec | None = None
    images: ImageFeatures | None = None
    later_images: ImageFeatures | None = None
    ids: tuple[int, ...] = field(init=False)
    maps: AttentionMaps = field(init=False)


@dataclass(eq=False)
class PromptGroup:
    """Prompts whose first `start` tokens, up to the last token of their shared image, are the same.

    ==========  ======================================================================================================
    images      the features of the shared images
    start       the least number of tokens that the prompts share, up to the last image token
    layout      where the visual tokens are; needed where rows are captured
    prefix      the KV cache of the prefix: an earlier one, or None; after decoding the one that was used
    all_layers  whether all layers process the prefix even if no branch generates tokens
    ==========  ======================================================================================================
    """

    images: ImageFeatures
    start: int
    layout: VisualLayout | None = None
    prefix: PrefixCache | None = None
    all_layers: bool = False
    branches: list[Branch] = field(default_factory=list)
