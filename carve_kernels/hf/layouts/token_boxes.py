"""The box of each token, from the coordinates of the pixel values that reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from carve_kernels.hf.layouts.coordinates import Coordinates

# The weight of a value beside an edge of the image, whose coordinate may be biased, and the powers of ten by which it
# falls until the value is at the edge; of less than the last weight, it is too near to know others by it.
_BESIDE, _FALL, _NEAR = 1e-3, 6.0, 1e-3 * 10 ** (-6.0 * 0.6)
_LEVEL = 1.5 / 255
_SWEEPS = 4
# A token whose values spread over less of it than this has its length from a neighbour: a share of the variance.
_SPREAD = 0.3
# The variance of three columns of fourteen.
_FEW = 0.003
# Lengths that differ by less than this share are alike; the number of such shares that is no nearer than any other.
_ALIKE, _FAR = 0.15, 1000.0
# Of a token's side, how far a value may lie from where an even grid has it.
_UNEVEN = 0.15
_UNEVEN_VALUES = (
    "model: the pixels that reach an image token lie in no even rectangle of the image, so that its box cannot be "
    "measured"
)
_NO_PLACE = (
    "model: the image tokens have no place in the image: each is computed from all of it, as by learned queries, or "
    "from parts that make no grid"
)


Patterns = Mapping[tuple[int, int], torch.Tensor]
"""Where in a token each of its values lies, by axis and the number of values, from 0 to 1."""


class OnlyPadded(ValueError):
    """Each token is partly in padding, so that what else it covers is unknown."""


class _Group(NamedTuple):
    """Tokens that values reach alike: numbers, first values and images [T]; places and weights [T, n], 0 in padding."""

    axis: int
    tokens: torch.Tensor
    first: torch.Tensor
    images: torch.Tensor
    places: torch.Tensor
    weights: torch.Tensor


def boxes_of(
    owners: torch.Tensor, origin: Coordinates, count: int, patterns: Patterns = MappingProxyType({})
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box of each of `count` tokens, float64 [N, 4], and the number of its image, int64 [N].

    `owners` has for each pixel value the token that it reaches, or a negative number. A token without a value from the
    image has NaN and -1. A token partly in padding has its whole box, which reaches out of the image.

    Values at the same distances in the pixel tensors have the same pattern in every token, so that values in padding
    and beside an edge, whose coordinates are unknown, are known by those of other tokens.
    """
    boxes, images = torch.full((count, 4), torch.nan, dtype=torch.float64), torch.full((count,), -1)
    for group in _groups(owners, origin, count):
        images[group.tokens] = group.images
        boxes[group.tokens, group.axis], boxes[group.tokens, group.axis + 2] = _ends(group, patterns)
    return boxes, images


def patterns_of(owners: torch.Tensor, origin: Coordinates, count: int) -> Patterns:
    """The patterns of tokens without padding."""
    found = {}
    for group in _groups(owners, origin, count):
        if bool((group.weights > 0).all(1).any()):
            found[group.axis, group.places.shape[1]] = _pattern(group)
    return found


def _groups(owners: torch.Tensor, origin: Coordinates, count: int) -> Iterator[_Group]:
    """For each axis the tokens whose values lie alike in the pixel tensors, and are not all in padding."""
    order = torch.argsort(owners, stable=True)
    order = order[owners[order] >= 0]
    sizes = torch.bincount(owners[order], minlength=count)
    starts = sizes.cumsum(0) - sizes
    for size in sizes.unique().tolist():
        tokens = (sizes == size).nonzero().flatten() if size else torch.empty(0, dtype=torch.int64)
        values = order[starts[tokens][:, None] + torch.arange(size)]
        images = _image_of(origin.image[values]) if size else tokens
        visible = images >= 0
        tokens, values, images = tokens[visible], values[visible], images[visible]
        layouts = _layouts(values) if size else tokens
        for layout in layouts.unique().tolist():
            members = layouts == layout
            for axis in (0, 1):
                first = values[members, 0]
                yield _Group(axis, tokens[members], first, images[members], *_placed(values[members], origin, axis))


def shared_boxes(
    gradient: Callable[[torch.Tensor], torch.Tensor], origin: Coordinates, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where values reach several tokens, as through convolutions behind the patches.

    `gradient` of the tokens' weights [N] is that of their sum, for each pixel value. Tokens that share values divide
    what they see together evenly, in the order of where they see.

    Raises ValueError if tokens see the same, as learned queries do, or do not make a grid.
    """
    spans, sights = torch.full((count, 2), -1), torch.full((count, 4), torch.nan)
    for token in sorted(range(count), key=lambda each: each not in (0, count // 2, count - 1)):
        seen = (gradient(torch.eye(count)[token]) != 0).nonzero().flatten()
        if not len(seen):
            continue
        if bool((origin.image[seen] < 0).any()):
            raise ValueError(f"{_NO_PLACE}; it sees padding, too")
        place = origin.place[:, seen]
        spans[token] = torch.stack([seen[0], seen[-1]])
        sights[token] = torch.cat([place.amin(1), place.amax(1)])
        if len(sights[sights[:, 0].isfinite()].unique(dim=0)) < int(sights[:, 0].isfinite().sum()):
            raise ValueError(_NO_PLACE)
    owners = torch.full((len(origin.image),), -1)
    grids: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for members in _overlapping(spans):
        owners[int(spans[members, 0].min()) : int(spans[members, 1].max()) + 1] = len(grids)
        grids.append((members, _ordinals(sights[members, 0::2]), _ordinals(sights[members, 1::2])))
    whole, numbers = boxes_of(owners, origin, len(grids))
    boxes, images = torch.full((count, 4), torch.nan, dtype=torch.float64), torch.full((count,), -1)
    for (members, columns, rows), box, image in zip(grids, whole, numbers, strict=True):
        shape = torch.stack([columns, rows], 1)
        grid = shape.amax(0) + 1
        if len(shape.unique(dim=0)) != len(members) or int(grid.prod()) != len(members):
            raise ValueError(_NO_PLACE)
        cell = (box[2:] - box[:2]) / grid
        boxes[members] = torch.cat([box[:2] + shape * cell, box[:2] + (shape + 1) * cell], 1)
        images[members] = image
    return boxes, images


def _overlapping(spans: torch.Tensor) -> list[torch.Tensor]:
    """The tokens whose spans of values overlap, directly or by others."""
    groups: list[list[int]] = []
    end = -1
    for token in spans[:, 0].argsort(stable=True).tolist():
        first, last = spans[token].tolist()
        if first < 0:
            continue
        if first > end or not groups:
            groups.append([])
        groups[-1].append(token)
        end = max(end, last)
    return [torch.tensor(sorted(group)) for group in groups]


def _ordinals(sights: torch.Tensor) -> torch.Tensor:
    """The number of each span [T, 2] along an axis, spans that agree having the same."""
    return sights.mean(1).unique(return_inverse=True)[1]


def _layouts(values: torch.Tensor) -> torch.Tensor:
    """A number for each token's values [T, n] that says how they lie in the pixel tensors, int64 [T]."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 40, (values.shape[1],), generator=generator)
    return ((values - values[:, :1]) * factors).sum(1)


def _placed(values: torch.Tensor, origin: Coordinates, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places and weights of tokens' values [T, n] along an axis."""
    places, edges = origin.place[axis][values].double(), origin.edge[axis][values]
    beside = _BESIDE * 10 ** (-_FALL * edges.double().clamp(0, 1.2))
    weights = torch.where(edges.abs() < _LEVEL, 1.0, beside)
    return places.nan_to_num(), weights.where(places.isfinite(), 0.0)


def _image_of(images: torch.Tensor) -> torch.Tensor:
    """The image from which a token's values [T, n] come. Raises ValueError if they come from several."""
    last = images.amax(1)
    if bool(((images >= 0) & (images != last[:, None])).any()):
        raise ValueError("model: expected each image token to show one image, got one that shows several")
    return last


def _ends(group: _Group, patterns: Patterns) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token of a group begins and ends along its axis, float64 [T] each."""
    if bool((group.weights > 0).all(1).any()):
        pattern = _pattern(group)
    else:
        known = patterns.get((group.axis, group.places.shape[1]))
        if known is None:
            raise OnlyPadded(f"{_UNEVEN_VALUES}: all of its tokens are partly in padding")
        pattern = known
    starts, lengths, spread = _line(pattern, group.places, group.weights)
    sure = spread >= _SPREAD / 12
    if bool(sure.any()):
        lengths = torch.where(sure, lengths, _similar(group, lengths, spread))
        total = group.weights.sum(1).clamp(min=1e-12)
        starts = (group.weights * (group.places - lengths[:, None] * pattern)).sum(1) / total
    expected = starts[:, None] + lengths[:, None] * pattern
    off = ((group.places - expected).abs() * (group.weights >= _NEAR)).amax(1)
    if not bool(((lengths > 0) & (off <= _UNEVEN * lengths)).all()):
        raise ValueError(_UNEVEN_VALUES)
    return starts, starts + lengths


def _similar(group: _Group, lengths: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """For each token, the sure length of a token of its image that is most like its own, among those of the nearest.

    A token with few columns of values has no length to compare. Tokens of one view are near in the pixel tensors.
    """
    sure = spread >= _SPREAD / 12
    logs = lengths.clamp(min=1e-9).log()
    unlike = ((logs[:, None] - logs[sure][None]) / _ALIKE).abs().round().clamp(max=_FAR)
    unlike = unlike.where((spread > _FEW)[:, None], 0.0)
    distance = (group.first[:, None] - group.first[sure][None]).abs() / (group.first.max() + 1)
    other = group.images[:, None] != group.images[sure][None]
    return lengths[sure][(unlike + distance + torch.where(other, 2 * _FAR, 0.0)).argmin(1)]


def _pattern(group: _Group) -> torch.Tensor:
    """Where in its token each value lies, from 0 to 1, float64 [n]."""
    size = group.places.shape[1]
    # A token without padding, and among those one far from the edges.
    best = int(((group.weights > 0).all(1) * 2.0 * size + group.weights.sum(1)).argmax())
    pattern = _ranks(group.places[best])
    known = (group.weights[best] >= _NEAR).double()
    for _ in range(_SWEEPS if len(group.tokens) > 1 else 0):
        weights = group.weights * known
        starts, lengths, spread = _line(pattern, group.places, weights)
        use = group.weights * (group.weights >= _NEAR) * ((spread >= _SPREAD / 24) & (lengths > 0))[:, None]
        total = (use * lengths[:, None] ** 2).sum(0)
        better = (use * lengths[:, None] * (group.places - starts[:, None])).sum(0) / total.clamp(min=1e-12)
        pattern = torch.where(total > 0, better, pattern)
        known = torch.maximum(known, (total > 0).double())
    # Evenly spread values lie at these places.
    sorted_pattern, order = pattern.sort()
    even = (torch.arange(size) + 0.5) / size
    starts, lengths, _ = _line(even.double(), sorted_pattern[None], known[order][None])
    return (pattern - starts) / lengths


def _ranks(places: torch.Tensor) -> torch.Tensor:
    """The share of values before each one, equal values at their middle."""
    _, where, counts = (places * 512).round().unique(return_inverse=True, return_counts=True)
    middles = counts.cumsum(0) - counts / 2
    return (middles / len(places))[where].double()


def _line(
    pattern: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lines places = start + length * pattern of each row [T, n], and the variance of the pattern in them."""
    total = weights.sum(1).clamp(min=1e-12)
    middle, mean = (weights * pattern).sum(1) / total, (weights * places).sum(1) / total
    off = pattern - middle[:, None]
    # Nothing is known by values of small weight beside others of full weight.
    variance = (weights * off**2).sum(1) / total
    lengths = (weights * off * (places - mean[:, None])).sum(1) / (total * variance).clamp(min=1e-12)
    return mean - lengths * middle, lengths, variance
