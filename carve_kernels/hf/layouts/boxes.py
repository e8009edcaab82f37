"""Boxes, in pixels of an image, of what lies between corners of the image that was padded and resized."""

from __future__ import annotations

from carve_kernels.types import Box, Size

Point = tuple[float, float]


def part(size: Size, resized: Size, start: Point, end: Point, padded: Size | None = None) -> Box:
    """The box between two corners, (top, left) and (bottom, right) in pixels of the resized image.

    `padded` is the size of the image with the same padding at opposite sides, if it has any before it is resized.
    """
    (top, bottom), (left, right) = (
        tuple(edge * full / after - (full - before) // 2 for edge in edges)
        for before, full, after, *edges in zip(size, padded or size, resized, start, end, strict=True)
    )
    return left, top, right, bottom


def covered(size: Size, resized: Size, grid: Size, cell: Size) -> Box:
    """The box of a grid at the top left of the resized image, which may end before it, or in padding behind it."""
    return part(size, resized, (0, 0), (grid[0] * cell[0], grid[1] * cell[1]))


def shrunk(box: Box, down: float, across: float) -> Box:
    """The part of a box at its top left that has these shares of its height and width."""
    left, top, right, bottom = box
    return left, top, left + (right - left) * across, top + (bottom - top) * down
