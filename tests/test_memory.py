"""Peak memory of a session over a plain forward: rows x heads x S, where eager stores S x S for every layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.support.memory import allocations, peak_of_tensors
from carve_kernels import capture_attention
from tests.support import tiny_models

# Scores, their exponentials, and the picked probabilities of one layer at a time.
ARRAYS = 4
# Blocks of keys that are converted to float32, buffers of the maps, rows of the query.
CONSTANT = 2**19


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.tiny_llama()


def forward(model: Any, length: int, rows: int | None, **options: Any) -> Callable[[], None]:
    ids = torch.randint(5, 300, (1, length))
    tokens = range(length // 10, length * 9 // 10)

    def run() -> None:
        session = nullcontext() if rows is None else capture_attention(model, layers="all", rows=rows, tokens=tokens)
        with torch.no_grad(), session:
            model(ids, logits_to_keep=1, **options)

    return run


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("length", [2048, pytest.param(8192, marks=pytest.mark.slow)])
def test_a_session_takes_scratch_of_rows_by_heads_by_keys(model: Any, length: int, rows: int, use_cache: bool) -> None:
    plain, session = (
        peak_of_tensors(forward(model, length, captured, use_cache=use_cache)) for captured in (None, rows)
    )
    bound = rows * model.config.num_attention_heads * length * 4
    assert session - plain <= ARRAYS * bound + CONSTANT


def test_the_measurement_includes_what_eager_stores() -> None:
    model, length = tiny_models.tiny_llama(), 1024
    plain = peak_of_tensors(forward(model, length, None))
    model.set_attn_implementation("eager")
    eager = peak_of_tensors(forward(model, length, None, output_attentions=True))
    config = model.config
    assert eager - plain >= config.num_hidden_layers * config.num_attention_heads * length**2 * 4


@pytest.mark.parametrize("padded", [False, True])
def test_a_capture_allocates_nothing_after_the_first_step(model: Any, padded: bool) -> None:
    ids = torch.randint(5, 300, (2, 64))
    mask = torch.ones_like(ids)
    mask[1, :9] = 1 - int(padded)

    def of_each_step(session: Any) -> list[int]:
        with torch.no_grad(), session:
            cache = model(ids, attention_mask=mask, logits_to_keep=1).past_key_values
            full_mask, found = mask, []
            for _ in range(4):
                full_mask = torch.cat([full_mask, full_mask.new_ones(2, 1)], 1)
                step = {"attention_mask": full_mask, "past_key_values": cache, "logits_to_keep": 1}
                found.append(allocations(lambda step=step: model(ids[:, :1], **step)))
        return found

    plain = of_each_step(nullcontext())
    captured = of_each_step(capture_attention(model, layers="all", tokens=range(7, 50)))
    assert captured[0] > plain[0]
    assert captured[1:] == plain[1:]
