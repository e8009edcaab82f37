"""What is relied on in transformers, tried on two tiny models: about a dozen checks, in under two seconds.

`doctor` runs them, and so does the first session or engine under a version that was not tested: a release that renames
or reorders something is then an error that names the versions, not a wrong map.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from carve_kernels.checks import UpstreamChanged
from carve_kernels.hf import caches, names, processor_names
from carve_kernels.hf.attention_patch import PATCHES, RECORDERS

_LAYERS, _HEADS, _KEY_HEADS, _HEAD_SIZE, _VOCABULARY = 2, 4, 2, 8, 64
_PROMPT, _IMAGE, _VIDEO, _START, _END = 5, 60, 61, 62, 63
_GRID, _PATCH_VALUES = (4, 6), 3 * 2 * 14 * 14
_TEXT: dict[str, Any] = {
    "hidden_size": _HEADS * _HEAD_SIZE,
    "intermediate_size": 32,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KEY_HEADS,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# A map in float32 is so far from eager's at most, in parts of its maximum.
_CLOSE = 1e-4
# From here on a forward takes results of a vision tower.
_TAKES_RESULTS = Version("5.20")
_LOG = logging.getLogger("carve_kernels")
_LOCK = threading.Lock()
# The thread in which the checks run: their own sessions are not checked.
_running_in: int | None = None
_held = False
_told = False


def ensure() -> None:
    """Run the checks if the installed transformers was not tested; once they hold, they are not run again.

    Raises UpstreamChanged, which names both versions, if one fails.
    """
    global _held, _told
    if _held or names.is_tested() or _running_in == threading.get_ident():
        return
    broken = [f"{name} ({reason})" for name, reason in results().items() if reason is not None]
    _held = not broken
    if not _told:
        _told = True
        _LOG.warning(
            "transformers %s was not tested (%s to %s were): %s",
            *(names.version(), *names.TESTED),
            f"{len(broken)} of {len(CHECKS)} checks fail" if broken else f"{len(CHECKS)} checks of it hold",
        )
    if broken:
        raise names.changed("; ".join(broken))


def results() -> dict[str, str | None]:
    """Each check by name, and why it failed, or None.

    They run in a thread of their own, where no mode of the caller's (autocast, inference, fake tensors, a default
    device) is in force.
    """
    found: dict[str, str | None] = {}

    def run() -> None:
        global _running_in
        _running_in = threading.get_ident()
        try:
            with _undisturbed():
                models = Models()
                found.update({name: _failure(check, models) for name, check in CHECKS.items()})
        finally:
            _running_in = None

    with _LOCK:
        thread = threading.Thread(target=run, name="carve_kernels contract")
        thread.start()
        thread.join()
    return found


class Models:
    """A text model of two layers, and a Qwen2.5-VL of two layers with a prompt that shows one image."""

    @cached_property
    def text(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        return _made(LlamaForCausalLM, LlamaConfig(**_TEXT))

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
        return _made(Qwen2_5_VLForConditionalGeneration, config)

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

    @cached_property
    def columns(self) -> torch.Tensor:
        return (self.question["input_ids"][0] == _IMAGE).nonzero()[:, 0]


def cache_on_the_second_step(models: Models) -> None:
    """generate hands its cache to the second forward under a known name, and the cache counts the prompt."""
    given: list[dict[str, Any]] = []
    signature = names.signature_of(models.text)
    hook = models.text.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(_noted(names.arguments(signature, args, kwargs))), with_kwargs=True
    )
    try:
        _generate(models.text, models.prompt)
    finally:
        hook.remove()
    _expect("two forwards", len(given), 2)
    _expect("new tokens in the second forward", given[1]["new"], 1)
    _expect("tokens in the cache of the second forward", given[1]["held"], _PROMPT)
    cache, attention = caches.cache_in(models.text(**models.prompt, use_cache=True)), _attention(models.text)[1]
    whole = caches.mark(cache, attention)
    _expect("keys of a layer in the cache", None if whole is None else whole.keys, _PROMPT)
    cache.crop(-1)
    cut = caches.mark(cache, attention)
    _expect("keys of a cropped cache", None if cut is None else cut.keys, _PROMPT - 1)
    _expect("keys of a cropped cache in their place", bool(whole and cut and cut.same_place(whole)), True)
    _expect("keys of a static cache", caches.reach(_static(models.text), attention), caches.Reach(None, _PROMPT))


def attention_is_looked_up(models: Models) -> None:
    """The attention of a layer is called once in a forward, from the registry, with [B, heads, S, D]."""
    _expect("calls under sdpa", _calls(models.text, "sdpa", models.prompt), [_shapes(_PROMPT)] * _LAYERS)


def eager_is_looked_up(models: Models) -> None:
    """The same under eager, from the modeling file."""
    _expect("calls under eager", _calls(models.text, "eager", models.prompt), [_shapes(_PROMPT)] * _LAYERS)


def scale_and_mask(models: Models) -> None:
    """An attention function is told its scale, and padding as a bool mask [B, 1, S, S] under sdpa."""
    calls: list[tuple[names.AttentionOptions, Any]] = []
    padded = {**models.prompt, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    with _watched(models.text, "sdpa", lambda query, key, mask, told: calls.append((told, mask))):
        models.text(**padded)
    told, mask = calls[0]
    _expect("scale", round(told.scale, 6), round(_HEAD_SIZE**-0.5, 6))
    _expect("mask", (mask.dtype, list(mask.shape)), (torch.bool, [1, 1, _PROMPT, _PROMPT]))
    _expect("what the last row sees", mask[0, 0, -1].tolist(), [False, True, True, True, True])


def decoder_and_attention(models: Models) -> None:
    """The text decoder is found, and one attention module in each of its layers."""
    from carve_kernels.hf.model import attention_modules

    for model in (models.text, models.vision):
        _expect(f"layers with attention in {type(model).__name__}", list(attention_modules(model)), [0, 1])


def image_token(models: Models) -> None:
    """The configuration names the image and the video token."""
    _expect("image token", names.image_id(models.vision.config), _IMAGE)
    _expect("visual tokens", names.visual_ids(models.vision.config), [_IMAGE, _VIDEO])


def processor_parts(models: Models) -> None:
    """The class of a model's processor is named, and names its part for videos."""
    import transformers

    kind = getattr(transformers, processor_names.processor_class(models.vision.config.model_type))
    _expect("parts for videos", processor_names.video_parts(kind), ["video_processor"])


def decision_hooks(models: Models) -> None:
    """generate hands its logits processors, stopping criteria and positions to a decoding function of one's own."""
    from transformers import StoppingCriteriaList

    twin = copy.copy(models.vision)
    placed = {name: value for name, value in models.question.items() if not name.startswith("pixel")}
    prepared = names.prepared_by_generate(twin, {**placed, "max_new_tokens": 2}, StoppingCriteriaList())
    ids = placed["input_ids"]
    _expect("stops behind two tokens", bool(prepared.criteria(torch.cat([ids, ids[:, :2]], 1), None).all()), True)
    _expect("scores that are processed", list(prepared.processors(ids, torch.zeros(1, _VOCABULARY)).shape), [1, 64])
    if prepared.positions is None:
        raise ValueError("no position_ids came")
    _expect("positions", prepared.positions.shape[-1], ids.shape[1])


def position_notes(models: Models) -> None:
    """A model that notes the positions of its last prompt does so where they are looked for."""
    _generate(models.vision, models.question)
    noted = [value for _, value in names.position_notes(models.vision) if value is not None]
    _expect("modules with notes", len(noted), 1)


def tower_results(models: Models) -> None:
    """Logits are the same with results of the vision tower handed in, where the version takes them."""
    results = names.tower_results(models.vision, {n: v for n, v in models.question.items() if not names.is_text(n)})
    if results is None:
        with suppress(InvalidVersion):
            if Version(names.version()) < _TAKES_RESULTS:
                return
        raise ValueError("its forward takes none")
    text = {name: value for name, value in models.question.items() if not name.startswith("pixel")}
    expected, found = models.vision(**models.question).logits, models.vision(**text, **results).logits
    _close("logits", found, expected)


def map_of_a_forward(models: Models) -> None:
    """A captured map under sdpa equals output_attentions under eager."""
    from carve_kernels.hf.session.session import capture_attention

    with capture_attention(models.vision, layers=[0, 1], backend="reference") as session:
        models.vision(**models.question)
    for layer, expected in enumerate(_eager_attentions(models)):
        _close(f"map of layer {layer}", session.maps.values[0, layer, 0, 0], expected)


def maps_of_generate(models: Models) -> None:
    """A session follows generate: one step for the prompt and one for each new token that is fed."""
    from carve_kernels.hf.session.session import capture_attention

    with capture_attention(models.vision, layers=[1], backend="reference") as session:
        _generate(models.vision, models.question, 3)
    _expect("steps", session.maps.steps, (0, 1, 2))
    _close("map of the prompt", session.maps.values[0, 0, 0, 0], _eager_attentions(models)[1])


def compiled_calls(models: Models) -> None:
    """A model's compiled calls, which skip its hooks, are where they are looked for."""
    _expect("a call compiled in place", names.compiled_in_place(models.text), None)
    calls = [name for name, _ in names.compiled_calls(models.text, lambda call: call)]
    _expect("compiled calls", len(calls), 1)


CHECKS: dict[str, Callable[[Models], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        cache_on_the_second_step, attention_is_looked_up, eager_is_looked_up, scale_and_mask, decoder_and_attention,
        image_token, processor_parts, decision_hooks, position_notes, tower_results, map_of_a_forward, maps_of_generate,
        compiled_calls,
    )
}  # fmt: skip


def _failure(check: Callable[[Models], None], models: Models) -> str | None:
    try:
        check(models)
    except UpstreamChanged as error:
        return error.what
    # Whatever goes wrong in there is what a check is for.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """float32 and no gradients; random numbers and the default dtype of the caller stay as they are."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model


def _generate(model: Any, inputs: dict[str, torch.Tensor], count: int = 2) -> None:
    model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def _noted(given: dict[str, Any]) -> dict[str, int]:
    return {"new": given["input_ids"].shape[1], "held": int(caches.cached_tokens(caches.cache_of(given)))}


def _static(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=_PROMPT)


def _attention(model: Any) -> list[nn.Module]:
    from carve_kernels.hf.model import attention_modules

    return list(attention_modules(model).values())


class _Watcher:
    """Told of each call of the attention of some modules, as a session's recorder is."""

    def __init__(self, watch: Callable[..., None]) -> None:
        self._watch = watch

    def record(self, index: int, module: Any, query: Any, key: Any, mask: Any, options: dict[str, Any]) -> None:
        self._watch(query, key, mask, names.attention_options(query, options))


@contextmanager
def _watched(model: Any, implementation: str, watch: Callable[..., None]) -> Iterator[None]:
    """Call `watch(query, key, mask, options)` at each attention of a model's text layers."""
    with ExitStack() as stack:
        stack.callback(names.set_implementation, model, "sdpa")
        names.set_implementation(model, implementation)
        modules = _attention(model)
        entry = names.attention_entry(modules[0], 0)
        PATCHES.enter(*entry)
        stack.callback(PATCHES.leave, *entry)
        for module in modules:
            setattr(module, RECORDERS, ((_Watcher(watch), 0),))
            stack.callback(delattr, module, RECORDERS)
        yield


def _calls(model: Any, implementation: str, inputs: dict[str, torch.Tensor]) -> list[Any]:
    calls: list[Any] = []
    with _watched(model, implementation, lambda query, key, *_: calls.append((list(query.shape), list(key.shape)))):
        model(**inputs)
    return calls


def _shapes(length: int) -> tuple[list[int], list[int]]:
    return [1, _HEADS, length, _HEAD_SIZE], [1, _KEY_HEADS, length, _HEAD_SIZE]


def _eager_attentions(models: Models) -> list[torch.Tensor]:
    names.set_implementation(models.vision, "eager")
    try:
        attentions = models.vision(**models.question, output_attentions=True).attentions
    finally:
        names.set_implementation(models.vision, "sdpa")
    return [layer[0, :, -1].mean(0)[models.columns] for layer in attentions]


def _expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what}: expected {expected}, got {found}")


def _close(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    far = float((found - expected).abs().max() / expected.abs().max())
    if not far <= _CLOSE:
        raise ValueError(f"{what}: {far:.1e} of its maximum away, expected at most {_CLOSE:.0e}")
