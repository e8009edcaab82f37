"""Checks of the parts of transformers that the package relies on, on two tiny models, in under two seconds.

`doctor` runs them, and so does the first session or engine under an untested version: a release that renames or
reorders something raises an error that names the versions, instead of a wrong map.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from carve_kernels.checks import UpstreamChanged
from carve_kernels.hf import caches, names, processors
from carve_kernels.hf.attention_patch import RECORDERS, patched
from carve_kernels.hf.model import attention_modules

_LAYERS, _HEADS, _KEY_HEADS, _HEAD_SIZE, _VOCABULARY = 2, 4, 2, 8, 64
_PROMPT, _IMAGE, _VIDEO, _START, _END = 5, 60, 61, 62, 63
_GRID, _PATCH_VALUES = (4, 6), 3 * 2 * 14 * 14
_TEXT: dict[str, Any] = {
    "hidden_size": _HEADS * _HEAD_SIZE, "intermediate_size": 32, "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS, "num_key_value_heads": _KEY_HEADS, "vocab_size": _VOCABULARY,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# The largest difference between a float32 map and eager's, relative to the maximum.
_TOLERANCE = 1e-4
# The first version whose forwards take image features.
_TAKES_FEATURES = Version("5.20")
_LOG = logging.getLogger("carve_kernels")
_LOCK = threading.Lock()
# The thread that runs the checks, whose own sessions need no checks.
_running_in: int | None = None
_passed = False
_logged = False


def ensure() -> None:
    """Run the checks, until they pass, under an untested transformers. Raises UpstreamChanged if one fails."""
    global _passed, _logged
    if _passed or names.is_tested() or _running_in == threading.get_ident():
        return
    broken = [f"{name} ({reason})" for name, reason in results().items() if reason is not None]
    _passed = not broken
    if not _logged:
        _logged = True
        _LOG.warning(
            "transformers %s was not tested (%s to %s were): %s",
            *(names.version(), *names.TESTED),
            f"{len(broken)} of {len(CHECKS)} checks fail" if broken else f"all {len(CHECKS)} checks pass",
        )
    if broken:
        raise names.changed("; ".join(broken))


def results() -> dict[str, str | None]:
    """The name of each check, and why it failed, or None.

    The checks run in a new thread, in which no mode of the caller (autocast, inference mode, fake tensors, a default
    device) is active.
    """
    failures: dict[str, str | None] = {}

    def run() -> None:
        global _running_in
        _running_in, dtype = threading.get_ident(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                models = Models()
                failures.update({name: _failure(check, models) for name, check in CHECKS.items()})
        finally:
            torch.set_default_dtype(dtype)
            _running_in = None

    with _LOCK:
        thread = threading.Thread(target=run, name="carve_kernels contract")
        thread.start()
        thread.join()
    return failures


class Models:
    """A text model and a Qwen2.5-VL, of two layers each, and a prompt for each."""

    @cached_property
    def text(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        return _build(LlamaForCausalLM, LlamaConfig(**_TEXT))

    @cached_property
    def vision(self) -> Any:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        tower = {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": _HEADS * _HEAD_SIZE, "fullatt_block_indexes": [0],
        }  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope}, vision_config=tower, image_token_id=_IMAGE,
            video_token_id=_VIDEO, vision_start_token_id=_START, vision_end_token_id=_END,
        )  # fmt: skip
        return _build(Qwen2_5_VLForConditionalGeneration, config)

    @cached_property
    def prompt(self) -> dict[str, torch.Tensor]:
        ids = torch.arange(1, _PROMPT + 1)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @cached_property
    def question(self) -> dict[str, torch.Tensor]:
        rows, columns = _GRID
        visual = rows * columns // 4
        ids = torch.tensor([[1, 2, _START, *[_IMAGE] * visual, _END, 3, 4, 5]])
        generator = torch.Generator().manual_seed(1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == _IMAGE).int(),
            "pixel_values": torch.randn(rows * columns, _PATCH_VALUES, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }


def cache_on_the_second_step(models: Models) -> None:
    """generate passes its cache to the second forward under a known name, and the cache counts the prompt."""
    from transformers import StaticCache

    tokens: list[tuple[int, int]] = []
    signature = names.signature_of(models.text)

    def count_tokens(_module: nn.Module, args: Any, kwargs: Any) -> None:
        given = names.arguments(signature, args, kwargs)
        tokens.append((given["input_ids"].shape[1], int(caches.cached_tokens(caches.cache_of(given)))))

    hook = models.text.register_forward_pre_hook(count_tokens, with_kwargs=True)
    try:
        _generate(models.text, models.prompt)
    finally:
        hook.remove()
    _expect("new and cached tokens of each forward", tokens, [(_PROMPT, 0), (1, _PROMPT)])
    cache, attention = caches.cache_in(models.text(**models.prompt, use_cache=True)), attention_modules(models.text)[1]
    keys = caches.key_state(cache, attention)
    cache.crop(-1)
    cropped = caches.key_state(cache, attention)
    if keys is None or cropped is None:
        raise ValueError("a layer of the cache has no keys")
    _expect("keys of a layer, before and after a crop", (keys.keys, cropped.keys), (_PROMPT, _PROMPT - 1))
    _expect("the same storage of a cropped cache", cropped.same_storage(keys), True)
    static = StaticCache(config=models.text.config, max_cache_len=_PROMPT)
    _expect("keys of a static cache", caches.reaches(static, [attention]), [(caches.Reach(None, _PROMPT),)])


def attention_lookup(models: Models) -> None:
    """The attention of a layer is called once in a forward, from the registry, with [B, heads, S, D]."""
    _check_lookup(models.text, "sdpa", models.prompt)


def eager_lookup(models: Models) -> None:
    """The same under eager, from the modeling file."""
    _check_lookup(models.text, "eager", models.prompt)


def scale_and_mask(models: Models) -> None:
    """An attention function gets its scale and dropout, and under sdpa padding as a bool mask [B, 1, S, S]."""
    padded = {**models.prompt, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    _, query, _, mask, options = _attention_calls(models.text, "sdpa", padded)[0]
    scale = names.attention_options(query, options).scale
    _expect("scale", round(scale, 6), round(_HEAD_SIZE**-0.5, 6))
    _expect("dropout", options.get(names.DROPOUT), 0.0)
    _expect("mask", (mask.dtype, list(mask.shape)), (torch.bool, [1, 1, _PROMPT, _PROMPT]))
    _expect("keys visible to the last row", mask[0, 0, -1].tolist(), [False, True, True, True, True])


def decoder_and_attention(models: Models) -> None:
    """The text decoder can be found, and an attention module in each of its layers."""
    for model in (models.text, models.vision):
        _expect(f"layers with attention in {type(model).__name__}", list(attention_modules(model)), [0, 1])


def image_token(models: Models) -> None:
    """The config names the image token and the video token."""
    _expect("image token", names.image_id(models.vision.config), _IMAGE)
    _expect("visual tokens", names.visual_ids(models.vision.config), [_IMAGE, _VIDEO])


def processor_parts(models: Models) -> None:
    """A model's processor class can be found, and names its video part."""
    import transformers

    kind = getattr(transformers, processors.processor_class(models.vision.config.model_type))
    _expect("video parts", processors.video_parts(kind), ["video_processor"])


def custom_decoding(models: Models) -> None:
    """generate passes its logits processors, stopping criteria and positions to a custom decoding function."""
    from transformers import StoppingCriteriaList

    twin = copy.copy(models.vision)
    text = _without_pixels(models.question)
    prepared = names.prepared_by_generate(twin, {**text, "max_new_tokens": 2}, StoppingCriteriaList())
    ids = text["input_ids"]
    _expect("stops after two tokens", bool(prepared.criteria(torch.cat([ids, ids[:, :2]], 1), None).all()), True)
    _expect("shape of processed scores", list(prepared.processors(ids, torch.zeros(1, _VOCABULARY)).shape), [1, 64])
    if prepared.positions is None:
        raise ValueError("got no position_ids")
    _expect("positions", prepared.positions.shape[-1], ids.shape[1])


def stored_positions(models: Models) -> None:
    """A model that stores position offsets of its last prompt does so under a known name."""
    _generate(models.vision, models.question)
    stored = [value for _, value in names.position_modules(models.vision) if value is not None]
    _expect("modules with position offsets", len(stored), 1)


def image_features(models: Models) -> None:
    """Logits are the same if image features are passed instead of pixels, in versions that take them."""
    entries = {name: value for name, value in models.question.items() if not processors.is_text(name)}
    features = names.image_features(models.vision, entries)
    if features is None:
        with suppress(InvalidVersion):
            if Version(names.version()) < _TAKES_FEATURES:
                return
        raise ValueError("its forward takes no image features")
    text = _without_pixels(models.question)
    _expect_close("logits", models.vision(**text, **features).logits, models.vision(**models.question).logits)


def map_of_a_forward(models: Models) -> None:
    """A captured map under sdpa equals output_attentions under eager."""
    from carve_kernels.hf.session.session import capture_attention

    with capture_attention(models.vision, layers=[0, 1], backend="reference") as session:
        models.vision(**models.question)
    for layer, expected in enumerate(_eager_attentions(models)):
        _expect_close(f"map of layer {layer}", session.maps.values[0, layer, 0, 0], expected)


def maps_of_generate(models: Models) -> None:
    """A session follows generate: one step for the prompt, and one for each new token that is fed."""
    from carve_kernels.hf.session.session import capture_attention

    with capture_attention(models.vision, layers=[1], backend="reference") as session:
        _generate(models.vision, models.question, 3)
    _expect("steps", session.maps.steps, (0, 1, 2))
    _expect_close("map of the prompt", session.maps.values[0, 0, 0, 0], _eager_attentions(models)[1])


def compiled_calls(models: Models) -> None:
    """A model's compiled calls, which skip its hooks, have known names."""
    _expect("a call compiled in place", names.compiled_in_place(models.text), None)
    calls = [name for name, _ in names.compiled_calls(models.text, lambda call: call)]
    _expect("compiled calls", len(calls), 1)


CHECKS: dict[str, Callable[[Models], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        cache_on_the_second_step, attention_lookup, eager_lookup, scale_and_mask, decoder_and_attention, image_token,
        processor_parts, custom_decoding, stored_positions, image_features, map_of_a_forward, maps_of_generate,
        compiled_calls,
    )
}  # fmt: skip


def _failure(check: Callable[[Models], None], models: Models) -> str | None:
    try:
        check(models)
    except UpstreamChanged as error:
        return error.what
    # A check may fail in any way.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _build(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model


def _generate(model: Any, inputs: dict[str, torch.Tensor], count: int = 2) -> None:
    model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def _attention_calls(model: Any, implementation: str, inputs: dict[str, torch.Tensor]) -> list[tuple[Any, ...]]:
    """The (module, query, key, mask, options) of each attention of the text layers in one forward."""
    calls: list[tuple[Any, ...]] = []
    modules = attention_modules(model).values()
    with ExitStack() as stack:
        stack.callback(names.set_implementation, model, "sdpa")
        names.set_implementation(model, implementation)
        stack.enter_context(patched(*names.attention_entry(next(iter(modules)), 0)))
        recorder = SimpleNamespace(fused=False, record=lambda _index, *call: calls.append(call))
        for module in modules:
            setattr(module, RECORDERS, ((recorder, 0),))
            stack.callback(delattr, module, RECORDERS)
        model(**inputs)
    return calls


def _check_lookup(model: Any, implementation: str, prompt: dict[str, torch.Tensor]) -> None:
    calls = _attention_calls(model, implementation, prompt)
    shapes = [1, _HEADS, _PROMPT, _HEAD_SIZE], [1, _KEY_HEADS, _PROMPT, _HEAD_SIZE]
    actual = [(list(query.shape), list(key.shape)) for _, query, key, *_ in calls]
    _expect(f"calls under {implementation}", actual, [shapes] * _LAYERS)


def _eager_attentions(models: Models) -> list[torch.Tensor]:
    names.set_implementation(models.vision, "eager")
    try:
        attentions = models.vision(**models.question, output_attentions=True).attentions
    finally:
        names.set_implementation(models.vision, "sdpa")
    is_image = models.question["input_ids"][0] == _IMAGE
    return [layer[0, :, -1].mean(0)[is_image] for layer in attentions]


def _without_pixels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("pixel")}


def _expect(what: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise ValueError(f"{what}: expected {expected}, got {actual}")


def _expect_close(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:
        raise ValueError(f"{what}: differs by {error:.1e} of its maximum, expected at most {_TOLERANCE:.0e}")
