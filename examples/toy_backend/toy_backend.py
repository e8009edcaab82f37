"""A CarveBackend in plain NumPy, for small images: what another engine would offer to frontends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
from PIL import Image

from carve_kernels import Capture, CarveOutcome, Preset, Regions, zoom
from carve_kernels.arrays import as_tensor
from carve_kernels.pipeline import pair

NORMALIZE = ("none", "sum", "max", "minmax")
SCORES = {"sum": numpy.sum, "mean": numpy.mean, "max": numpy.max}


class ToyBackend:
    name = "toy"
    version = 1

    def supports(self, model: Any) -> str | None:
        return "model: the toy backend loads no models, it has maps, contrast, regions and carve only"

    def load(self, model: Any, *, preset: Any = None) -> Any:
        raise ValueError(self.supports(model))

    def maps(
        self, query: Any, key: Any, tokens: Any, *, scale: float, mask: Any = None, positions: Any = None,
        softcap: float | None = None, window: int | None = None, sink: Any = None, heads: str = "mean",
    ) -> Capture:  # fmt: skip
        query, key = _numbers("query", query, 4), _numbers("key", key, 4)
        tokens = as_tensor("tokens", tokens).numpy()
        _expect("key", key.shape[-1] == query.shape[-1], f"heads of {query.shape[-1]}", key.shape)
        _expect("tokens", tokens.ndim == 2 and tokens.dtype.kind == "i", "integers [B, N]", tokens)
        _expect("scale", isinstance(scale, (int, float)), "a number", scale)
        batch, query_heads, _, _ = query.shape
        logits = scale * numpy.einsum("bard,basd->bars", query, key.repeat(query_heads // key.shape[1], 1))
        if softcap is not None:
            logits = softcap * numpy.tanh(logits / softcap)
        if positions is not None:
            behind = as_tensor("positions", positions).numpy()[:, None, :, None] - numpy.arange(key.shape[2])
            mask = (behind >= 0) & (behind < (window or key.shape[2]))
        if mask is not None:
            logits = numpy.where(as_tensor("mask", mask).numpy(), logits, -numpy.inf)
        last = numpy.full(query_heads, -numpy.inf) if sink is None else _numbers("sink", sink, 1)
        last = last[None, :, None, None]
        highest = numpy.maximum(logits.max(-1, keepdims=True), last)
        weights = numpy.exp(logits - highest)
        weights = weights / (weights.sum(-1, keepdims=True) + numpy.exp(last - highest))
        used = tokens >= 0
        each = numpy.stack([weights[b][..., tokens[b]] * used[b] for b in range(batch)])
        maps = each.mean(1)
        mass = maps.sum(-1)
        share = maps / numpy.where(mass == 0, 1, mass)[..., None]
        entropy = -(share * numpy.log(numpy.where(share > 0, share, 1))).sum(-1)
        entropy = entropy / numpy.log(numpy.maximum(used.sum(-1), 2))[:, None]
        found = (each if heads == "each" else maps, mass, entropy)
        return Capture(*(torch.from_numpy(array).float() for array in found))

    def contrast(
        self, task: Any, general: Any, grid: Any, size: Any, *, lam: Any = "mean", layer_weights: Any = None,
        step_weights: Any = None, normalize: str = "none",
    ) -> Any:  # fmt: skip
        task, general = _numbers("task", task, 3), _numbers("general", general, 3)
        layers, steps, tokens = task.shape
        _expect("general", general.shape[::2] == (layers, tokens), f"the shape {task.shape} of task", general.shape)
        _expect("lam", lam == "mean" or lam >= 0, "'mean' or a number from 0 on", lam)
        _expect("normalize", normalize in NORMALIZE, f"one of {NORMALIZE}", normalize)
        several = not isinstance(grid[0], (int, numpy.integer))
        grids, sizes = (list(grid), list(size)) if several else ([grid], [size])
        _expect("grid", sum(rows * columns for rows, columns in grids) == tokens, f"{tokens} tokens", grid)
        _expect("size", min(min(each) for each in sizes) > 0, "pixels", size)
        ratio = task / (general + (general.mean(-1, keepdims=True) if lam == "mean" else lam))
        by_layer = numpy.ones(layers) if layer_weights is None else as_tensor("layer_weights", layer_weights).numpy()
        by_step = range(1, steps + 1) if step_weights is None else as_tensor("step_weights", step_weights).numpy()
        fused = numpy.einsum("ltn,l,t->n", ratio, by_layer, list(by_step))
        low = fused.min() if normalize == "minmax" else 0.0
        scale = {"sum": fused.sum(), "max": fused.max(), "minmax": fused.max() - low}.get(normalize, 1.0)
        fused, done, views = (fused - low) / (scale or 1.0), 0, []
        for (rows, columns), pixels in zip(grids, sizes, strict=True):
            view = torch.from_numpy(fused[done : done + rows * columns].reshape(1, 1, rows, columns)).float()
            view = torch.nn.functional.interpolate(view, tuple(pixels), mode="bilinear", antialias=True)
            views.append(view[0, 0])
            done += rows * columns
        return views if several else views[0]

    def regions(
        self, saliency: Any, *, keep: float, top: int | None = None, floor: int | None = None,
        min_size: int | None = None, connectivity: int | None = None, score: str = "sum",
    ) -> Regions:  # fmt: skip
        values = _numbers("saliency", saliency, 2)
        _expect("keep", 0 < keep <= 1, "a share above 0 and at most 1", keep)
        limits = (top is not None) + (floor is not None)
        _expect("min_size", min_size is None or min_size >= 1, "at least one pixel", min_size)
        _expect("top", limits == 1 or (limits == 0 and min_size), "either top or floor, or min_size", (top, floor))
        _expect("score", score in SCORES, f"one of {tuple(SCORES)}", score)
        if values.max() == values.min():
            return Regions.whole(torch.from_numpy(values), "the saliency is constant")
        found = list(_components(values >= numpy.percentile(values, 100 * (1 - keep)), connectivity == 8))
        found = [region for region in found if len(region[0]) >= (min_size or 1)]
        if not found:
            return Regions.whole(torch.from_numpy(values), "every region is small")
        found.sort(key=lambda region: -SCORES[score](values[region]))
        found = found[: top or (None if floor is None else max(floor, int(len(found) * keep)))]
        mask = numpy.zeros(values.shape, bool)
        for region in found:
            mask[region] = True
        boxes = numpy.array([(x.min(), y.min(), x.max() + 1, y.max() + 1) for y, x in found])
        box = (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
        scores = torch.tensor([SCORES[score](values[region]) for region in found], dtype=torch.float64)
        return Regions(torch.from_numpy(mask), torch.from_numpy(boxes), scores, box)

    def carve(
        self, image: Any, task: Any, general: Any, *, grid: Any, preset: Any = "paper", box: Any = None
    ) -> CarveOutcome:
        settings = Preset.of(preset)
        if not isinstance(image, Image.Image):
            pixels = as_tensor("image", image).numpy()
            _expect("image", pixels.ndim == 3 and pixels.shape[2] == 3, "pixels [H, W, 3]", pixels.shape)
            image = Image.fromarray(pixels.astype("uint8"))
        grids = [grid] if isinstance(grid[0], (int, numpy.integer)) else list(grid)
        width, height = image.size
        given = [(0, 0, width, height)] * len(grids) if box is None else list(box) if len(grids) > 1 else [box]
        _expect("box", numpy.shape(given) == (len(grids), 4), f"{len(grids)} boxes", box)
        boxes = numpy.array(given).round().astype(int)
        inside = (boxes >= 0).all() and (boxes[:, 2:] <= (width, height)).all() and (boxes[:, :2] < boxes[:, 2:]).all()
        _expect("box", inside, f"parts of {width} x {height} pixels", box)
        task, general = (torch.from_numpy(_numbers(*each, 3)) for each in (("task", task), ("general", general)))
        task, general, weights = pair(task, general, settings.steps, step_weights=settings.step_weights)
        sizes = [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes.tolist()]
        views = self.contrast(task, general, grids, sizes, lam=settings.lam, step_weights=weights)
        saliency, weight = torch.zeros(height, width), torch.zeros(height, width)
        for view, (rows, columns), (x0, y0, x1, y1) in zip(views, grids, boxes.tolist(), strict=True):
            density = rows * columns / view.numel()
            saliency[y0:y1, x0:x1] += density * view
            weight[y0:y1, x0:x1] += density
        seen = weight > 0
        saliency /= weight.where(seen, torch.ones(()))
        (x0, y0), (x1, y1) = boxes[:, :2].min(0).tolist(), boxes[:, 2:].max(0).tolist()
        _expect("box", seen[y0:y1, x0:x1].all(), "boxes that cover a rectangle", box)
        found = self.regions(
            saliency[y0:y1, x0:x1], keep=settings.keep, top=settings.top, floor=settings.floor, score=settings.score
        )
        if found.reason is not None:
            return CarveOutcome(saliency, Regions.whole(saliency, found.reason), image, found.reason, seen=seen)
        found = _moved(found, x0, y0, seen)
        refined = zoom(image, found.mask, found.box, fill=settings.fill, size=settings.size, limit=settings.limit)
        return CarveOutcome(saliency, found, refined, seen=seen)


def _moved(found: Regions, x0: int, y0: int, seen: torch.Tensor) -> Regions:
    """Regions of a rectangle of an image, in the pixels of the image."""
    mask = torch.zeros_like(seen)
    mask[y0 : y0 + found.mask.shape[0], x0 : x0 + found.mask.shape[1]] = found.mask
    by = torch.tensor([x0, y0, x0, y0])
    return Regions(mask, found.boxes + by, found.scores, tuple((torch.tensor(found.box) + by).tolist()))


def _numbers(name: str, value: Any, dims: int) -> numpy.ndarray:
    array = as_tensor(name, value, floating=True).detach().cpu().double().numpy()
    _expect(name, array.ndim == dims, f"{dims} dimensions", list(array.shape))
    _expect(name, numpy.isfinite(array).all(), "finite numbers", "others")
    return array


def _expect(name: str, fits: Any, expected: str, got: Any) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _components(kept: numpy.ndarray, corners: bool) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """The rows and columns of the pixels of each connected region."""
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if corners or abs(dy) + abs(dx) == 1]
    left = set(zip(*(axis.tolist() for axis in numpy.nonzero(kept)), strict=True))
    for first in sorted(left):
        if first not in left:
            continue
        left.discard(first)
        region = [first]
        for y, x in region:
            for pixel in ((y + dy, x + dx) for dy, dx in steps):
                if pixel in left:
                    left.discard(pixel)
                    region.append(pixel)
        rows, columns = numpy.array(region).T
        yield rows, columns


backend = ToyBackend()
