"""Captures of one forward of many prompts, and the maps of one prompt from the captures of all its forwards."""

from __future__ import annotations

from typing import Any

import torch

import carve_kernels.ops.capture  # noqa: F401  (registers the operator)
from carve_kernels.hf.decoding.token_tree import Segment
from carve_kernels.hf.names import attention_options
from carve_kernels.hf.query_rows import Rows
from carve_kernels.hf.session.recording import averaged
from carve_kernels.maps import AttentionMaps
from carve_kernels.types import Capture, VisualLayout


class TreeCapture:
    """The captured rows of a forward: layers wait for each other, and one call captures all that are alike."""

    def __init__(self, segments: list[Segment], layers: tuple[int, ...], backend: str) -> None:
        self._parts, self._layers, self._backend = segments, layers, backend
        self._rows = [segment.rows + segment.start for segment in segments]
        self._waiting: list[tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = []
        self._like: tuple[float, float, int | None] | None = None
        self._first = 0

    def add(
        self, layer: int, query: torch.Tensor, keys: list[torch.Tensor], window: int | None, options: dict[str, Any]
    ) -> None:
        """A captured layer: query [1, A, n, D] of the whole row, and the keys of each segment, [1, KV, S, D]."""
        index = self._layers.index(layer)
        told = attention_options(query, options)
        like = (told.scale, told.softcap, window)
        if self._like != like:
            self._flush()
            self._like, self._first = like, index
            self._waiting = [([], [], []) for _ in self._parts]
        for number, (own, (queries, held, sinks)) in enumerate(zip(keys, self._waiting, strict=True)):
            queries.append(query[:, :, self._rows[number].to(query.device)])
            held.append(own)
            if told.sink is not None:
                sinks.append(told.sink)
        if index == len(self._layers) - 1:
            self._flush()

    def _flush(self) -> None:
        if self._like is None:
            return
        scale, softcap, window = self._like
        for segment, (queries, keys, sinks) in zip(self._parts, self._waiting, strict=True):
            device = queries[0].device
            tokens = segment.tokens.to(device)
            seen = segment.visible(segment.fresh, window)
            mask = None if seen is None else seen[segment.rows - segment.fresh][None, None].to(device)
            if segment.captured is None:
                segment.captured = _room(len(self._layers), len(segment.rows), tokens.shape[1], device)
            torch.ops.carve_kernels.capture_layers(
                queries, keys, tokens, mask, None, sinks, scale, softcap, 0,
                torch.zeros((), dtype=torch.int64, device=device), self._first, self._backend,
                *(each[None, :, None] for each in segment.captured),
            )  # fmt: skip
        self._like, self._waiting = None, []


def maps_of(
    steps: list[Capture], rows: Rows, tokens: torch.Tensor, layers: tuple[int, ...], dtype: str, layout: VisualLayout
) -> AttentionMaps:
    """The maps of one prompt from the captures of its forwards: maps [L, R, N], one row each behind the first."""
    used = tokens >= 0
    first = Capture(*(segment[:, None] for segment in steps[0]))
    if rows.weight is not None:
        first = averaged(first, rows.weight.to(used.device), used)
    shape = (1, len(layers), len(steps), first.mass.shape[2])
    segments = Capture(
        torch.zeros(*shape, tokens.shape[1], dtype=torch.float32, device=used.device),
        torch.zeros(shape, dtype=torch.float32, device=used.device),
        torch.zeros(shape, dtype=torch.float32, device=used.device),
    )
    for target, segment in zip(segments, first, strict=True):
        target[0, :, 0] = segment[:, 0]
    for step, later in enumerate(steps[1:], start=1):
        for target, segment in zip(segments, later, strict=True):
            target[0, :, step, -1] = segment[:, 0]
    valid = torch.zeros(shape, dtype=torch.bool, device=used.device)
    valid[:, :, 0], valid[:, :, 1:, -1] = True, True
    # All tokens out of a row's window give exactly 0: the map is missing, it is not black.
    valid &= (segments.mass != 0) | ~used.any()
    return AttentionMaps(*segments, valid, layers, tuple(range(len(steps))), tokens, dtype, layout)


def _room(layers: int, rows: int, tokens: int, device: torch.device) -> Capture:
    return Capture(
        torch.empty(layers, rows, tokens, dtype=torch.float32, device=device),
        torch.empty(layers, rows, dtype=torch.float32, device=device),
        torch.empty(layers, rows, dtype=torch.float32, device=device),
    )
