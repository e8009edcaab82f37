"""Names of other libraries: each in one of four files, and a cache under an unknown name is an UpstreamChanged."""

from __future__ import annotations

import functools
import inspect
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from carve_kernels import CarveEngine, capture_attention
from carve_kernels.checks import UpstreamChanged
from carve_kernels.hf import caches, names
from tests.support.families import family, inputs_of, state
from tests.support.tiny_models import make_image

FILES = ("names.py", "caches.py", "processors.py", "model.py")
PACKAGE = Path(inspect.getfile(names)).parents[1]

# Private names and conventions: none of these may be spelled anywhere else in the package.
SPELLINGS = [
    "past_key_values",
    '.get("cache"',
    "get_seq_length",
    "is_sliding",
    "max_cache_len",
    "layer_idx",
    "cu_seq_lens_q",
    "_local_mapping",
    "_global_mapping",
    "_attn_implementation",
    "ALL_ATTENTION_FUNCTIONS",
    "eager_attention_forward",
    "scaling",
    "s_aux",
    "sliding_window",
    "position_bias",
    "get_decoder",
    "_orig_mod",
    "base_model",
    "layer_types",
    "linear_attention",
    "full_attention",
    "num_kv_shared_layers",
    "num_key_value_heads",
    "use_bidirectional_attention",
    "create_masks_for_generate",
    "is_encoder_decoder",
    "rope_parameters",
    "rope_scaling",
    "rope_deltas",
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "mm_token_type_ids",
    "mm_encoder_outputs",
    "get_image_features",
    "PROCESSOR_MAPPING_NAMES",
    "get_attributes",
    "from_args_and_dict",
    "custom_generate",
    "logits_processor",
    "logits_to_keep",
    "_compiled_call_impl",
    "get_compiled_call",
    "sub_configs",
    "peft_config",
    "is_prompt_learning",
    "alora_invocation_tokens",
    "_active_adapter",
    "_disable_adapters",
    "_hf_hook",
    "_hf_device_mesh",
    "_old_forward",
    "accelerate.hooks",
    "Linear4bit",
    "act_quant_kwargs",
    "DTensor",
    "hf_device_map",
]
# The checks in contract.py build models, so they spell names of configs and inputs.
BUILDS_MODELS = {
    "max_cache_len",
    "image_token_id",
    "video_token_id",
    "mm_token_type_ids",
    "rope_parameters",
    "num_key_value_heads",
}


def code_of(path: Path) -> str:
    """A file without its comments; docstrings count."""
    with tokenize.open(path) as file:
        code = [token.string for token in tokenize.generate_tokens(file.readline) if token.type != tokenize.COMMENT]
    return " ".join(code).replace(' . get ( "', '.get("')


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_transformers_are_spelled_in_the_files_for_names_only(spelling: str) -> None:
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if spelling in code_of(path) and path.name not in FILES
    ]
    expected = ["hf/session/contract.py"] if spelling in BUILDS_MODELS else []
    assert found == expected


def test_every_name_in_the_list_is_used() -> None:
    spelled = "".join(code_of(PACKAGE / "hf" / file) for file in FILES)
    unspelled = {"_global_mapping", "hf_device_map"}
    assert [spelling for spelling in SPELLINGS if spelling not in spelled and spelling not in unspelled] == []


class Cache:
    """A cache, as far as its interface shows."""

    def get_seq_length(self) -> int:
        return 0


def test_both_names_of_a_cache_are_read() -> None:
    newer, older = Cache(), Cache()
    assert caches.cache_of({"cache": newer, "past_key_values": None}) is newer
    assert caches.cache_of({"past_key_values": older}) is older
    assert caches.cache_of({"cache": newer, "past_key_values": older}) is newer
    assert caches.cache_of({"input_ids": torch.ones(1, 2)}) is None


def test_a_cache_under_an_unknown_name_blames_the_version() -> None:
    with pytest.raises(UpstreamChanged, match=rf"transformers {names.version()} .*5\.12 to 5\.24.*'kv_store'"):
        caches.cache_of({"kv_store": Cache()})


def test_a_paged_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: its cache is a object .*continuous batching"):
        caches.cache_of({"cache": object()})


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("4.57.6", False), ("5.11.3", False), ("5.12.0", True), ("5.20.2", True), ("5.24.1", True),
        ("5.24.0.dev0", False), ("5.25.0", False), ("5.100.0", False), ("6.0.0", False),
        ("main", False), ("", False),
    ],
)  # fmt: skip
def test_tested_versions_include_both_ends(version: str, tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "version", lambda: version)
    assert names.is_tested() is tested


def renamed(model: Any, monkeypatch: pytest.MonkeyPatch, *, opaque: bool = False) -> None:
    """As a future release may: the cache is passed on, and to the forward, under an unknown name."""
    forward, prepare = model.forward, model.prepare_inputs_for_generation
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    class Store:
        """Hides the cache."""

        def __init__(self, cache: Any) -> None:
            self.cache = cache

    @functools.wraps(forward)
    def wrapped(*args: Any, kv_store: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, name: kv_store.cache if isinstance(kv_store, Store) else kv_store})

    def prepared(*args: Any, **kwargs: Any) -> Any:
        inputs = dict(prepare(*args, **kwargs))
        cache = inputs.pop(name, None)
        return {**inputs, "kv_store": Store(cache) if opaque else cache}

    monkeypatch.setattr(model, "forward", wrapped)
    monkeypatch.setattr(model, "prepare_inputs_for_generation", prepared)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("tokens", [None, [3, 4]])
def test_a_renamed_cache_blames_the_version(opaque: bool, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("qwen2_5_vl")[0]
    renamed(model, monkeypatch, opaque=opaque)
    before = state(model)
    with (
        pytest.raises(UpstreamChanged, match=rf"transformers {names.version()} .*5\.12 to 5\.24") as caught,
        capture_attention(model, layers=[1], tokens=tokens) as session,
        torch.no_grad(),
    ):
        model.generate(**inputs_of("qwen2_5_vl", 1), max_new_tokens=3, do_sample=False)
    assert "prompt" not in str(caught.value) and "image" not in str(caught.value)
    assert state(model) == before
    if not opaque:
        with pytest.raises(RuntimeError, match="maps: expected a forward"):
            _ = session.maps


@pytest.mark.parametrize(
    ("chunk", "options"), [(5, {}), (5, {"tokens": [3, 4]}), (20, {"tokens": [1, 2], "rows": [1]})]
)
def test_chunks_after_a_renamed_cache_blame_the_version(
    chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family("qwen2_5_vl")[0]
    renamed(model, monkeypatch, opaque=True)
    # Text only: not every version reads images in chunks with this model.
    ids = inputs_of("qwen2_5_vl", 1)["input_ids"] % 50 + 5
    session = capture_attention(model, layers=[1], **{"tokens": [3], **options})
    with pytest.raises(UpstreamChanged), session, torch.no_grad():
        model.generate(ids, attention_mask=ids > 0, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)


def test_a_generate_without_a_cache_is_followed() -> None:
    """Each forward repeats the prompt with one more token, in every version."""
    model = family("qwen2_5_vl")[0]
    inputs = inputs_of("qwen2_5_vl", 1)
    with capture_attention(model, layers=[1]) as session, torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
    assert session.maps.steps == (0, 1, 2)


def test_a_manual_step_without_a_cache_names_the_known_arguments() -> None:
    model = family("qwen2_5_vl")[0]
    inputs = inputs_of("qwen2_5_vl", 1)
    with capture_attention(model, layers=[1]), torch.no_grad():
        model(**inputs)
        with pytest.raises(ValueError, match=r"'cache' or 'past_key_values'.*got one token without a cache"):
            model(input_ids=inputs["input_ids"][:, -1:])


def test_a_generate_without_criteria_blames_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = family("qwen2_5_vl")
    kind = type(model)
    generate = kind.generate

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        decode = kwargs.pop("custom_generate", None)
        if decode is None:
            return generate(self, *args, **kwargs)
        return decode(self, kwargs["input_ids"])

    monkeypatch.setattr("transformers.GenerationMixin.generate", without)
    with pytest.raises(UpstreamChanged, match="no logits_processor and no stopping_criteria"):
        CarveEngine(model, processor, backend="reference")(make_image(112, 84), "what digit is red")


def test_an_unknown_registry_blames_the_version() -> None:
    with pytest.raises(UpstreamChanged, match="registry of attention functions"):
        names.own_entry(object(), "sdpa")


def test_a_cache_is_read_by_one_name() -> None:
    """transformers warns when the old name of a cache is read."""
    names_read: list[str] = []

    class Output(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            names_read.append(name)
            return super().get(name, default)

    cache = DynamicCache()
    assert caches.cache_in(Output(cache=cache)) is cache and names_read == ["cache"]
    assert caches.cache_in(Output(past_key_values=cache)) is cache and caches.cache_in((1, cache)) is cache
    assert caches.cache_in(Output(logits=1)) is None
