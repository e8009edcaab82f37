"""The operators that compute a saliency from the tensors of attention: one compiled, one by any backend."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from carve_kernels.backends import resolve
from carve_kernels.backends.native.region_buffers import REASONS, RegionBuffers, numbers
from carve_kernels.backends.native.scratch import NONE, Memory, ScratchNeeds
from carve_kernels.backends.native.weights import on_device
from carve_kernels.ops.layer_operator import operator_of
from carve_kernels.types import NORMALIZE, SCORES, CaptureOptions, ContrastOptions, Layers, RegionOptions, Size, Views

# Backends with one operator for the three stages; each has a module `saliency`.
_COMPILED = ("cpu", "cuda")
_NO_REGIONS = RegionOptions(1.0)


class SaliencyOperator(NamedTuple):
    """How the stages of a call are run: positional, the schema of `carve_kernels::saliency`.

    `is_compiled`: by one operator of C++, which takes weights on its device. `needs` is the scratch that it takes.
    """

    run: Callable[..., None]
    is_compiled: bool
    needs: ScratchNeeds
    outcome_rows: int
    most_blocks: int


def saliency_operator(
    backend: str,
    layers: Layers,
    tokens: torch.Tensor,
    options: CaptureOptions,
    general: torch.Tensor,
    views: Views,
    contrast: ContrastOptions,
    regions: RegionOptions | None,
) -> SaliencyOperator:
    """The operator of a backend, which serves all stages or raises `BackendUnavailable`; `auto` chooses for each stage.

    Stages that the same compiled backend serves are one operator.
    """
    by_name = functools.partial(torch.ops.carve_kernels.saliency_in.default, backend=backend)
    # A compiler sees one operator, which chooses its backend when it runs.
    if torch.compiler.is_compiling():
        return SaliencyOperator(by_name, False, NONE, 0, 1)
    query, key, device = layers.query[0], layers.key[0], layers.query[0].device
    capture = resolve("capture", backend, device, query, key, tokens, options)
    modules = [capture, resolve("contrast", backend, device, general, general, views, contrast)]
    if regions is not None:
        # Only its shape, its dtype and its device are looked at.
        pixels = general.new_empty(1, 1).expand(views[0][1])
        modules.append(resolve("regions", backend, device, pixels, regions))
    names = {module.__name__.split(".")[-2] for module in modules}
    # Layers of several kinds are captured one after the other.
    kinds = {(one.shape, other.shape, one.dtype) for one, other in zip(layers.query, layers.key, strict=True)}
    refused = [capture.supports(*pair) for pair in zip(layers.query[1:], layers.key[1:], strict=True)]
    if len(names) == 1 and names <= set(_COMPILED) and len(kinds) == 1 and not any(refused):
        compiled = _compiled(names.pop())
        needs = compiled.scratch_needs(query, key, tokens, len(layers.query), views[0][1], regions)
        return SaliencyOperator(compiled.operator(), True, needs, compiled.OUTCOME_ROWS, compiled.MOST_BLOCKS)
    return SaliencyOperator(by_name, False, _capture_needs(capture, layers, tokens), 0, 1)


def _compiled(name: str) -> Any:
    return importlib.import_module(f"carve_kernels.backends.{name}.saliency")


def _capture_needs(module: ModuleType, layers: Layers, tokens: torch.Tensor) -> ScratchNeeds:
    """The most that layers of one kind need, if all were of it."""
    needs = operator_of(module, layers.query[0].device).needs
    of_kinds = []
    for query, key in zip(layers.query, layers.key, strict=True):
        batch, heads, rows, size = query.shape
        of_kind = needs(
            layers=len(layers.query), batch=batch, query_heads=heads, key_heads=key.shape[1], rows=rows,
            keys=key.shape[2], size=size, tokens=tokens.shape[1], element_bytes=query.element_size(),
        )  # fmt: skip
        of_kinds.append(of_kind)
    return ScratchNeeds(max(one.bytes for one in of_kinds), max(one.tickets for one in of_kinds))


def operands(
    general: torch.Tensor,
    views: Views,
    contrast: ContrastOptions,
    regions: RegionOptions | None,
    operator: SaliencyOperator,
) -> list[Any]:
    """The arguments of `carve_kernels::saliency` between those of a capture and the outputs."""
    lam, layer_weights, step_weights, normalize = contrast
    if operator.is_compiled:
        general, device = general.contiguous(), general.device
        layer_weights, step_weights = (on_device(tuple(one.tolist()), device) for one in (layer_weights, step_weights))
    shapes = [number for grid, size in views for number in (*grid, *size)]
    is_mean = isinstance(lam, str)
    return [
        general, layer_weights, step_weights, shapes,
        0.0 if is_mean else float(lam), is_mean, NORMALIZE.index(normalize),
        # Without top and floor there are no regions.
        *numbers(regions or _NO_REGIONS), operator.most_blocks,
    ]  # fmt: skip


def _saliency_in(
    query: list[torch.Tensor], key: list[torch.Tensor], tokens: torch.Tensor, span: torch.Tensor | None,
    mask: torch.Tensor | None, positions: torch.Tensor | None, sink: list[torch.Tensor], lse: torch.Tensor | None,
    scale: float, softcap: float, window: int, each: bool, step: torch.Tensor | None, first: int,
    scratch: torch.Tensor, tickets: torch.Tensor, maps: torch.Tensor, mass: torch.Tensor, entropy: torch.Tensor,
    general: torch.Tensor, layer_weights: torch.Tensor, step_weights: torch.Tensor, shapes: list[int], lam: float,
    lam_is_mean: bool, normalize: int, keep: float, top: int, floor: int, connectivity: int, score: int,
    min_size: int, _most_blocks: int, saliency: torch.Tensor, selected: torch.Tensor, boxes: torch.Tensor,
    scores: torch.Tensor, outcome: torch.Tensor, backend: str,
) -> None:  # fmt: skip
    views: list[tuple[Size, Size]] = []
    for start in range(0, len(shapes), 4):
        grid_h, grid_w, height, width = shapes[start : start + 4]
        views.append(((grid_h, grid_w), (height, width)))
    contrasted = ContrastOptions("mean" if lam_is_mean else lam, layer_weights, step_weights, NORMALIZE[normalize])
    chosen = RegionOptions(keep, top or None, floor or None, connectivity, SCORES[score], min_size)
    selection = chosen if top or floor else None
    options = CaptureOptions(scale, mask, positions, softcap or None, window or None)
    layers = Layers(query, key, sink)
    operator = saliency_operator(backend, layers, tokens, options, general, views, contrasted, selection)
    if operator.is_compiled:
        memory = Memory(scratch, tickets)
        if scratch.numel() < operator.needs.bytes or tickets.numel() < operator.needs.tickets:
            memory = Memory.new(operator.needs, query[0].device)
        operator.run(
            query, key, tokens, span, mask, positions, sink, lse, scale, softcap, window, each, step, first, *memory,
            maps, mass, entropy, *operands(general, views, contrasted, selection, operator), saliency, selected, boxes,
            scores, outcome,
        )  # fmt: skip
        return
    torch.ops.carve_kernels.capture_layers_in.default(
        query, key, tokens, span, mask, positions, sink, lse, scale, softcap, window, each, step, first, scratch,
        tickets, maps, mass, entropy, backend,
    )  # fmt: skip
    task = maps[0, :, 0, 0][:, None]
    module = resolve("contrast", backend, task.device, task, general, views, contrasted)
    saliency.view(-1).copy_(module.forward(task, general, views, contrasted))
    if selection is None:
        return
    found = resolve("regions", backend, saliency.device, saliency, selection).forward(saliency, selection)
    count = len(found.boxes)
    buffers = RegionBuffers(selected, boxes, scores, outcome)
    buffers.mask.copy_(found.mask)
    buffers.boxes[:count].copy_(found.boxes)
    buffers.scores[:count].copy_(found.scores)
    buffers.outcome.copy_(torch.tensor([count, REASONS.index(found.reason), *found.box], device="cpu"))


# On every device: the reference serves those that no other backend does.
torch.library.impl("carve_kernels::saliency_in", "default", _saliency_in)
