"""Captures of the layers of one forward, several layers in one kernel call, and the maps assembled from them.

Sessions and tree decoding capture through here: a `LayerBatch` collects consecutive layers, `capture` writes them into
buffers [steps, layers, batch, rows] of `new_buffers`, and `assemble` builds the AttentionMaps of a prompt from its
first step (several rows, averaged by `average_rows`) and its later steps (one row each).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import carve_kernels.ops.capture  # noqa: F401  (registers the operator)
from carve_kernels.backends.reference.capture import entropy
from carve_kernels.hf.caches import version_of
from carve_kernels.maps import AttentionMaps
from carve_kernels.types import Capture, VisualLayout

UNCAPTURED = -1.0
"""The mass of a row before it is captured; a captured mass is never negative."""


@dataclass
class LayerBatch:
    """Consecutive layers that differ in query, key and sink only and are captured with one call.

    `first` is the index of the first of them among the captured layers. `alike` and `attention_mask` (the mask that
    the model passed, compared by identity) decide whether the next layer belongs to the batch.
    """

    first: int
    alike: tuple[Any, ...]
    tokens: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    scale: float
    softcap: float
    window: int | None
    attention_mask: Any = None
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    sink: list[torch.Tensor] = field(default_factory=list)
    key_versions: list[int | None] = field(default_factory=list)

    def accepts(self, index: int, alike: tuple[Any, ...], attention_mask: Any = None) -> bool:
        """Whether layer `index` can be captured in the same call."""
        same = self.attention_mask is attention_mask and self.alike == alike
        return same and index == self.first + len(self.query)

    def add(self, query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None) -> None:
        """Add the next layer: the captured rows of its query, and its keys."""
        self.query.append(query)
        self.key.append(key)
        self.key_versions.append(version_of(key))
        if sink is not None:
            self.sink.append(sink)

    def keys_changed(self) -> bool:
        """Whether keys were written to after they were added, as far as tensors count their writes."""
        return [version_of(key) for key in self.key] != self.key_versions

    def capture(self, out: Capture, step: torch.Tensor, backend: str) -> None:
        """Capture all layers into step `step`, an int64 tensor [] on the device, of buffers `out`."""
        torch.ops.carve_kernels.capture_layers(
            self.query, self.key, self.tokens, self.mask, self.positions, self.sink, self.scale, self.softcap,
            self.window or 0, step, self.first, backend, *out,
        )  # fmt: skip


def new_buffers(shape: tuple[int, int, int, int], tokens: int, device: torch.device) -> Capture:
    """Buffers of captures, float32: maps [*shape, tokens], mass and entropy [*shape]."""
    return Capture(
        torch.zeros(*shape, tokens, dtype=torch.float32, device=device),
        torch.full(shape, UNCAPTURED, dtype=torch.float32, device=device),
        torch.zeros(shape, dtype=torch.float32, device=device),
    )


def average_rows(capture: Capture, weight: torch.Tensor, used: torch.Tensor) -> Capture:
    """Weighted means over the rows of maps [L, B, Q, N], by weight [B, R, Q]; UNCAPTURED rows stay so."""
    maps = weight @ capture.maps
    mass = torch.where((capture.mass == UNCAPTURED).any(-1, keepdim=True), UNCAPTURED, maps.sum(-1))
    return Capture(maps, mass, torch.stack([entropy(layer, used) for layer in maps]))


def assemble(
    first: Capture,
    later: Capture | None,
    running: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    layers: tuple[int, ...],
    tokens: torch.Tensor,
    dtype: str,
    layout: VisualLayout | None,
) -> AttentionMaps:
    """The maps of a prompt and its decode steps, copied out of the buffers.

    =======  =======  ================  ====================================================================
    name     dtype    shape             meaning
    =======  =======  ================  ====================================================================
    first    float32  [L, B, Q, N]      maps of the prefill; mass and entropy without N
    later    float32  [T - 1, L, B, N]  maps of the decode steps, one row each; None if there are none
    running  bool     [B, T]            False from the step on whose token would follow the end token
    weight   float32  [B, R, Q]         means over the rows of the prefill; None where R = Q
    tokens   int      [B, N]            columns of the visual tokens, -1 is padding
    =======  =======  ================  ====================================================================

    Raises RuntimeError if a layer was not captured in a step before the last one.
    """
    used, steps = tokens >= 0, running.shape[1]
    if weight is not None:
        first = average_rows(first, weight.to(used.device), used)
    _, batch, rows = first.mass.shape
    maps = new_buffers((batch, len(layers), steps, rows), tokens.shape[1], used.device)
    valid = torch.zeros(maps.mass.shape, dtype=torch.bool, device=used.device)
    for target, part in zip(maps, first, strict=True):
        target[:, :, 0] = part.transpose(0, 1)
    valid[:, :, 0] = True
    if later is not None:
        for target, part in zip(maps, later, strict=True):
            target[:, :, 1:, -1] = part.movedim((0, 1, 2), (2, 1, 0))
        valid[:, :, 1:, -1] = True
    missing = ((maps.mass == UNCAPTURED) & valid).any(-1).any(0)
    # A last step that was interrupted is dropped.
    complete = steps - int(steps > 1 and bool(missing[:, -1].any()))
    if bool(missing[:, :complete].any()):
        numbers = [layer for layer, gone in zip(layers, missing[:, :complete].any(-1), strict=True) if gone]
        raise RuntimeError(
            f"layers: nothing was captured in layers {numbers}; their attention was not called in the captured "
            "forward (was the implementation switched inside the session?)"
        )
    # Where all tokens lie outside of a row's window the mass is exactly 0: there is no map, rather than a black one.
    valid &= running[:, None, :, None] & (maps.mass != 0)
    end = int(running[:, :complete].any(0).nonzero()[-1]) + 1
    for part in maps:
        part[~valid] = 0.0
    values, mass, spread = (part[:, :, :end] for part in maps)
    return AttentionMaps(
        values, mass, spread, valid[:, :, :end], layers, tuple(range(end)), tokens.clone(), dtype, layout
    )
