"""Sizes that a family's options name by the attributes of the model's config, and grids of whole cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any

from carve_kernels.hf.families import family_of
from carve_kernels.types import Size

PATCH = "vision_config.patch_size"


def attribute(config: Any, path: str) -> Any:
    """An attribute of a config or of a config within it, as in "vision_config.patch_size"."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def sides(value: Any) -> Size:
    """(height, width) of a number, of a pair, or of an image processor's size with these names."""
    if isinstance(value, int):
        return value, value
    height, width = value if isinstance(value, (list, tuple)) else (value["height"], value["width"])
    return int(height), int(width)


def cell_of(config: Any, options: Mapping[str, Any]) -> Size:
    """The pixels of the vision tower's input that a token covers, (height, width).

    ========  =====================================================================================================
    cell      the attributes, or numbers, whose product is the side of a cell; by default the patch size
    halvings  the attribute with the multipliers of the levels of an encoder, each of which but one halves the sides
    tokens    the attribute with the number of tokens of a square image, to which its patches are pooled
    ========  =====================================================================================================
    """
    if halvings := options.get("halvings"):
        return sides(2 ** (len(attribute(config, halvings)) - 1))
    factors = [
        sides(attribute(config, each) if isinstance(each, str) else each) for each in options.get("cell", (PATCH,))
    ]
    cell = prod(height for height, _ in factors), prod(width for _, width in factors)
    if tokens := options.get("tokens"):
        pooled = config.vision_config.image_size // cell[0] // int(attribute(config, tokens) ** 0.5)
        return cell[0] * pooled, cell[1] * pooled
    return cell


def options_of(config: Any, processor: Any) -> Mapping[str, Any]:
    """The options of a model's family."""
    family = family_of(config.model_type, processor)
    return {} if family is None else family.options


def settings_of(config: Any, processor: Any, names: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, found, expected) for the attributes of a processor that `names` maps to attributes of a config, or values.

    One of them may have a size as a number, and the other one as (height, width). What a processor lacks is not wrong.
    """
    for name, path in names.items():
        expected = attribute(config, path) if isinstance(path, str) else path
        *owners, last = name.split(".")
        found = getattr(reduce(lambda owner, each: getattr(owner, each, None), owners, processor), last, expected)
        height, width = sides(expected)
        same = found is not None and sides(found) == (height, width)
        yield name, found, found if same else height if height == width else (height, width)


def merged(name: str, patches: Sequence[int], merge: Size) -> Size:
    """The grid of cells of so many patches in an entry of this name. Raises ValueError if some make no whole cell."""
    if patches[0] % merge[0] or patches[1] % merge[1]:
        raise ValueError(
            f"inputs: expected {name} of multiples of {merge[0]} x {merge[1]} patches, which the model merges, got "
            f"{patches[0]} x {patches[1]}"
        )
    return patches[0] // merge[0], patches[1] // merge[1]
