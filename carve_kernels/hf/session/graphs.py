"""Captures of one layer at a time: those of a prompt with their graphs (`grad=True`), and those of each head."""

from __future__ import annotations

import torch
from torch import nn

from carve_kernels.hf.attention_patch import LayerBatch
from carve_kernels.hf.model import decoder_layers
from carve_kernels.ops.capture import capture
from carve_kernels.types import Capture, HeadsSpec


def capture_layer(batch: LayerBatch, place: int, heads: HeadsSpec, backend: str) -> Capture:
    """The capture of one layer of a batch."""
    return capture(
        batch.query[place], batch.key[place], batch.tokens, scale=batch.scale, mask=batch.mask,
        positions=batch.positions, softcap=batch.softcap or None, window=batch.window,
        sink=batch.sink[place] if batch.sink else None, heads=heads, backend=backend, check=False,
    )  # fmt: skip


def head_mean(captured: Capture) -> Capture:
    """Maps [B, Q, N] of a capture of each head, whose mass and entropy are those of the mean already."""
    return captured._replace(maps=captured.maps.mean(1))


class LayerGraphs:
    """The captures of the layers of one prompt, each a part of the graph of the forward."""

    def __init__(self, heads: HeadsSpec, backend: str) -> None:
        self._heads, self._backend = heads, backend
        self._parts: dict[int, Capture] = {}
        self._given: dict[int, Capture] = {}

    @staticmethod
    def check(layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        """Raise ValueError where a map of this query and key would be no part of a graph."""
        if not torch.is_grad_enabled():
            raise ValueError(
                "grad: expected a forward that records gradients, got one under torch.no_grad or inference_mode"
            )
        if not (query.requires_grad or key.requires_grad):
            raise ValueError(
                f"grad: expected a query or keys that require a gradient, those of layer {layer} do not; set "
                "requires_grad on weights, on the pixel values or on inputs_embeds"
            )

    def capture(self, batch: LayerBatch, out: Capture) -> None:
        """Capture the layers of a batch, also into the step 0 of buffers `out`."""
        for place in range(len(batch.query)):
            index = batch.first + place
            given = capture_layer(batch, place, self._heads, self._backend)
            captured = given if self._heads == "mean" else head_mean(given)
            self._given[index], self._parts[index] = given, captured
            for buffer, values in zip(out, captured, strict=True):
                buffer[0, index] = values.detach()

    def of_layer(self, index: int) -> Capture:
        """As the session's function gets it: of the head mean, or of each head."""
        return self._given[index]

    def joined(self, first: Capture) -> Capture:
        """The maps [L, B, Q, N], mass and entropy of all layers; of those without a graph, what the buffers hold."""
        rows = (self._parts.get(index, Capture(*(part[index] for part in first))) for index in range(len(first.mass)))
        return Capture(*(torch.stack([each.to(torch.float32) for each in part]) for part in zip(*rows, strict=True)))


class EachHead:
    """The captures of each head of the layers of one forward, beside the buffers that hold their means."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._parts: dict[int, Capture] = {}

    def capture(self, batch: LayerBatch, out: Capture, slot: int) -> None:
        """Capture the layers of a batch, and write the means over the heads into step `slot` of buffers `out`."""
        if torch.compiler.is_compiling():
            raise ValueError("heads: expected 'mean' in a compiled forward, got 'each'")
        for place in range(len(batch.query)):
            index = batch.first + place
            self._parts[index] = capture_layer(batch, place, "each", self._backend)
            for buffer, values in zip(out, head_mean(self._parts[index]), strict=True):
                buffer[slot, index] = values

    def of_layer(self, index: int) -> Capture:
        """The capture of a layer; it is not kept."""
        return self._parts.pop(index)


def check_model(model: nn.Module, *, divided: bool) -> None:
    """Raise ValueError for a model whose forward is no graph in this process; `divided`: others have a part of it."""
    if divided:
        raise ValueError("grad: expected a model in one process, got one whose heads are divided among several")
    if any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in decoder_layers(model)):
        raise ValueError(
            "grad: expected a forward that keeps its activations, got gradient checkpointing, which runs the layers "
            "again outside of it; turn it off, or use model.eval()"
        )
