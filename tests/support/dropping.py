"""Dropped tokens without dropping them: under eager attention the layers behind hide their columns from every row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from carve_kernels.hf.model import attention_modules

# Called with the number of a layer and its probabilities of the last row, [B, A, S]: the columns to drop of each row.
Choose = Callable[[int, torch.Tensor], list[list[int]] | None]


class Hidden(NamedTuple):
    """What a generation gave: sequences, logits of each step, probabilities [B, A, S] by layer and step."""

    sequences: torch.Tensor
    logits: list[torch.Tensor]
    rows: dict[int, list[torch.Tensor]]
    dropped: dict[int, list[list[int]]]

    def map_of(self, layer: int, step: int, row: int, columns: torch.Tensor) -> torch.Tensor:
        return self.rows[layer][step][row, :, columns].mean(0)

    def missing_in(self, layer: int, row: int, columns: torch.Tensor) -> torch.Tensor:
        """Which columns layers up to `layer` - 1 have dropped."""
        gone = [column for at, rows in self.dropped.items() if at < layer for column in rows[row]]
        return torch.isin(columns, torch.tensor(gone, dtype=columns.dtype))


def generate_hiding(model: Any, inputs: Any, choose: Choose, steps: int, **options: Any) -> Hidden:
    """Generate greedily with a model that attends by eager; `choose` is asked behind each layer of the prompt."""
    rows: dict[int, list[torch.Tensor]] = {}
    dropped: dict[int, list[list[int]]] = {}
    with hiding_columns(model, choose, rows, dropped), torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
    return Hidden(output.sequences, list(output.logits), rows, dropped)


@contextmanager
def hiding_columns(
    model: Any, choose: Choose, rows: dict[int, list[torch.Tensor]], dropped: dict[int, list[list[int]]]
) -> Iterator[None]:
    """While it is open, the layers behind those for which `choose` returns columns hide them from all rows."""
    numbers = {id(module): layer for layer, module in attention_modules(model).items()}
    files: set[Any] = {sys.modules[type(module).__module__] for module in attention_modules(model).values()}
    originals = [(file, file.eager_attention_forward) for file in files]

    def around(original: Any) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
            layer, mask = numbers.get(id(module)), attention_mask
            if layer is None:
                return original(module, query, key, value, attention_mask, **options)
            hidden = [(at, each) for at, each in dropped.items() if at < layer]
            if hidden:
                assert mask is not None or query.shape[2] == 1
                shape = len(query), 1, query.shape[2], key.shape[2]
                mask = query.new_zeros(shape) if mask is None else mask.expand(shape).clone()
                for _, columns in hidden:
                    for row, each in enumerate(columns):
                        mask[row, :, :, each] = torch.finfo(mask.dtype).min
            output, weights = original(module, query, key, value, mask, **options)
            rows.setdefault(layer, []).append(weights[:, :, -1])
            if query.shape[2] > 1 and (chosen := choose(layer, weights[:, :, -1])) is not None:
                dropped[layer] = chosen
            return output, weights

        return attend

    for file, original in originals:
        file.eager_attention_forward = around(original)
    try:
        yield
    finally:
        for file, original in originals:
            file.eager_attention_forward = original
