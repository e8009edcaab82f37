"""How far a layout's boxes are from measured ones."""

from __future__ import annotations

import torch

from carve_kernels.hf.layouts.measured import Measured
from carve_kernels.types import VisualLayout

# A cell that shows less of the image than this shows none of it.
_NOTHING = 0.05
# The smallest cell in pixels: what an enlarged image shows within a pixel cannot be measured more finely.
_SMALLEST = 4.0


def deviations(layout: VisualLayout, measured: Measured) -> torch.Tensor:
    """How far each image token's box in a layout is from the measured one, in cells, float64 [N].

    That is the largest distance between two edges, by the side of the layout's box, or by 4 pixels if that is less. It
    is infinite for a token that only one of them places, unless its box in the layout lies outside of the image, and
    for one placed in another image. A token that neither of them places is 0 off.
    """
    boxes, images = cells_of(layout, measured)
    cells = (boxes[:, 2:] - boxes[:, :2]).clamp(min=_SMALLEST)
    off = ((boxes - measured.boxes).abs() / torch.cat([cells] * 2, 1)).amax(1)
    placed, seen = images >= 0, measured.images >= 0
    off = torch.where(images == measured.images, off, torch.inf)
    return off.where(placed | seen, 0.0).where(seen | (_visible(boxes, images, measured) > _NOTHING), 0.0)


def cells_of(layout: VisualLayout, measured: Measured) -> tuple[torch.Tensor, torch.Tensor]:
    """The box of each measured token in a layout, NaN where it has none, and the number of its image, or -1.

    Raises ValueError if the layout has a token that is no image token.
    """
    numbers = {(row, column): number for number, (row, column) in enumerate(measured.tokens.tolist())}
    boxes = torch.full((len(numbers), 4), torch.nan, dtype=torch.float64)
    images = torch.full((len(numbers),), -1)
    for row, views in enumerate(layout.views):
        for view in views:
            columns = view.tokens.tolist()
            strange = [column for column in columns if (row, column) not in numbers]
            if strange:
                raise ValueError(f"layout: row {row} has a token in column {strange[0]} that is no image token")
            where = torch.tensor([numbers[row, column] for column in columns])
            x0, y0, x1, y1 = view.box
            across = torch.linspace(x0, x1, view.grid[1] + 1, dtype=torch.float64)
            down = torch.linspace(y0, y1, view.grid[0] + 1, dtype=torch.float64)
            top, left = torch.meshgrid(down[:-1], across[:-1], indexing="ij")
            bottom, right = torch.meshgrid(down[1:], across[1:], indexing="ij")
            boxes[where] = torch.stack([left, top, right, bottom], -1).view(-1, 4)
            images[where] = view.image
    return boxes, images


def _visible(boxes: torch.Tensor, images: torch.Tensor, measured: Measured) -> torch.Tensor:
    """The share of each box that lies within its image, 0 where there is no box."""
    rows = measured.tokens[:, 0].tolist()
    sizes = [
        measured.sizes[row][image] if image >= 0 else (0, 0) for row, image in zip(rows, images.tolist(), strict=True)
    ]
    limits = torch.tensor(sizes, dtype=torch.float64).view(-1, 2).flip(1).repeat(1, 2)
    inside = torch.minimum(boxes.clamp(min=0), limits)
    areas = [(each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]) for each in (inside, boxes)]
    return (areas[0] / areas[1]).nan_to_num()
