"""What a kind of layout says of one image, before it is known where in the sequence the image stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from carve_kernels.types import Box, Size, ViewKind


class Part(NamedTuple):
    """One rectangle of an image: which of the image's tokens it takes (int64 [GH * GW]), its grid, its box."""

    columns: torch.Tensor
    grid: Size
    box: Box
    kind: ViewKind = "base"


class Placing(NamedTuple):
    """One image: how many tokens it has in the prompt, and the rectangles among them."""

    length: int
    parts: tuple[Part, ...]


class Canvas(NamedTuple):
    """A larger picture that an image is laid on: its (height, width), and where the image's top left corner is."""

    size: Size
    top: int = 0
    left: int = 0


class Place(Protocol):
    """From what the processor returned and the (height, width) of every image, to placings."""

    def __call__(self, config: Any, processor: Any, inputs: Any, sizes: list[Size]) -> list[Placing]: ...


class Kind(NamedTuple):
    """A kind of layout.

    `check` raises ValueError for settings of a processor that do not fit the model's; `canvas` finds the smallest
    canvas for an image of a (height, width) that the processor shows whole, the image itself where it does already.
    """

    place: Place
    check: Callable[[Any, Any], None]
    canvas: Callable[[Any, Any, Size], Canvas]


def agree(name: str, found: Any, expected: Any) -> None:
    """A setting of the processor must be what the model's config says."""
    if found != expected:
        raise ValueError(
            f"processor: {name} is {found!r}, expected {expected!r} as the model has it; "
            f"set processor.{name} = {expected!r}, or write it into the checkpoint's file of the processor"
        )


def needed(inputs: Any, name: str) -> torch.Tensor:
    """An entry that the processor must have returned."""
    value = inputs.get(name)
    if value is None:
        raise ValueError(f"inputs: expected {name!r} from the processor, got {', '.join(sorted(inputs)) or 'nothing'}")
    return value


def check_count(have: int, sizes: list[Size]) -> None:
    """The caller must say the size of every image that the processor was given."""
    if have != len(sizes):
        raise ValueError(
            f"images: the inputs hold {have} image(s), got {len(sizes)}; give every image of the prompts in order, "
            "one list a row, and choose among the views afterwards by `view.image`"
        )
