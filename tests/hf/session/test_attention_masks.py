"""Masks: hidden keys are hidden in the maps, and masks that do more are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels import capture_attention
from carve_kernels.hf.model import attention_modules
from carve_kernels.hf.session.attention_masks import visibility
from tests.support.conversations import Prompt, additive, model_of, prompt_of
from tests.support.families import family, inputs_of
from tests.support.tiny_models import tiny_llava

pytestmark = pytest.mark.filterwarnings("ignore")
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def prompt() -> Prompt:
    return prompt_of(1, 1, 2, 4, [0], "left")


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def forward(model: Any, prompt: Prompt, mask: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=prompt.ids, pixel_values=prompt.pixels.flatten(0, 1), attention_mask=mask)


@pytest.mark.parametrize("value", [2.0, -2.0, 1e-3, -1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_additive_mask_with_a_bias(prompt: Prompt, implementation: str, value: float) -> None:
    model, mask = model_of("llama", implementation), additive(causal(prompt.ids.shape[1]))
    mask[..., -1, 3] = value
    ran: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with capture_attention(model, layers="all"), pytest.raises(ValueError, match=r"^attention_mask: "):
            forward(model, prompt, mask)
        assert not ran
        # Prepared masks are passed by layer type.
        with capture_attention(model, layers="all"), pytest.raises(ValueError, match=r"^attention_mask: "):
            forward(model, prompt, {"full_attention": mask})  # type: ignore[arg-type]
    finally:
        hook.remove()


@pytest.mark.parametrize("hidden", [LOWEST, float("-inf"), LOWEST / 1.5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_additive_mask_that_hides(prompt: Prompt, implementation: str, hidden: float) -> None:
    model, visible = model_of("llama", implementation), causal(prompt.ids.shape[1])
    visible[..., 4:, 3] = False
    with capture_attention(model, layers="all") as session:
        forward(model, prompt, torch.zeros(visible.shape).masked_fill(~visible, hidden))
    with torch.no_grad():
        output = model_of("llama", "eager")(
            input_ids=prompt.ids,
            pixel_values=prompt.pixels.flatten(0, 1),
            attention_mask=additive(visible),
            output_attentions=True,
        )
    for layer, attention in enumerate(output.attentions):
        expected = attention[0, :, -1, prompt.columns[0]].mean(0)
        assert torch.allclose(session.maps.values[0, layer, 0, 0], expected, rtol=1e-4, atol=1e-7)
        assert expected[1] == 0 and session.maps.values[0, layer, 0, 0, 1] == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_bias_that_the_model_makes_itself(prompt: Prompt, implementation: str) -> None:
    """Only the attention gets it, so the forward has begun; it leaves no map."""
    model = model_of("llama", implementation)
    layer = model.model.language_model.layers[1]

    def bias(_module: Any, args: Any, kwargs: Any) -> Any:
        mask = additive(causal(prompt.ids.shape[1]))
        mask[..., 3] += 1.0
        return args, {**kwargs, "attention_mask": mask}

    hook = layer.register_forward_pre_hook(bias, with_kwargs=True)
    try:
        with capture_attention(model, layers="all") as session, torch.no_grad():
            with pytest.raises(ValueError, match=r"^attention_mask: "):
                model(input_ids=prompt.ids, pixel_values=prompt.pixels.flatten(0, 1))
            with pytest.raises(ValueError, match=r"^attention_mask: "):
                print(session.maps)
    finally:
        hook.remove()


def test_a_bool_mask_that_is_added(prompt: Prompt) -> None:
    mask = causal(prompt.ids.shape[1])
    with (
        capture_attention(model_of("llama", "eager"), layers="all"),
        pytest.raises(ValueError, match=r"^attention_mask"),
    ):
        forward(model_of("llama", "eager"), prompt, mask)
    model = model_of("llama", "sdpa")
    for wrong in (mask.int(), mask[0], mask[..., :-1, :]):
        with capture_attention(model, layers="all"), pytest.raises(ValueError, match=r"^attention_mask: "):
            forward(model, prompt, wrong)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A LLaVA under a flash name, whose function separates the samples of a packed row by their positions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def stub(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **options: Any) -> Any:
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        logits = query @ key.repeat_interleave(group, 1).mT * scaling
        positions = options.get("position_ids")
        allowed = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
        if positions is not None and length > 1:
            sample = (positions[0] == 0).cumsum(0)
            allowed = allowed & (sample[:, None] == sample)
        attention = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        return (attention @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    model = tiny_llava()[0]
    for config in (model.config, model.config.text_config):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stub)  # type: ignore[arg-type]
    assert attention_modules(model)
    return model


def packed() -> dict[str, torch.Tensor]:
    one, other = (inputs_of("llava", 1)["input_ids"] for _ in range(2))
    length = one.shape[1]
    pixels = inputs_of("llava", 1)["pixel_values"]
    return {
        "input_ids": torch.cat([one, other], 1),
        "pixel_values": torch.cat([pixels, pixels]),
        "position_ids": torch.arange(length).repeat(2)[None],
    }


def test_packed_rows(flash: Any) -> None:
    inputs = packed()
    lengths = torch.tensor([0, inputs["input_ids"].shape[1] // 2, inputs["input_ids"].shape[1]], dtype=torch.int32)
    sizes = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 60, "max_length_k": 60}
    plain = {name: value for name, value in inputs.items() if name != "position_ids"}
    with torch.no_grad():
        for given, name in ((inputs, "position_ids"), ({**plain, **sizes}, "cu_seq_lens_q")):
            with capture_attention(flash, layers="all"), pytest.raises(ValueError, match=f"^{name}: "):
                flash(**given)
            ones = torch.ones_like(inputs["input_ids"])
            with capture_attention(flash, layers="all"), pytest.raises(ValueError, match=f"^{name}: "):
                flash(**given, attention_mask=ones)
        # One prompt may begin at a position other than zero.
        with capture_attention(flash, layers="all") as session:
            flash(
                **{**inputs_of("llava", 1), "position_ids": torch.arange(inputs["input_ids"].shape[1] // 2)[None] + 3}
            )
        assert session.maps.steps == (0,)


def test_packed_rows_separated_by_a_mask() -> None:
    model, inputs = family("llava")[0], packed()
    with capture_attention(model, layers="all") as session, torch.no_grad():
        model(**inputs, use_cache=False)
    half = session.maps.values.shape[-1] // 2
    one = inputs_of("llava", 1)
    with capture_attention(model, layers="all") as single, torch.no_grad():
        model(**one)
    assert not session.maps.values[..., :half].any()
    assert torch.allclose(session.maps.values[..., half:], single.maps.values, rtol=1e-3, atol=1e-6)


def test_padding_in_a_prepared_mask() -> None:
    """The last row of a window, or of a given mask, does not see the whole prompt."""
    for kind, mask in (("mistral", None), ("llama", "own")):
        model, long = model_of(kind, "sdpa"), prompt_of(1, 1, 8, 9, [0], "left")
        length = long.ids.shape[1]
        given: dict[str, Any] = {"input_ids": long.ids, "pixel_values": long.pixels.flatten(0, 1)}
        if mask is not None:
            given["attention_mask"] = causal(length)
            given["attention_mask"][..., -1, 5:7] = False
        for rows in ([5, 14], length - 2):
            with capture_attention(model, layers="all", rows=rows) as session, torch.no_grad():
                if mask is None:
                    model.generate(**given, cache_implementation="static", max_new_tokens=1, do_sample=False)
                else:
                    model(**given)
            values = session.maps.values[:, :, 0]
            with torch.no_grad():
                eager = {**given, "attention_mask": additive(given["attention_mask"])} if mask else given
                attentions = model_of(kind, "eager")(**eager, output_attentions=True).attentions
            columns = rows if isinstance(rows, list) else list(range(length - rows, length))
            for layer, attention in enumerate(attentions):
                expected = attention[0][:, columns][..., long.columns[0]].mean(0)
                assert torch.allclose(values[0, layer], expected, rtol=1e-4, atol=1e-7)


def test_a_mask_of_one_row_serves_all(prompt: Prompt) -> None:
    model, length = model_of("llama", "sdpa"), prompt.ids.shape[1]
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    mask[..., 4] = False
    with capture_attention(model, layers="all") as session:
        forward(model, prompt, mask)
    with torch.no_grad():
        output = model_of("llama", "eager")(
            input_ids=prompt.ids, pixel_values=prompt.pixels.flatten(0, 1), attention_mask=additive(mask),
            output_attentions=True,
        )  # fmt: skip
    for layer, attention in enumerate(output.attentions):
        expected = attention[0, :, -1, prompt.columns[0]].mean(0)
        assert torch.allclose(session.maps.values[0, layer, 0, 0], expected, rtol=1e-4, atol=1e-7)


def test_a_block_mask_hides_by_its_blocks() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    rows, keys = torch.tensor([[0, 200, 255]]), 256
    # The second block of rows sees only the second block of keys.
    mask = BlockMask.from_kv_blocks(
        torch.tensor([[[1, 1]]], dtype=torch.int32),
        torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32),
        mask_mod=lambda batch, head, row, key: row >= key,
    )
    visible = visibility("flex_attention", mask, rows, 256, keys, causal=True, window=None).mask
    assert visible is not None
    assert [line.nonzero()[:, 0].tolist() for line in visible[0, 0]] == [[0], [*range(128, 201)], [*range(128, 256)]]


def test_a_window_without_a_mask_under_an_unknown_name() -> None:
    rows = torch.tensor([[9]])
    with pytest.raises(ValueError, match=r"^attention_mask: "):
        visibility("mine", None, rows, 10, 10, causal=True, window=4)
    assert visibility("flash_attention_2", None, rows, 10, 10, causal=True, window=4).window == 4


def test_a_refused_step_leaves_the_earlier_maps(prompt: Prompt) -> None:
    model, length = model_of("llama", "sdpa"), prompt.ids.shape[1]
    with capture_attention(model, layers="all") as session, torch.no_grad():
        cache = model(input_ids=prompt.ids, pixel_values=prompt.pixels.flatten(0, 1)).past_key_values
        before = session.maps.values
        mask = torch.zeros(1, 1, 1, length + 1)
        mask[..., 3] = 2.0
        with pytest.raises(ValueError, match=r"^attention_mask: "):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache, attention_mask=mask)
        assert torch.equal(session.maps.values, before)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert session.maps.steps == (0, 1)
