"""Tokens that on_layer drops: answers and maps equal those of eager attention that hides their columns, or an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from carve_kernels import capture_attention
from carve_kernels.hf.model import attention_modules, decoder_layers
from tests.support.dropping import Hidden, generate_hiding, hiding_columns
from tests.support.families import STEPS, family, generate, in_eager, inputs_of, state, visual
from tests.support.tiny_models import tiny_llava

# Behind which layers which share of the tokens so far is dropped.
STAGES = {0: 0.4, 2: 0.5}


def least(scores: torch.Tensor, columns: torch.Tensor, share: float) -> list[int]:
    """The columns with the least scores, so many that a share of them is dropped."""
    count = len(columns) - round(len(columns) * (1 - share))
    return sorted(columns[scores.argsort()[:count]].tolist())


class Dropping:
    """An on_layer that drops the tokens with the least attention, behind several layers."""

    def __init__(self, model: Any, stages: dict[int, float], backend: str = "auto", **options: Any) -> None:
        self.stages, self.kept = stages, torch.empty(0)
        self.session = capture_attention(model, layers="all", on_layer=self.on_layer, backend=backend, **options)

    def on_layer(self, layer: int, step: int, capture: Any) -> torch.Tensor | None:
        if step or layer not in self.stages:
            return None
        before = self.session.tokens.clone() if layer == min(self.stages) else self.kept
        for row, columns in enumerate(before):
            places = (columns >= 0).nonzero().flatten()
            gone = least(capture.maps[row, -1, places], columns[places], self.stages[layer])
            before[row, torch.isin(columns, torch.tensor(gone, dtype=columns.dtype))] = -1
        self.kept = before
        return before


def hiding(name: str, inputs: Any, stages: dict[int, float]) -> Hidden:
    model = in_eager(name)
    left = visual(model, inputs)

    def choose(layer: int, rows: torch.Tensor) -> list[list[int]] | None:
        if layer not in stages:
            return None
        gone = [least(rows[b, :, each].mean(0), each, stages[layer]) for b, each in enumerate(left)]
        left[:] = [each[~torch.isin(each, torch.tensor(out))] for each, out in zip(left, gone, strict=True)]
        return gone

    return generate_hiding(model, inputs, choose, STEPS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_and_maps_equal_those_of_hidden_columns(using: Any, name: str, batch: int, implementation: str) -> None:
    """Of Qwen's images each has another number of tokens, so rows of the batch keep different numbers of columns."""
    model, inputs = family(name)[0], inputs_of(name, batch)
    using(model, implementation)
    before = state(model)
    dropping = Dropping(model, STAGES)
    with dropping.session as session:
        captured = generate(model, inputs)
    assert state(model) == before

    expected = hiding(name, inputs, STAGES)
    assert torch.equal(captured.sequences, expected.sequences)
    for logits, other in zip(captured.logits, expected.logits, strict=True):
        assert float((logits - other).abs().max() / other.abs().max()) < 1e-5
    maps = session.maps
    assert bool(maps.valid.all()) and maps.steps == tuple(range(STEPS)) and maps.missing is not None
    for row, columns in enumerate(visual(model, inputs)):
        count = len(columns)
        assert maps.tokens[row, :count].tolist() == columns.tolist()
        for layer in range(4):
            gone = expected.missing_in(layer, row, columns)
            first, second = count - round(count * 0.6), int((dropping.kept[row, :count] < 0).sum())
            assert int(gone.sum()) == (0, first, first, second)[layer] and 0 < first < second < count
            for step in range(STEPS):
                value, there = maps.values[row, layer, step, 0], expected.map_of(layer, step, row, columns)
                assert torch.equal(maps.missing[row, layer, step, 0, :count], gone)
                assert not value[count:].any() and not value[:count][gone].any()
                assert float((value[:count] - there).abs().max() / there.max()) < 1e-5
                share = there[~gone] / there.sum()
                entropy = -(share * share.log()).sum() / torch.tensor(float(len(share))).log()
                assert maps.mass[row, layer, step, 0].item() == pytest.approx(float(there.sum()), rel=1e-5)
                assert maps.entropy[row, layer, step, 0].item() == pytest.approx(float(entropy), rel=1e-5)


def test_caches_hold_the_keys_of_the_kept_columns() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    length, tokens = inputs["input_ids"].shape[1], len(visual(model, inputs)[0])
    cache = DynamicCache(config=model.config.text_config)
    with Dropping(model, STAGES).session:
        generate(model, inputs, past_key_values=cache)
    behind = [0, *(tokens - each for each in (round(tokens * 0.6),) * 2), tokens - round(round(tokens * 0.6) * 0.5)]
    # The last new token is not read.
    assert [layer.keys.shape[2] for layer in cache.layers] == [length + STEPS - 1 - gone for gone in behind]


def test_sessions_beside_it_know_what_was_dropped() -> None:
    """One that is opened before it and one behind it, with other rows and layers in batches, and after it has ended."""
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    dropping = Dropping(model, STAGES)
    with capture_attention(model, layers=[1, 2, 3]) as before, torch.no_grad():
        with dropping.session, capture_attention(model, layers=[3], rows=2) as behind:
            cache = model(**inputs, use_cache=True).past_key_values
            expected = dropping.session.maps
        token, mask = torch.tensor([[7], [8], [9]]), torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], 1)
        model(input_ids=token, attention_mask=mask, past_key_values=cache)
    assert expected.missing is not None and before.maps.missing is not None and behind.maps.missing is not None
    assert before.maps.steps == (0, 1)
    assert torch.allclose(before.maps.values[:, :, 0], expected.values[:, 1:, 0], rtol=1e-5, atol=1e-8)
    assert torch.equal(before.maps.missing[:, :, 1], expected.missing[:, 1:, 0])
    assert torch.allclose(behind.maps.values[:, 0, 0, 1], expected.values[:, 3, 0, 0], rtol=1e-5, atol=1e-8)
    assert torch.equal(behind.maps.missing[:, 0, 0, 1], expected.missing[:, 3, 0, 0])


def test_two_prompts_with_different_tokens_in_turns() -> None:
    model, all_inputs = family("llava")[0], inputs_of("llava", 2)
    alone = []
    for row in range(2):
        inputs = {name: value[row : row + 1] for name, value in all_inputs.items()}
        with Dropping(model, STAGES).session as session, torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            for token in (7, 8):
                step(model, cache, inputs, token)
        alone.append(session.maps)
    talks = []
    with Dropping(model, STAGES).session as session, torch.no_grad():
        for row in range(2):
            inputs = {name: value[row : row + 1] for name, value in all_inputs.items()}
            talks.append((inputs, model(**inputs, use_cache=True).past_key_values))
        for token in (7, 8):
            for row, (inputs, cache) in enumerate(talks):
                step(model, cache, inputs, token)
                values = session.maps.values
                assert torch.equal(values, alone[row].values[:, :, : values.shape[2]])


def step(model: Any, cache: Any, inputs: Any, *tokens: int) -> Any:
    length = cache.get_seq_length() + len(tokens)
    pads = length - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, pads), value=1)
    return model(input_ids=torch.tensor([tokens]), attention_mask=mask, past_key_values=cache)


def test_rows_of_one_length_with_different_numbers_of_tokens() -> None:
    """Without padding sdpa gets no mask: dropped columns that fill up a row are hidden by one."""
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    first = visual(model, inputs)[0]
    pair = {name: torch.cat([value, value]) for name, value in inputs.items()}
    tokens = torch.stack([first, torch.cat([first[:7], torch.full((len(first) - 7,), -1)])])
    keep = torch.stack([first[1::2], torch.nn.functional.pad(first[:6:3], (0, len(first[1::2]) - 2), value=-1)])
    with capture_attention(
        model, layers="all", tokens=tokens, on_layer=lambda layer, at, _: keep if (layer, at) == (1, 0) else None
    ) as session:
        output = generate(model, pair)
    for row in range(2):
        left = tokens[row][tokens[row] >= 0]
        gone = sorted({*left.tolist()} - {*keep[row].tolist()})

        def choose(layer: int, _rows: Any, gone: list[int] = gone) -> Any:
            return [gone] if layer == 1 else None

        expected = generate_hiding(in_eager("llava"), inputs, choose, STEPS)
        assert torch.equal(output.sequences[row], expected.sequences[0])
        for layer in range(4):
            for at in range(STEPS):
                there = expected.map_of(layer, at, 0, left)
                value = session.maps.values[row, layer, at, 0, : len(left)]
                assert float((value - there).abs().max() / there.max()) < 1e-5


def test_outputs_have_the_dropped_tokens_with_the_states_that_they_had() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    columns = visual(model, inputs)
    dropping = Dropping(model, {1: 0.5})
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with dropping.session:
            output = model(**inputs)
        as_left = model.lm_head(model.model.language_model.norm(plain.hidden_states[2]))
    expected = hiding("llava", inputs, {1: 0.5})
    assert output.logits.shape == plain.logits.shape
    assert torch.allclose(output.logits[:, -1], expected.logits[0], rtol=1e-4, atol=1e-5)
    for row, each in enumerate(columns):
        gone = each[~torch.isin(each, dropping.kept[row])]
        assert len(gone) == len(each) // 2
        assert torch.allclose(output.logits[row, gone], as_left[row, gone], rtol=1e-4, atol=1e-5)
        # Of text before the image nothing changes.
        attended = inputs["attention_mask"][row].nonzero().flatten()
        first = attended[attended < each[0]]
        assert len(first) and torch.allclose(output.logits[row, first], plain.logits[row, first], rtol=1e-4, atol=1e-5)


def test_nothing_is_added_to_a_model_whose_tokens_stay() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    hooks: list[int] = []

    def on_layer(_layer: int, _step: int, _capture: Any) -> None:
        hooks.append(sum(len(each._forward_pre_hooks) for each in decoder_layers(model)))

    with capture_attention(model, layers="all", on_layer=on_layer):
        generate(model, inputs)
    assert hooks == [0] * 4 * STEPS
    every = visual(model, inputs)[0]
    plain = generate(model, inputs)
    with capture_attention(model, layers="all", on_layer=lambda *call: None if call[1] else every) as session:
        output = generate(model, inputs)
    assert session.maps.missing is None and torch.equal(output.sequences, plain.sequences)
    # There is no layer behind the last.
    with capture_attention(model, layers=[3], on_layer=lambda *call: None if call[1] else []) as session:
        output = generate(model, inputs)
    assert session.maps.missing is None and torch.equal(output.sequences, plain.sequences)


def test_no_token_is_kept() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with capture_attention(model, layers=[0, 1, 3], on_layer=lambda *call: None if call[1] or call[0] != 1 else []) as (
        session
    ):
        generate(model, inputs)
    # As where all tokens are beyond a window there is no map.
    assert session.maps.valid[0, :, :, 0].all(-1).tolist() == [True, True, False]


def test_gradients_of_maps_behind_dropped_tokens(using: Any) -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    using(model, "sdpa")
    weight = attention_modules(model)[1].q_proj.weight
    columns = visual(model, inputs)[0]
    kept = columns[::2]
    with capture_attention(
        model, layers=[1, 3], grad=True, on_layer=lambda layer, *_: kept if layer == 1 else None
    ) as session:
        model(**inputs)
        maps = session.maps.values[0, 1, 0, 0, ::2]
        [gradient] = torch.autograd.grad((maps * torch.linspace(1, 2, len(kept))).sum(), weight)

    eager = in_eager("llava")
    found: dict[str, Any] = {}

    def choose(layer: int, rows: torch.Tensor) -> list[list[int]] | None:
        found[str(layer)] = rows
        return [columns[1::2].tolist()] if layer == 1 else None

    with hiding_columns(eager, choose, {}, {}):
        eager(**inputs)
    expected = found["3"][0].mean(0)[kept]
    [of_eager] = torch.autograd.grad(
        (expected * torch.linspace(1, 2, len(kept))).sum(), attention_modules(eager)[1].q_proj.weight
    )
    assert torch.allclose(maps, expected, rtol=1e-5)
    assert float((gradient - of_eager).abs().max() / of_eager.abs().max()) < 1e-4


RETURNED = {
    "text": (TypeError, "on_layer: expected None or columns of the prompt", "half"),
    "floats": (TypeError, "on_layer: expected None or columns of the prompt", torch.rand(3)),
    "bools": (TypeError, "on_layer: expected None or columns of the prompt", torch.ones(36, dtype=torch.bool)),
    "a number": (ValueError, r"on_layer: expected None or columns .* got int 5", 5),
    "a ragged list": (TypeError, "on_layer: expected None or columns of the prompt", [[1, 2], [3]]),
    "of another batch": (ValueError, r"on_layer: expected .* int \[n\] or \[1, n\]", torch.zeros(2, 3).long()),
    "too high": (ValueError, "on_layer: expected columns below the prompt's", [7, 4000]),
    "a column of the text": (ValueError, "on_layer: expected columns of visual tokens to be returned", [0, 7]),
    "too low": (ValueError, "on_layer: expected columns below the prompt's", [-2]),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_is_returned_is_checked(kind: str) -> None:
    error, message, returned = RETURNED[kind]
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    before = state(model)
    with (
        capture_attention(model, layers=[1, 2], on_layer=lambda *_: returned) as session,
        pytest.raises(error, match=f"^{message}"),
    ):
        generate(model, inputs)
    assert state(model) == before
    if error is ValueError:
        with pytest.raises(ValueError, match=r"^on_layer: "):
            print(session.maps)


def dropped(model: Any, **options: Any) -> Any:
    """A session that drops all but five tokens behind layer 1."""
    session = capture_attention(
        model, layers=[1, 2], on_layer=lambda layer, at, _: None if at or layer != 1 else [6, 7, 8, 9, 10], **options
    )
    return session


def test_a_column_that_was_dropped_before_is_refused() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    columns = visual(model, inputs)[0]
    wanted = {1: columns[:4], 2: columns[3:6]}
    with (
        capture_attention(model, layers="all", on_layer=lambda layer, *_: wanted.get(layer)),
        pytest.raises(ValueError, match=f"^on_layer: .* got column {int(columns[4])} of row 0, which was dropped"),
    ):
        generate(model, inputs)


def test_rows_that_are_dropped_are_refused() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    columns = visual(model, inputs)[0].tolist()
    with (
        capture_attention(model, layers=[1, 2], rows=columns[:2], on_layer=lambda *_: columns[:1]),
        pytest.raises(ValueError, match=f"^rows: expected rows that all captured layers process.* {columns[1]}, which"),
    ):
        generate(model, inputs)
    with capture_attention(
        model, layers=[0, 1], rows=columns[:2], on_layer=lambda layer, *_: [] if layer == 1 else None
    ):
        generate(model, inputs, steps=1)


def test_the_last_column_stays() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    last = inputs["input_ids"].shape[1] - 1
    with (
        capture_attention(model, layers=[1], tokens=[3, last], on_layer=lambda *_: [3]),
        pytest.raises(ValueError, match=r"^on_layer: expected the last column of each prompt to be kept"),
    ):
        generate(model, inputs)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            "cache: expected one that grows where tokens are dropped, got a StaticCache",
            {"cache_implementation": "static"},
        ),
        ("use_cache: expected True where tokens were dropped", {"use_cache": False}),
        (
            "on_layer: expected None except in the forward that reads a whole prompt .* a chunk",
            {"prefill_chunk_size": 9},
        ),
    ],
)
def test_ways_of_decoding(message: str, options: dict[str, Any]) -> None:
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    with dropped(model), pytest.raises(ValueError, match=f"^{message}"):
        generate(model, inputs, **options)


def test_columns_in_a_step_are_refused() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with (
        capture_attention(model, layers=[1], on_layer=lambda _layer, at, _: [7] if at else None),
        pytest.raises(ValueError, match=r"^on_layer: expected None except .* got columns in a decode step"),
    ):
        generate(model, inputs)


def test_what_a_cache_without_tokens_cannot_do() -> None:
    """Its layers hold different tokens: a crop would cut some of them only, and other text has no mask."""
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    for change in ("crop", "turn"):
        with dropped(model), torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            step(model, cache, inputs, 7)
            if change == "crop":
                cache.crop(-1)
            with pytest.raises(ValueError, match=r"^cache: expected one token after the"):
                step(model, cache, inputs, *((7,) if change == "crop" else (7, 8)))
    with dropped(model), torch.no_grad(), pytest.raises(ValueError, match=r"^tokens: "):
        step(model, copy.deepcopy(model(**inputs, use_cache=True).past_key_values), inputs, 7)
    with dropped(model), torch.no_grad(), pytest.raises(ValueError, match=r"^cache: expected one that grows"):
        model(**inputs, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=99))


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_implementations_whose_masks_are_not_known(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    expected = (
        "^attention_mask: expected a mask of four dimensions" if "flex" in implementation else "^model: expected one"
    )
    if implementation == "flex_attention":
        model.set_attn_implementation({"text_config": implementation})
    else:
        from carve_kernels.hf import names

        monkeypatch.setattr(names, "is_flash", lambda _name: True)
        expected += ".* layer 2 runs FlashAttention"
    with torch.compiler.set_stance("force_eager"), dropped(model), pytest.raises(ValueError, match=expected):
        generate(model, inputs)


def test_layers_with_other_arguments_and_states_that_change_between_layers() -> None:
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    layers = decoder_layers(model)

    def more(_layer: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "per_layer_input": torch.zeros(1, 3)}

    hook = layers[2].register_forward_pre_hook(more, with_kwargs=True)
    with dropped(model) as session:
        with pytest.raises(ValueError, match=r"^model: .* layer 2 of Llava.* gets 'per_layer_input', a torch.float32"):
            generate(model, inputs)
        with pytest.raises(ValueError, match=r"^model: .* gets 'per_layer_input'"):
            print(session.maps)
    hook.remove()

    hook = layers[2].register_forward_hook(lambda _layer, _args, output: output * 1.5)
    with dropped(model), pytest.raises(ValueError, match=r"^model: .* changes them between layers 2 and 3"):
        # The hook of the session comes first here.
        hook.remove()
        generate(model, inputs, steps=1)
        hook = layers[2].register_forward_hook(lambda _layer, _args, output: output * 1.5)
        generate(model, inputs)
    hook.remove()
    with dropped(model):
        generate(model, inputs)


def test_two_sessions_that_drop_behind_one_layer() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with (
        dropped(model),
        dropped(model),
        pytest.raises(ValueError, match=r"^on_layer: expected one session that returns columns for layer 1, got two"),
    ):
        generate(model, inputs)


def test_tokens_before_a_forward() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with capture_attention(model, layers=[1]) as session:
        with pytest.raises(RuntimeError, match=r"^tokens: expected a forward"):
            print(session.tokens)
        generate(model, inputs)
        assert session.tokens.tolist() == [visual(model, inputs)[0].tolist()]
