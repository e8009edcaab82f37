"""Sequential fallback: one `generate` per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from carve_kernels.hf import names
from carve_kernels.hf.decoding.generation import SAME_OUTPUT_OPTIONS, greedy_config, preserved_positions
from carve_kernels.hf.decoding.prompt_groups import Branch, Decoded, PromptGroup
from carve_kernels.hf.model import unwrap
from carve_kernels.hf.query_rows import tokenizer_of
from carve_kernels.hf.session import capture_attention


def decode_prompt(
    model: Any, processor: Any, group: PromptGroup, branch: Branch, layers: tuple[int, ...], backend: str
) -> Decoded:
    """One `generate`, in a session if rows are captured."""
    inputs = {**branch.inputs, **(branch.images or group.images).entries}
    length, steps = branch.inputs["input_ids"].shape[1], max(1, branch.max_new_tokens)
    if branch.rows is None:
        ids = greedy_generate(model, inputs, steps, processor)
        return Decoded(tuple(ids.tolist()), None, length + len(ids) - 1)
    with capture_attention(
        model,
        layers=layers,
        rows=branch.rows,
        tokens=group.layout,
        processor=processor,
        max_steps=steps,
        backend=backend,
    ) as session:
        ids = greedy_generate(model, inputs, steps, processor)
        return Decoded(tuple(ids.tolist()), session.maps, length + len(ids) - 1)


def greedy_generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, processor: Any = None) -> torch.Tensor:
    """The new tokens of a greedy `generate` under the model's own config, int64 [T]; leaves no trace."""
    config = greedy_config(model, max_new_tokens)
    # Adapters have a `generate`, DataParallel does not.
    while not hasattr(model, "generate"):
        model = names.inner_module(model)
    inner = unwrap(model)
    # generate takes unset options from the model's own config unless they are passed as arguments.
    options = {name: None for name in SAME_OUTPUT_OPTIONS if getattr(inner.generation_config, name, None) is not None}
    if config.stop_strings and processor is not None:
        options["tokenizer"] = tokenizer_of(processor)
    with torch.no_grad(), preserved_positions(inner):
        output = model.generate(**inputs, generation_config=config, **options)
    new_ids: torch.Tensor = getattr(output, "sequences", output)[0, inputs["input_ids"].shape[1] :]
    return new_ids
