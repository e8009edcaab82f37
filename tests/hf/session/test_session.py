"""Sessions on real model classes: maps equal eager's, logits do not change, and the model is restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carve_kernels import capture_attention, layout_of
from carve_kernels.hf.model import attention_modules
from tests.support.families import IMAGES, STEPS, TEXTS, eager, exact, family, generate, inputs_of, state, visual
from tests.support.tiny_models import inputs_for, tiny_llava

FAMILIES = ("llava", "qwen2_5_vl", "qwen2_vl")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_maps_equal_eagers_and_logits_do_not_change(
    using: Any, name: str, batch: int, implementation: str, cache: str
) -> None:
    model, inputs = family(name)[0], inputs_of(name, batch)
    using(model, implementation)
    plain = generate(model, inputs, cache_implementation=cache)
    before = state(model)
    with capture_attention(model, layers="all") as session:
        captured = generate(model, inputs, cache_implementation=cache)
    assert state(model) == before

    assert torch.equal(captured.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(captured.logits, plain.logits, strict=True))
    sequences, expected = eager(name, batch, cache)
    truth = exact(name, batch)
    assert torch.equal(sequences, plain.sequences)

    maps = session.maps
    assert maps.values.shape == (batch, 4, STEPS, 1, expected.shape[-1]) and bool(maps.valid.all())
    assert maps.layers == (0, 1, 2, 3) and maps.steps == tuple(range(STEPS)) and maps.dtype == "float32"
    values = maps.values[:, :, :, 0]
    top = expected.amax(-1, keepdim=True)
    assert float(top.min()) > 1.5 / expected.shape[-1] * float(maps.mass.min()) > 0
    assert bool(((values - expected).abs() <= 1e-5 * top).all())
    nonzero = truth > 0
    error, of_eager = (((maps.double() - truth).abs() / truth)[nonzero].max() for maps in (values, expected))
    assert float(error) <= max(1.5 * float(of_eager), 3e-5)
    for row, columns in enumerate(visual(model, inputs)):
        assert maps.tokens[row, : len(columns)].tolist() == columns.tolist()
        assert bool((maps.tokens[row, len(columns) :] == -1).all()) and not values[row, ..., len(columns) :].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_forward_is_one_step(name: str) -> None:
    model, inputs = family(name)[0], inputs_of(name, 3)
    with torch.no_grad(), capture_attention(model, layers=[-1, 0]) as session:
        model(**inputs)
    assert session.maps.layers == (0, 3) and session.maps.steps == (0,)
    expected = eager(name, 3, "dynamic")[1][:, [0, 3], 0]
    assert torch.allclose(session.maps.values[:, :, 0, 0], expected, rtol=1e-4, atol=1e-7)


def test_flex_attention() -> None:
    model = tiny_llava()[0]
    inputs = inputs_of("llava", 3)
    model.set_attn_implementation({"text_config": "flex_attention"})
    with torch.compiler.set_stance("force_eager"):
        plain = generate(model, inputs)
        with capture_attention(model, layers="all") as session:
            captured = generate(model, inputs)
    assert torch.equal(captured.sequences, plain.sequences)
    expected = eager("llava", 3, "dynamic")[1]
    assert torch.allclose(session.maps.values[:, :, :, 0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("window", [None, 20])
def test_flash_names_by_a_stub(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """The flash names get a 2-D mask or None, and a window; the stub does what FlashAttention would."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    dimensions: list[Any] = []
    maps: dict[int, list[torch.Tensor]] = {}

    def stub(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **options: Any) -> Any:
        dimensions.append(None if attention_mask is None else attention_mask.ndim)
        batch, heads, length, _ = query.shape
        keys = key.shape[2]
        row = torch.arange(length)[:, None] + keys - length
        allowed = (torch.arange(keys) <= row).expand(batch, 1, -1, -1)
        if window is not None:
            allowed = allowed & (torch.arange(keys) > row - window)
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None]
        group = heads // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).mT * scaling
        attention = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        maps.setdefault(module.layer_idx, []).append(attention[:, :, -1])
        return (attention @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    model = tiny_llava()[0]
    for config in (model.config, model.config.text_config):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    for module in attention_modules(model).values():
        monkeypatch.setattr(module, "sliding_window", window, raising=False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stub)  # type: ignore[arg-type]
    if window is not None:
        inner = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
        for module in attention_modules(model).values():
            _pass_window(monkeypatch, module, window)
        assert inner is stub
    for batch in (1, 3):
        maps.clear()
        inputs = inputs_of("llava", batch)
        with capture_attention(model, layers="all") as session:
            generate(model, inputs)
        assert None in dimensions if batch == 1 else 2 in dimensions
        columns = visual(model, inputs)
        for layer, step, b in [(layer, step, b) for layer in range(4) for step in range(STEPS) for b in range(batch)]:
            expected = maps[layer][step][b][:, columns[b]].mean(0)
            if not expected.any():
                assert not session.maps.valid[b, layer, step, 0]
                continue
            assert torch.allclose(session.maps.values[b, layer, step, 0], expected, rtol=1e-4, atol=1e-7)


def _pass_window(monkeypatch: pytest.MonkeyPatch, module: Any, window: int) -> None:
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: forward(*args, sliding_window=window, **kwargs))


def test_a_finished_row_has_no_maps() -> None:
    model = tiny_llava()[0]
    inputs = inputs_of("llava", 3)
    answers = generate(model, inputs).sequences[:, -STEPS:]
    end = int(answers[1, 1])
    assert end not in answers[0].tolist() and end not in answers[2].tolist()
    model.generation_config.eos_token_id = [end]
    with capture_attention(model, layers="all") as session:
        generate(model, inputs)
    maps = session.maps
    # The row of step t is new token t. Token 1 is the end token, so the last row is token 0, at step 1.
    assert maps.valid[:, 0, :, 0].tolist() == [[True] * STEPS, [True, True, False, False, False], [True] * STEPS]
    assert [maps.last_step(b) for b in range(3)] == [STEPS - 1, 1, STEPS - 1]
    assert not maps.values[1, :, 2:].any() and not maps.mass[1, :, 2:].any()
    with capture_attention(model, layers="all") as session:
        generate(model, inputs_of("llava", 1), eos_token_id=int(answers[0, 2]))
    assert session.maps.steps == (0, 1, 2)


def test_without_a_cache_and_with_sampling() -> None:
    model, inputs = family("qwen2_5_vl")[0], inputs_of("qwen2_5_vl", 1)
    with capture_attention(model, layers=[2]) as session:
        generate(model, inputs, use_cache=False)
    expected = eager("qwen2_5_vl", 1, "dynamic")[1][:, 2]
    assert torch.allclose(session.maps.values[:, 0, :, 0], expected, rtol=1e-4, atol=1e-7)
    with capture_attention(model, layers=[2]) as session, torch.no_grad():
        torch.manual_seed(3)
        sampled = model.generate(**inputs, do_sample=True, max_new_tokens=4)
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(**inputs, do_sample=True, max_new_tokens=4))
    assert session.maps.steps == (0, 1, 2, 3)


def test_a_second_turn() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with capture_attention(model, layers="all") as session, torch.no_grad():
        output = model(**inputs, use_cache=True)
        more = torch.tensor([[70, 71, 72]])
        model(input_ids=more, past_key_values=output.past_key_values, use_cache=True)
    ids = torch.cat([inputs["input_ids"], more], 1)
    with capture_attention(model, layers="all") as single, torch.no_grad():
        model(input_ids=ids, pixel_values=inputs["pixel_values"])
    assert session.maps.steps == (0,)
    assert torch.allclose(session.maps.values, single.maps.values, rtol=1e-4, atol=1e-7)


def skip_without_chunks(model: Any, inputs: Any, size: int) -> None:
    """Skip the test if transformers fails, or answers differently, with an image prompt in chunks."""
    plain = generate(model, inputs, steps=1)
    try:
        chunked = generate(model, inputs, steps=1, prefill_chunk_size=size)
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot read images in chunks: {error}")
    if not torch.allclose(plain.logits[0], chunked.logits[0], rtol=1e-2, atol=1e-2):
        pytest.skip("this transformers reads images in chunks wrongly")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_chunk_has_no_image(name: str) -> None:
    model, inputs = family(name)[0], inputs_of(name, 1)
    start = int(visual(model, inputs)[0][0])
    assert start > 3
    skip_without_chunks(model, inputs, start - 1)
    with capture_attention(model, layers="all") as session:
        generate(model, inputs, prefill_chunk_size=start - 1)
    assert torch.allclose(session.maps.values[:, :, :, 0], eager(name, 1, "dynamic")[1], rtol=1e-4, atol=1e-7)


def test_buffers_grow_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carve_kernels.hf.session.recording.STEPS", 1)
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    with capture_attention(model, layers="all", max_steps=10**9) as session:
        generate(model, inputs)
    assert torch.allclose(session.maps.values[:, :, :, 0], eager("llava", 3, "dynamic")[1], rtol=1e-4, atol=1e-7)


def test_max_steps_limits_the_record(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with capture_attention(model, layers="all", max_steps=STEPS):
        generate(model, inputs)
    assert "max_steps" not in caplog.text
    with capture_attention(model, layers="all", max_steps=2) as session:
        generate(model, inputs)
    assert [record.levelname for record in caplog.records if "max_steps" in record.message] == ["WARNING"]
    assert session.maps.steps == (0, 1)
    assert torch.allclose(session.maps.values[:, :, :, 0], eager("llava", 1, "dynamic")[1][:, :, :2], rtol=1e-4)
    with capture_attention(model, layers="all", max_steps=1) as session:
        generate(model, inputs)
    assert session.maps.steps == (0,)


def test_on_layer_is_called_inside_the_forward() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    calls: list[tuple[int, int]] = []
    last: list[Any] = []
    order: list[str] = []
    hook = decoder_hook(model, 2, order)

    def on_layer(layer: int, step: int, capture: Any) -> None:
        calls.append((layer, step))
        order.append(f"map of {layer}")
        last.append(capture.maps.clone())

    try:
        with capture_attention(model, layers=[1, 2], on_layer=on_layer) as session:
            generate(model, inputs, steps=2)
    finally:
        hook.remove()
    assert calls == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert order[:3] == ["map of 1", "layer 2 begins", "map of 2"]
    assert torch.equal(last[1][:, 0], session.maps.values[:, 1, 0, 0])
    assert torch.equal(last[3][:, 0], session.maps.values[:, 1, 1, 0])


def decoder_hook(model: Any, layer: int, order: list[str]) -> Any:
    from carve_kernels.hf.model import decoder_layers

    return decoder_layers(model)[layer].register_forward_pre_hook(
        lambda *_: order.append(f"layer {layer} begins")  # type: ignore[func-returns-value]
    )


def test_layouts_give_views() -> None:
    model, processor = family("qwen2_5_vl")
    inputs = inputs_for(processor, IMAGES, TEXTS)
    layout = layout_of(model, processor, inputs, IMAGES)
    with capture_attention(model, layers=[1, 2], tokens=layout) as session:
        generate(model, inputs)
    for row, views in enumerate(layout.views):
        view = session.maps.view(row, 0)
        assert view.shape == (2, STEPS, 1, *views[0].grid)
        grid = inputs["image_grid_thw"][row]
        assert views[0].grid == (int(grid[1]) // 2, int(grid[2]) // 2)
        expected = eager("qwen2_5_vl", 3, "dynamic")[1][row, 1:3, :, : views[0].tokens.numel()]
        assert torch.allclose(view[:, :, 0].flatten(2), expected, rtol=1e-4, atol=1e-7)
    with capture_attention(model, layers=[1, 2]) as session:
        generate(model, inputs)
    with pytest.raises(ValueError, match="layout: expected maps with a layout"):
        session.maps.view(0, 0)
    assert torch.equal(session.maps.with_layout(layout).view(2, 0), view)
