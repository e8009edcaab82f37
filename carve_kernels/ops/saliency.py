"""The public `saliency`: from the queries and keys of a step to the pixels of a heat map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from carve_kernels import checks
from carve_kernels.backends.native.limits import dense_sinks
from carve_kernels.backends.native.region_buffers import RegionBuffers, allocate, most_selected, read
from carve_kernels.backends.native.scratch import Memory
from carve_kernels.numerics import float64_device
from carve_kernels.ops.capture_checks import check_arguments, check_out
from carve_kernels.ops.capture_checks import check_values as check_capture
from carve_kernels.ops.contrast import check_values, contrast_options, is_several, views_of
from carve_kernels.ops.regions import region_options
from carve_kernels.ops.saliency_operator import SaliencyOperator, operands, saliency_operator
from carve_kernels.types import Capture, CaptureOptions, Layers, RegionOptions, Regions, Size, Views, brief


class SaliencyBuffers(NamedTuple):
    """All that a call writes to: captures [1, L, 1, 1, N], pixels of all views, regions, what its kernels share."""

    capture: Capture
    step: torch.Tensor
    pixels: torch.Tensor
    regions: RegionBuffers
    memory: Memory


@dataclass(frozen=True, eq=False)
class Saliency:
    """What `carve_kernels.saliency` returns.

    ========  =======  =======  ================================================================================
    name      dtype    shape    meaning
    ========  =======  =======  ================================================================================
    pixels    float32  [H, W]   the saliency; a list of them for a list of grids
    maps      float32  [L, N]   the captured map of each layer
    mass      float32  [L]      its sum
    entropy   float32  [L]      its entropy, H / ln N
    ========  =======  =======  ================================================================================

    All are on the device of the query, views into memory that a later call with `out=` writes again.
    """

    pixels: Any
    maps: torch.Tensor
    mass: torch.Tensor
    entropy: torch.Tensor
    buffers: SaliencyBuffers = field(repr=False)

    def __repr__(self) -> str:
        return brief(self, pixels=self.pixels, maps=self.maps, mass=self.mass, entropy=self.entropy)

    @property
    def has_regions(self) -> bool:
        return self.buffers.regions.outcome.numel() > 0

    def regions(self) -> Regions:
        """The regions that were requested, in memory of their own. One copy to the host waits for the device; the mask
        stays there.
        """
        if not self.has_regions:
            raise ValueError("regions: expected a saliency that was computed with regions=, got one without")
        found = read(self.buffers.regions)
        return replace(found, mask=found.mask.clone(), boxes=found.boxes.clone(), scores=found.scores.clone())


def saliency(
    query: torch.Tensor | Sequence[torch.Tensor],
    key: torch.Tensor | Sequence[torch.Tensor],
    tokens: torch.Tensor,
    general: torch.Tensor,
    grid: Size | Sequence[Size],
    size: Size | Sequence[Size],
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | Sequence[torch.Tensor] | None = None,
    lam: float | str = "mean",
    layer_weights: Sequence[float] | torch.Tensor | None = None,
    normalize: str = "none",
    regions: Mapping[str, Any] | None = None,
    out: Saliency | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> Saliency:
    """A heat map of one row of queries: capture, contrast with a remembered general map, regions; one operator.

    Equals, to the bit, for `buffers`, a Capture of one step and these layers::

        capture_layers(query, key, tokens, scale=scale, step=torch.tensor(0), out=buffers, ...)
        pixels = contrast(buffers.maps[0, :, 0], general[:, None], grid, size, lam=lam, layer_weights=...)
        found = carve_kernels.regions(pixels, **regions)                 # if there are `regions`

    =============  ==================  =================  ========================================================
    name           dtype               shape              meaning
    =============  ==================  =================  ========================================================
    query          float               L x [1, A, 1, D]   the row of each layer; a tensor is one layer
    key            as query            L x [1, KV, S, D]  the keys of each layer
    tokens         int32, int64        [1, N]             columns of the visual tokens of all views, in order
    general        float32             [L, N]             maps of the general instruction, or [L, 1, N]
    grid, size     int                 (GH, GW), (H, W)   as in `contrast`, several views included
    mask, ...      as in `capture`                        mask [1, 1 or A, 1, S], positions [1, 1], softcap, window
    sink           float               L x [A]            one more logit for each head of each layer
    lam, ...       as in `contrast`                       lam, layer_weights [L], normalize
    regions        dict                                   options of `regions`, such as {"keep": 0.4, "top": 2}
    out            Saliency                               of an earlier call of these shapes, to write into
    check          bool or None                           as in `capture` and `contrast`; None = on the CPU only
    (result)       Saliency                               pixels [H, W], the maps, and the regions when asked for
    =============  ==================  =================  ========================================================

    With `out`, layers of one shape and dtype, a contiguous `general` and weights that are numbers, cpu and cuda run one
    operator that neither allocates nor waits, so that a CUDA graph can record the call and be replayed for every new
    token; `Saliency.regions()` then reads the regions when they are wanted. More keys than in the call that made `out`
    are refused where they need more scratch, and so is a `general` in the memory of `out`: clone its maps.

    Raises TypeError or ValueError for arguments that do not fit: a batch (call it for each row), several rows of
    queries (slice one), general maps of several steps (pick one), regions of several views. Raises BackendUnavailable
    for a backend that cannot serve a stage. Source: CARVE, arXiv 2509.06461, with the general map of one step.
    """
    layers = Layers(_each("query", query), _each("key", key), () if sink is None else _each("sink", sink))
    options = CaptureOptions(scale, mask, positions, softcap, window)
    _check_layers(layers, tokens, options)
    count = len(layers.query)
    general = _check_general(general, layers.query[0], count, tokens.shape[1])
    views = views_of(grid, size, tokens.shape[1])
    contrasted = contrast_options(lam, layer_weights, None, normalize, layers=count, steps=1)
    selection = None if regions is None else _region_options(regions, views)
    if out is not None and not isinstance(out, Saliency):
        raise TypeError(f"out: expected a Saliency of an earlier call, got {checks.describe(out)}")
    checks.flag("check", check)
    is_checked = check or (check is None and general.device.type == "cpu" and not torch.compiler.is_compiling())
    with torch.no_grad():
        operator = saliency_operator(backend, layers, tokens, options, general, views, contrasted, selection)
        buffers = _allocate(layers, tokens, views, selection, operator) if out is None else out.buffers
        if out is not None:
            check_out(layers.query[0], tokens, "mean", buffers.capture, in_steps=True)
            _check_out(out, count, general, views, is_several(grid), selection, operator)
        if is_checked:
            for one_query, one_key, one_options in _each_layer(layers, options):
                check_capture(one_query, one_key, tokens, one_options)
            check_values("general", general)
        operator.run(
            list(layers.query), list(layers.key), tokens, None, mask, positions, list(dense_sinks(layers.sink)), None,
            float(scale), float(softcap or 0.0), int(window or 0), False, buffers.step, 0, *buffers.memory,
            *buffers.capture, *operands(general, views, contrasted, selection, operator), buffers.pixels,
            *buffers.regions,
        )  # fmt: skip
        result = out if out is not None else _result(buffers, views, is_several(grid))
        if is_checked:
            check_values("key: captured maps", result.maps)
    return result


def _each(name: str, value: Any) -> list[torch.Tensor]:
    """One tensor a layer."""
    given = [value] if isinstance(value, torch.Tensor) else list(value) if isinstance(value, (list, tuple)) else None
    if given is None or not all(isinstance(one, torch.Tensor) for one in given):
        raise TypeError(f"{name}: expected a tensor or one for each layer, got {checks.describe(value)}")
    return given


def _each_layer(layers: Layers, options: CaptureOptions) -> Iterator[tuple[torch.Tensor, torch.Tensor, CaptureOptions]]:
    for layer, (query, key) in enumerate(zip(layers.query, layers.key, strict=True)):
        yield query, key, options._replace(sink=layers.sink[layer] if layers.sink else None)


def _check_layers(layers: Layers, tokens: torch.Tensor, options: CaptureOptions) -> None:
    """Refuse what `capture` does, and more than one row of the batch or of queries."""
    query, key, sink = layers
    checks.layers(query, key, sink)
    for one in query:
        if one.dim() != 4 or one.shape[0] != 1 or one.shape[2] != 1:
            raise ValueError(
                "query: expected shape [1, A, 1, D], one row of the batch and one of queries (slice the one you want), "
                f"got {checks.describe(one)}"
            )
    for one_query, one_key, one_options in _each_layer(layers, options):
        check_arguments(one_query, one_key, tokens, one_options)
    checks.number("scale", options.scale)


def _check_general(general: torch.Tensor, query: torch.Tensor, layers: int, tokens: int) -> torch.Tensor:
    """General maps as [L, 1, N]."""
    if isinstance(general, torch.Tensor) and general.dim() == 3 and general.shape[1] != 1:
        raise ValueError(
            f"general: expected the map of one step, [{layers}, 1, {tokens}], got {checks.describe(general)}; pick one"
        )
    flat = general[:, 0] if isinstance(general, torch.Tensor) and general.dim() == 3 else general
    checks.tensor("general", flat, shape=(layers, tokens), dtypes=(torch.float32,))
    checks.device("general", general, query)
    return (general if general.dim() == 3 else general[:, None]).detach()


def _region_options(regions: Mapping[str, Any], views: Views) -> RegionOptions:
    if len(views) > 1:
        raise ValueError(f"regions: expected None beside several views, got {checks.describe(regions)}")
    if not isinstance(regions, Mapping):
        raise TypeError(f"regions: expected a dict of the options of `regions`, got {checks.describe(regions)}")
    known = ("keep", "top", "floor", "min_size", "connectivity", "score")
    for name in regions:
        checks.choice("regions", name, known)
    if "keep" not in regions:
        raise ValueError(f"regions: expected the option 'keep', got {checks.describe(regions)}")
    return region_options(**regions)


def _allocate(
    layers: Layers, tokens: torch.Tensor, views: Views, regions: RegionOptions | None, operator: SaliencyOperator
) -> SaliencyBuffers:
    query, device = layers.query[0], layers.query[0].device
    lead = (1, len(layers.query), 1, 1)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    capture = Capture(new(*lead, tokens.shape[1]), new(*lead), new(*lead))
    if regions is None:
        pixels = new(sum(height * width for _, (height, width) in views))
        integers = torch.int64
        found = RegionBuffers(
            new(0, 0, dtype=torch.bool), new(0, 4, dtype=integers), new(0, dtype=torch.float64), new(0, dtype=integers)
        )
    else:
        pixels = new(*views[0][1])
        # Some devices have no float64.
        stand_in = torch.empty(pixels.shape, device=float64_device(device))
        found = allocate(stand_in, regions, outcome_rows=operator.outcome_rows)
        found = found._replace(mask=new(*views[0][1], dtype=torch.bool))
    step = torch.zeros((), dtype=torch.int64, device=query.device)
    return SaliencyBuffers(capture, step, pixels, found, Memory.new(operator.needs, device))


def _check_out(
    out: Saliency,
    layers: int,
    general: torch.Tensor,
    views: Views,
    several: bool,
    regions: RegionOptions | None,
    operator: SaliencyOperator,
) -> None:
    """Refuse the memory of a call with other layers, pixels or regions, or with fewer keys, and the general maps'."""
    if len(out.maps) != layers:
        raise ValueError(f"out: expected a saliency of {layers} layers, got one of {len(out.maps)}")
    if not torch.compiler.is_compiling() and _shares_memory(general, out.buffers):
        raise ValueError("general: expected memory that out= does not write, got the maps of out; use general.clone()")
    if (regions is not None) != out.has_regions:
        wanted = "with regions" if regions is not None else "without regions"
        raise ValueError(f"out: expected a saliency {wanted}, as this call, got another")
    given = out.pixels if isinstance(out.pixels, list) else [out.pixels]
    if several != isinstance(out.pixels, list) or [image.shape for image in given] != [size for _, size in views]:
        sizes = " and ".join(f"{height} x {width}" for _, (height, width) in views)
        raise ValueError(f"out: expected a saliency of {sizes} pixels, got {' and '.join(map(checks.describe, given))}")
    if regions is not None and len(out.buffers.regions.boxes) < most_selected(views[0][1], regions):
        raise ValueError("out: expected a saliency of as many regions, got one of a call with other options of regions")
    memory = out.buffers.memory
    if memory.scratch.numel() < operator.needs.bytes or memory.tickets.numel() < operator.needs.tickets:
        raise ValueError(
            f"out: expected the saliency of a call with as many keys, whose scratch has {operator.needs.bytes} bytes, "
            f"got one with {memory.scratch.numel()}"
        )


def _shares_memory(general: torch.Tensor, buffers: SaliencyBuffers) -> bool:
    written = (*buffers.capture, buffers.pixels, *buffers.regions, *buffers.memory)
    return any(
        general.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in written if one.numel()
    )


def _result(buffers: SaliencyBuffers, views: Views, several: bool) -> Saliency:
    flat = buffers.pixels.view(-1).split([height * width for _, (height, width) in views])
    images = [values.view(shape) for values, (_, shape) in zip(flat, views, strict=True)]
    maps, mass, entropy = (part[0, :, 0, 0] for part in buffers.capture)
    return Saliency(images if several else images[0], maps, mass, entropy, buffers)
