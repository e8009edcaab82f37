"""FastV: the visual tokens that the last token of a prompt looks at least are dropped behind the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.hf.model import attention_modules, check_decoder, decoder_layers
from carve_kernels.hf.session import capture_attention
from carve_kernels.hf.session.token_drops import check_droppable
from carve_kernels.types import Capture, VisualLayout


class FastV:
    """A context in which each prompt that a model reads loses visual tokens behind the first `k` layers.

    Equals, for one prompt under eager attention, with S columns of which `visual` are of images::

        ranked = attentions[k - 1][0, :, -1, visual].mean(0).topk(round(len(visual) * (1 - r))).indices
        kept = sorted({*range(S)} - {*visual} | {*visual[ranked]})
        # layers from k on process hidden_states[:, kept] with their first positions, and cache the keys of these

    ========  =========================================================================================================
    argument  meaning
    ========  =========================================================================================================
    model     a transformers model with a text decoder, as `capture_attention` takes it
    k         how many layers process all tokens, K in the paper; the last of them, layer k - 1, ranks
    r         the share of the visual tokens that is dropped, R in the paper
    tokens    the visual tokens, as `capture_attention` takes them; None finds them in input_ids
    backend   the backend of the capture
    ========  =========================================================================================================

    Of equal tokens the first are kept. Every prompt of a batch is ranked by itself. New tokens attend to what was kept.
    Sessions of `capture_attention` that are open beside it have the maps of all layers; dropped tokens are `missing`.
    Raises TypeError or ValueError for invalid arguments, and for a model whose layers cannot process a part of the
    tokens (docs/frontends.md lists them); in a forward for a cache with buffers of a fixed size.
    Source: Chen et al., arXiv 2403.06764, section 4; `fastv_k` and `fastv_r` of its program with a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int = 2,
        r: float = 0.5,
        tokens: VisualLayout | torch.Tensor | Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a transformers model, got {checks.describe(model)}")
        check_decoder(model)
        layer = checks.integer("k", k, low=1, high=len(decoder_layers(model)) - 1) - 1
        if layer not in attention_modules(model):
            raise ValueError(f"k: expected layer k - 1 to have softmax attention, layer {layer} has not")
        self._share = checks.number("r", r, low=0, high=1)
        check_droppable(model, layer)
        self.kept: torch.Tensor | None = None
        """The columns of the tokens that were kept of the last prompt, int32 [B, N], -1 for the others."""
        self._session = capture_attention(
            model, layers=[layer], tokens=tokens, max_steps=1, on_layer=self._keep, backend=backend
        )

    def __enter__(self) -> FastV:
        self._session.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._session.__exit__(*error)

    def _keep(self, _layer: int, _step: int, capture: Capture) -> torch.Tensor:
        """The columns of the tokens with the highest attention."""
        tokens = self._session.tokens
        scores = capture.maps[:, 0].masked_fill(tokens < 0, -torch.inf)
        places = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        counts = [round(count * (1 - self._share)) for count in (tokens >= 0).sum(1).tolist()]
        self.kept = tokens.masked_fill(places >= torch.tensor(counts, device=tokens.device)[:, None], -1)
        return self.kept
