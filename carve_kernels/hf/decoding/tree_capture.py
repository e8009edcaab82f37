"""Captures of one forward of many prompts, and the maps of one prompt from the captures of all its forwards."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.hf.decoding.token_tree import Part
from carve_kernels.hf.layer_batch import LayerBatch, assemble, new_buffers
from carve_kernels.hf.names import AttentionOptions, attention_options
from carve_kernels.hf.query_rows import Rows
from carve_kernels.maps import AttentionMaps
from carve_kernels.types import Capture, VisualLayout


class Taking:
    """Captures the rows of each segment of a packed forward; layers that are alike are captured with one call."""

    def __init__(self, parts: list[Part], layers: tuple[int, ...], backend: str) -> None:
        self._parts, self._layers, self._backend = parts, layers, backend
        self._rows = [part.rows + part.start for part in parts]
        self._buffers: list[Capture] = []
        self._batches: list[LayerBatch] = []

    def take(
        self, layer: int, query: torch.Tensor, keys: list[torch.Tensor], window: int | None, options: dict[str, Any]
    ) -> None:
        """Capture a layer: query [1, A, n, D] of the packed row, and the keys of each segment, [1, KV, S, D]."""
        index, given = self._layers.index(layer), attention_options(query, options)
        alike = (given.scale, given.softcap, window)
        if not self._batches or not self._batches[0].accepts(index, alike):
            self._flush()
            self._batches = [self._batch(part, index, alike, given, query.device) for part in self._parts]
        for batch, rows, key in zip(self._batches, self._rows, keys, strict=True):
            batch.add(query[:, :, rows.to(query.device)], key, given.sink)
        if index == len(self._layers) - 1:
            self._flush()

    def _batch(
        self, part: Part, index: int, alike: tuple[Any, ...], given: AttentionOptions, device: torch.device
    ) -> LayerBatch:
        seen = part.sees(part.fresh, alike[2])
        mask = None if seen is None else seen[part.rows - part.fresh][None, None].to(device)
        return LayerBatch(index, alike, part.tokens.to(device), mask, None, given.scale, given.softcap, None)

    def _flush(self) -> None:
        if not self._batches:
            return
        device = self._batches[0].tokens.device
        if not self._buffers:
            for part in self._parts:
                buffers = new_buffers((1, len(self._layers), 1, len(part.rows)), part.tokens.shape[1], device)
                self._buffers.append(buffers)
                part.taken = Capture(*(each[0, :, 0] for each in buffers))
        step = torch.zeros((), dtype=torch.int64, device=device)
        for batch, buffers in zip(self._batches, self._buffers, strict=True):
            batch.capture(buffers, step, self._backend)
        self._batches = []


def maps_of(
    steps: list[Capture], rows: Rows, tokens: torch.Tensor, layers: tuple[int, ...], dtype: str, layout: VisualLayout
) -> AttentionMaps:
    """The maps of one prompt from the captures of its forwards: maps [L, R, N], one row each after the first."""
    later = Capture(*(torch.stack(parts) for parts in zip(*steps[1:], strict=True))) if len(steps) > 1 else None
    return assemble(
        Capture(*(part[:, None] for part in steps[0])),
        later,
        torch.ones(1, len(steps), dtype=torch.bool, device=tokens.device),
        rows.weight,
        layers=layers,
        tokens=tokens,
        dtype=dtype,
        layout=layout,
    )
