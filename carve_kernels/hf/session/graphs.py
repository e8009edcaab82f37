"""Sessions with `grad=True`: the captures of a prompt's layers with their graphs, and what has none."""

from __future__ import annotations

import torch
from torch import nn

from carve_kernels.hf.attention_patch import LayerBatch
from carve_kernels.hf.model import decoder_layers
from carve_kernels.ops.capture import capture
from carve_kernels.types import Capture


class LayerGraphs:
    """The captures of the layers of one prompt, each a part of the graph of the forward."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._parts: dict[int, Capture] = {}

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
        for place, (query, key) in enumerate(zip(batch.query, batch.key, strict=True)):
            captured = capture(
                query, key, batch.tokens, scale=batch.scale, mask=batch.mask, positions=batch.positions,
                softcap=batch.softcap or None, window=batch.window, sink=batch.sink[place] if batch.sink else None,
                backend=self._backend, check=False,
            )  # fmt: skip
            index = batch.first + place
            self._parts[index] = captured
            for buffer, values in zip(out, captured, strict=True):
                buffer[0, index] = values.detach()

    def of_layer(self, index: int) -> Capture:
        return self._parts[index]

    def joined(self, first: Capture) -> Capture:
        """The maps [L, B, Q, N], mass and entropy of all layers; of those without a graph, what the buffers hold."""
        rows = (self._parts.get(index, Capture(*(part[index] for part in first))) for index in range(len(first.mass)))
        return Capture(*(torch.stack([each.to(torch.float32) for each in part]) for part in zip(*rows, strict=True)))


def check_model(model: nn.Module, *, divided: bool) -> None:
    """Raise ValueError for a model whose forward is no graph in this process; `divided`: others have a part of it."""
    if divided:
        raise ValueError("grad: expected a model in one process, got one whose heads are divided among several")
    if any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in decoder_layers(model)):
        raise ValueError(
            "grad: expected a forward that keeps its activations, got gradient checkpointing, which runs the layers "
            "again outside of it; turn it off, or use model.eval()"
        )
