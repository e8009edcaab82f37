"""Softcaps, sinks and sliding windows of real model classes: the maps equal eager's at every step."""

from __future__ import annotations

import pytest
import torch

from carve_kernels import capture_attention
from tests.support.windowed_models import SHAPE, model_of

TOKENS = range(4, 12)
LENGTH, STEPS, WINDOW = 24, 10, SHAPE["sliding_window"]
# The prompt and its new tokens for as long as the last one sees a token through the window.
LENGTH_SEEN = TOKENS[-1] + WINDOW


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("gemma2", "eager"), ("gemma3", "sdpa"), ("gemma3", "eager"), ("gpt_oss", "eager"), ("mistral", "sdpa")],
)
def test_maps_equal_eagers_and_are_missing_outside_of_a_window(name: str, implementation: str) -> None:
    model = model_of(name)
    ids = torch.randint(5, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    model.set_attn_implementation(implementation)
    with torch.no_grad(), capture_attention(model, layers="all", tokens=list(TOKENS)) as session:
        model.generate(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.generate(**inputs, return_dict_in_generate=True, output_attentions=True)
    missing, kinds = 0, getattr(model.config, "layer_types", None) or []
    for step, layers in enumerate(output.attentions):
        for layer, attention in enumerate(layers):
            # A sliding cache passes only its last keys.
            columns = torch.tensor(TOKENS) - (LENGTH + step - attention.shape[-1])
            expected = attention[:, :, -1][..., columns.clamp(min=0)].mean(1) * (columns >= 0)
            values, valid = session.maps.values[:, layer, step, 0], session.maps.valid[:, layer, step, 0]
            assert torch.equal(valid, expected.sum(-1) > 0)
            last, is_full = LENGTH + step - 1, "full_attention" in kinds[layer : layer + 1]
            within = torch.tensor(TOKENS) > (-1 if is_full else last - WINDOW)
            assert torch.equal(session.maps.seen[:, layer, step, 0], within.expand(2, -1))
            assert torch.allclose(values, expected, rtol=1e-4, atol=1e-7)
            missing += int((~valid).sum())
    assert missing > 0 and bool(session.maps.valid.any())
    maps = session.maps
    assert maps.last_step(0) == (STEPS - 1 if "full_attention" in kinds else LENGTH_SEEN - LENGTH)
    assert maps.missing is not None and torch.equal(maps.whole(1), maps.seen[1, :, :, 0].all(-1))


def test_rows_that_precede_tokens_or_that_a_mask_hides_miss_them() -> None:
    """Without a window: rows inside the image, means over them, padding in its middle, and masks of four dimensions."""
    model = model_of("gemma3", layer_types=["full_attention"] * 4)
    ids = torch.randint(5, 90, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor(TOKENS)
    with torch.no_grad(), capture_attention(model, layers=[0, 2], tokens=list(TOKENS), rows=[6, 20]) as session:
        model(input_ids=ids)
    assert torch.equal(session.maps.seen[0, 1, 0], torch.stack([tokens <= 6, tokens <= 20]))
    assert session.maps.whole(0).tolist() == [[False], [False]]
    hides = torch.ones_like(ids)
    hides[0, 5:7] = 0
    with torch.no_grad(), capture_attention(model, layers=[0, 2], tokens=list(TOKENS)) as session:
        model.generate(input_ids=ids, attention_mask=hides, max_new_tokens=4, do_sample=False)
    assert torch.equal(session.maps.seen, ((tokens < 5) | (tokens > 6)).expand(1, 2, 4, 1, -1))
    whole = torch.ones_like(ids)
    with torch.no_grad(), capture_attention(model, layers=[0, 2], tokens=list(TOKENS)) as session:
        output = model(input_ids=ids, attention_mask=whole, use_cache=True)
        for length in range(LENGTH + 1, LENGTH + 4):
            mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
            mask[..., 9 : length - LENGTH + 8] = False
            output = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=output.past_key_values)
    assert [int((~seen).sum()) for seen in session.maps.seen[0, 0]] == [0, 0, 1, 2]
    assert session.maps.seen[0, 1, 3, 0].tolist() == [column not in (9, 10) for column in TOKENS]


def test_a_static_cache_and_long_generations_note_the_same_tokens() -> None:
    """Static caches and steps beyond the first buffers (64)."""
    model = model_of("gemma3", layer_types=["sliding_attention", "full_attention"] * 2)
    ids = torch.randint(5, 90, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    seen = []
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with torch.no_grad(), capture_attention(model, layers="all", tokens=list(TOKENS), max_steps=80) as session:
            model.generate(input_ids=ids, max_new_tokens=72, do_sample=False, **options)
        seen.append(session.maps.seen)
    assert torch.equal(*seen) and seen[0].shape[2] == 72
    counts = seen[0][0, :, :, 0].sum(-1)
    assert counts[0].tolist() == [max(0, min(8, LENGTH_SEEN - LENGTH + 1 - step)) for step in range(72)]
    assert counts[model.config.layer_types.index("full_attention")].tolist() == [8] * 72
