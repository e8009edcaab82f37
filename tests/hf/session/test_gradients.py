"""Sessions with `grad=True` against autograd of eager attention: losses of attention, inputs, states, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.support.memory import peak_of_tensors
from carve_kernels import AttentionMaps, capture_attention
from carve_kernels.numerics import entropy
from tests.support import tiny_models
from tests.support.families import IMAGES, TEXTS, family, generate, inputs_of, state
from tests.support.windowed_models import model_of
from tests.support.zoo.kinds import build, set_text_attention

Call = Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
LAYERS = [0, 2]


@functools.cache
def built(name: str) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    return build(name)


def windowed(name: str) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    """A text model whose first columns stand for an image."""
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    return model_of(name), {"input_ids": ids}, list(range(4, 12))


def in_session(rows: Any, columns: Any, **options: Any) -> Call:
    def call(model: Any, inputs: dict[str, Any]) -> Any:
        given = {"layers": LAYERS, "rows": rows, "tokens": columns, "grad": True, **options}
        with capture_attention(model, **given) as session:
            model(**inputs, use_cache=False)
        maps = session.maps
        return maps.values[:, :, 0], maps.mass[:, :, 0], maps.entropy[:, :, 0]

    return call


def in_eager(rows: list[int], columns: list[int]) -> Call:
    """The same maps out of `output_attentions` of eager attention."""

    def call(model: Any, inputs: dict[str, Any]) -> Any:
        before = model.config.get_text_config()._attn_implementation
        set_text_attention(model, "eager")
        try:
            attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
        finally:
            set_text_attention(model, before)
        picked = torch.stack([attentions[layer].mean(1)[:, rows][..., columns] for layer in LAYERS], 1)
        used = torch.ones(len(picked), len(columns), dtype=torch.bool)
        return picked, picked.sum(-1), entropy(picked, used)

    return call


def loss(values: torch.Tensor, mass: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """A loss of attention: towards planted tokens, with a little of the mass and of the entropy."""
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(3))
    return -(values * weights).sum() + 0.3 * mass.square().sum() + 0.1 * spread.sum()


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm()) <= 2e-4 * float(expected.norm())


def of_weights(model: Any, call: Call, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(*call(model, inputs)).backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("rows", ["last", "chosen"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma2", "gpt_oss"])
def test_a_loss_of_attention_has_eagers_gradients(name: str, rows: str) -> None:
    model, inputs, columns = built(name) if name in ("llava", "qwen2_5_vl") else windowed(name)
    length = inputs["input_ids"].shape[1]
    numbers = [length - 1] if rows == "last" else [length - 6, length - 4, length - 3, length - 1]
    expected = of_weights(model, in_eager(numbers, columns), inputs)
    found = of_weights(model, in_session("last" if rows == "last" else numbers, columns), inputs)
    changed = [key for key, each in expected.items() if float(each.norm()) > 1e-7]
    assert len(changed) > 10 and any("layers.2" in key for key in changed)
    if name == "gpt_oss":
        assert any("sinks" in key for key in changed)
    for key in changed:
        agree(found[key], expected[key])
    # A layer behind the last captured one has no part in a map.
    assert not any("layers.3." in key and bool(each.any()) for key, each in found.items() if "visual" not in key)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_map_has_gradients_of_pixels_and_hidden_states(name: str) -> None:
    """As Grad-CAM and relevance maps want them: of inputs, and of the states of a layer in between."""
    model, inputs, columns = built(name)
    layers = model.model.language_model.layers
    rows = [inputs["input_ids"].shape[1] - 1]
    found = []
    for call in (in_eager(rows, columns), in_session(rows, columns)):
        states: list[torch.Tensor] = []
        keep = layers[0].register_forward_hook(lambda _module, _args, output, states=states: states.append(output))
        pixels = inputs["pixel_values"].clone().requires_grad_()
        mass = call(model, {**inputs, "pixel_values": pixels})[1]
        keep.remove()
        hidden = states[0] if isinstance(states[0], torch.Tensor) else states[0][0]
        # The mass of layer 2 alone: the second of the captured ones.
        found.append(torch.autograd.grad(mass[:, 1].sum(), [pixels, hidden]))
    for one, other in zip(*found, strict=True):
        assert float(other.norm()) > 0
        agree(other, one)


def test_prompts_of_a_batch_and_means_over_rows() -> None:
    """Padding, and the mean over the rows of each question: each prompt has the gradient that it has alone."""
    model, processor = family("llava")
    options = {"layers": LAYERS, "rows": "question", "processor": processor, "grad": True}

    def gradient(inputs: Any) -> torch.Tensor:
        pixels = inputs["pixel_values"].clone().requires_grad_()
        with capture_attention(model, **options) as session:
            model(**{**inputs, "pixel_values": pixels}, use_cache=False)
        maps = session.maps
        return torch.autograd.grad((maps.values.square().sum() + maps.entropy.sum()), pixels)[0]

    together = gradient(inputs_of("llava", 3))
    for row in range(3):
        alone = tiny_models.inputs_for(processor, IMAGES[row : row + 1], TEXTS[row : row + 1])
        agree(together[row], gradient(alone)[0])


def test_a_loss_of_attention_trains() -> None:
    model, inputs, _ = build("llava", seed=4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(4):
        with capture_attention(model, layers=LAYERS, grad=True) as session:
            model(**inputs)
        optimiser.zero_grad()
        value = -session.maps.values[..., 5].sum()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_on_layer_gets_maps_in_the_graph() -> None:
    model, inputs, columns = built("llava")
    seen: list[tuple[int, torch.Tensor]] = []
    with capture_attention(
        model,
        layers=LAYERS,
        tokens=columns,
        grad=True,
        on_layer=lambda layer, _step, each: seen.append((layer, each.maps)),
    ) as session:
        model(**inputs)
    assert [layer for layer, _ in seen] == LAYERS
    for place, (_, maps) in enumerate(seen):
        assert maps.requires_grad and torch.equal(maps[:, 0], session.maps.values[:, place, 0, 0])


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_maps_are_those_of_a_session_without_gradients(backend: str, tmp_path: Any) -> None:
    model, inputs, columns = built("qwen2_5_vl")
    before, found = state(model), []
    for grad in (False, True):
        with capture_attention(model, layers="all", rows=3, tokens=columns, backend=backend, grad=grad) as session:
            model(**inputs)
        found.append(session.maps)
    assert state(model) == before
    plain, graph = found
    for name in ("values", "mass", "entropy"):
        assert torch.equal(getattr(plain, name), getattr(graph, name))
        assert getattr(graph, name).requires_grad and not getattr(plain, name).requires_grad
    assert torch.equal(plain.valid, graph.valid) and repr(plain) == repr(graph)
    graph.save(tmp_path / "maps.safetensors")
    assert torch.equal(AttentionMaps.load(tmp_path / "maps.safetensors").values, plain.values)


REFUSED: dict[str, tuple[str, Callable[[Any, dict[str, Any]], Any]]] = {
    "generate": ("got generate, which records no gradients", lambda model, inputs: generate(model, inputs, steps=2)),
    "no_grad": ("got one under torch.no_grad", lambda model, inputs: torch.no_grad()(model)(**inputs)),
    "inference mode": ("got one under torch.no_grad", lambda model, inputs: torch.inference_mode()(model)(**inputs)),
    "a decode step": ("expected whole prompts, got a decode step", lambda model, inputs: _two_steps(model, inputs)),
}


def _two_steps(model: Any, inputs: dict[str, Any]) -> None:
    cache = model(**inputs).past_key_values
    model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_graph_is_refused(name: str) -> None:
    message, call = REFUSED[name]
    model, inputs, _ = built("llava")
    before = state(model)
    with pytest.raises(ValueError, match=f"^grad: .*{message}"), capture_attention(model, layers=[1], grad=True):
        call(model, dict(inputs))
    assert state(model) == before


def test_a_frozen_model_is_refused() -> None:
    model, inputs, columns = build("llava")
    model.requires_grad_(False)
    with (
        pytest.raises(ValueError, match=r"^grad: expected a query or keys that require a gradient, those of layer 1"),
        capture_attention(model, layers=[1], grad=True) as session,
    ):
        model(**inputs)
    with pytest.raises(ValueError, match=r"^grad: "):
        _ = session.maps
    pixels = inputs["pixel_values"].clone().requires_grad_()
    with capture_attention(model, layers=[1], tokens=columns, grad=True) as session:
        model(**{**inputs, "pixel_values": pixels})
    assert bool(torch.autograd.grad(session.maps.mass.sum(), pixels)[0].any())


def test_gradient_checkpointing_is_refused_in_training_mode() -> None:
    model, inputs, _ = build("llava")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with capture_attention(model, layers=[1], grad=True) as session:
        model(**inputs)
        assert session.maps.values.requires_grad
        model.train()
        with pytest.raises(ValueError, match=r"^grad: expected a forward that keeps its activations"):
            model(**inputs)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "grad: expected True or False, got int 1", {"grad": 1}),
        (ValueError, "fused: expected False beside grad=True", {"grad": True, "fused": True}),
    ],
)
def test_arguments_are_refused_at_once(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        capture_attention(built("llava")[0], layers=[1], **options)


def peak(length: int, rows: int | None) -> int:
    """The peak of a forward and a backward with four captured rows in the loss, or without (None)."""
    model = tiny_models.tiny_llama()
    ids = torch.randint(5, 300, (1, length))
    columns = range(length // 10, length * 9 // 10)

    def run() -> None:
        if rows is None:
            model(ids, logits_to_keep=1, use_cache=False).logits.sum().backward()
            return
        with capture_attention(model, layers="all", rows=rows, tokens=columns, grad=True) as session:
            output = model(ids, logits_to_keep=1, use_cache=False)
        (output.logits.sum() + session.maps.values.square().sum()).backward()

    run()
    return peak_of_tensors(run)


@pytest.mark.parametrize("length", [2048, pytest.param(8192, marks=pytest.mark.slow)])
def test_the_memory_of_a_backward_grows_with_the_keys(length: int) -> None:
    """The keys' gradients, and some rows by heads by S; S x S of one head alone would be more."""
    found = peak(length, 4) - peak(length, None)
    assert found <= 4 * 4 * 4 * length * 4 + 2**18 < length**2 * 4
