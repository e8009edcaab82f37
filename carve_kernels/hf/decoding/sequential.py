"""Looks one after the other, each by a `generate` of its own: the road that is open to every model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from carve_kernels.hf import names
from carve_kernels.hf.decoding.generation import ROADS, greedy, positions_kept, stop_texts
from carve_kernels.hf.decoding.tree_decoder import Outcome
from carve_kernels.hf.model import unwrap
from carve_kernels.hf.query_rows import RowsSpec
from carve_kernels.hf.session.session import capture_attention
from carve_kernels.types import VisualLayout


def look(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    words: int,
    *,
    layers: tuple[int, ...],
    rows: RowsSpec,
    layout: VisualLayout,
    backend: str,
) -> Outcome:
    """One generation with its maps."""
    with capture_attention(
        model, layers=layers, rows=rows, tokens=layout, processor=processor, max_steps=words, backend=backend
    ) as session:
        outcome = answer(model, processor, inputs, words)
        return Outcome(outcome.ids, session.maps, outcome.tokens)


def answer(model: Any, processor: Any, inputs: Mapping[str, Any], words: int) -> Outcome:
    """One generation."""
    ids = generated(model, inputs, words, processor)
    return Outcome(tuple(ids.tolist()), None, inputs["input_ids"].shape[1] + len(ids) - 1)


def generated(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, processor: Any = None) -> torch.Tensor:
    """The new tokens of a greedy `generate` under the model's own generation config, int64 [T]; leaves no trace."""
    config = greedy(model, max_new_tokens)
    # Adapters generate by themselves, DataParallel does not.
    while not hasattr(model, "generate"):
        model = names.wrapped(model)
    inner = unwrap(model)
    # What a given config leaves out, `generate` takes from the model's own, unless it is told by name.
    told = {name: None for name in ROADS if getattr(inner.generation_config, name, None) is not None}
    with torch.no_grad(), positions_kept(inner):
        output = model.generate(**inputs, generation_config=config, **told, **stop_texts(config, processor))
    new: torch.Tensor = getattr(output, "sequences", output)[0, inputs["input_ids"].shape[1] :]
    return new
