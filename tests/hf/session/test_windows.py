"""Softcaps, sinks and sliding windows of real model classes: the maps equal eager's at every step."""

from __future__ import annotations

import pytest
import torch

from carve_kernels import capture_attention
from tests.support.windowed_models import model_of

TOKENS = range(4, 12)
LENGTH, STEPS = 24, 10


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
    missing = 0
    for step, layers in enumerate(output.attentions):
        for layer, attention in enumerate(layers):
            # A sliding cache passes only its last keys.
            columns = torch.tensor(TOKENS) - (LENGTH + step - attention.shape[-1])
            expected = attention[:, :, -1][..., columns.clamp(min=0)].mean(1) * (columns >= 0)
            values, valid = session.maps.values[:, layer, step, 0], session.maps.valid[:, layer, step, 0]
            assert torch.equal(valid, expected.sum(-1) > 0)
            assert torch.allclose(values, expected, rtol=1e-4, atol=1e-7)
            missing += int((~valid).sum())
    assert missing > 0 and bool(session.maps.valid.any())
