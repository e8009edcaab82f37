"""Names of transformers and PEFT that are private or conventions, one small function each.

Only caches.py, processors.py and model.py (of accelerate, bitsandbytes and torchao) spell such names as well. "Known
in" lists the versions that have a name, if not all of TESTED do; session/contract.py checks the installed one.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from packaging.version import InvalidVersion, Version
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, __version__

from carve_kernels.checks import UpstreamChanged

TESTED = ("5.12", "5.24")
"""The oldest and the newest version of transformers that the tests have run with."""

RECURRENT = ("linear_attention", "mamba", "conv", "moe")
"""The layer types without softmax attention."""

DROPOUT = "dropout"
_WRAPPED = ("_orig_mod", "module", "base_model", "model")
_SOFTMAX = ("full_attention", "sliding_attention")
_ATTENTION = re.compile(r"^(?!.*(Linear|Lightning|Cross)).*Attention", re.IGNORECASE)
_CROSS_CLASS = re.compile(r"Cross\w*Attention", re.IGNORECASE)
_CROSS_NAME = re.compile(r"(.*\.)?(cross_?att\w*|encoder_attn)")
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
_IMAGE_IDS = ("image_token_id", "image_token_index")
_VIDEO_IDS = ("video_token_id", "video_token_index")
_SEGMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")
_TOWER = "mm_encoder_outputs"
# Outputs of a vision tower that no language model reads.
_UNREAD = ("last_hidden_state", "hidden_states", "attentions")
# Adapters whose effect on a token depends on that token only.
_ADAPTERS = ("ADALORA", "BOFT", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT",
             "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA")  # fmt: skip
_OVERRIDABLE = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample")
_DECODING = ("logits_processor", "stopping_criteria")
# Arguments of `generate` that may call the model themselves.
_CALLBACKS = (*_DECODING, "prefix_allowed_tokens_fn", "custom_generate", "streamer")
_PROMPTS = ("inputs_embeds", "inputs", "input_ids")
LAYER_MASK = "attention_mask"
# The other arguments of a decoder layer that have columns: along which axis. Known in: `cache_position` to 5.20.
COLUMN_AXES = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}

Attention = Callable[..., Any]


# Versions
def version() -> str:
    """The version of the installed transformers."""
    return __version__


def is_tested() -> bool:
    """Whether the installed transformers lies within TESTED; a pre-release does not."""
    try:
        installed = Version(version())
    except InvalidVersion:
        return False
    oldest, newest = (Version(each).release for each in TESTED)
    return not installed.is_prerelease and oldest <= installed.release[:2] <= newest


def install_command() -> str:
    """The command that installs a tested version."""
    return f"pip install 'transformers>={TESTED[0]},<={TESTED[1]}.99'"


def changed(what: str) -> UpstreamChanged:
    """The error for an installed transformers that differs from the tested versions."""
    return UpstreamChanged(
        f"transformers {version()} differs from the versions that carve_kernels was tested with ({TESTED[0]} to "
        f"{TESTED[1]}): {what}; install a tested version, {install_command()}, or a newer carve_kernels",
        what,
    )


# The arguments of a forward
def arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, including those caught by **kwargs."""
    if not args:
        return dict(kwargs)
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        # A replaced forward may take more than its signature lists; if it does not, it raises by itself.
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}
        given = {**kwargs, **signature.bind_partial(*args, **known).arguments}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given = {**given, **given.pop(name, {})}
    return dict(given)


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of a model's forward."""
    return inspect.signature(model.forward)


def rows_kept(model: Any, given: Mapping[str, Any]) -> int | None:
    """How many last rows run through layers that reuse other layers' keys; None: all. Known in: 5.20 to 5.24."""
    count = given.get("logits_to_keep")
    shares = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    return count if shares and isinstance(count, int) and count > 0 else None


def full_mask(attention_mask: Any) -> Any:
    """The mask of full attention, if `generate` prepared a mask for each layer type."""
    if isinstance(attention_mask, dict):
        return attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    return attention_mask


# Attention
class AttentionOptions(NamedTuple):
    """Arguments of an attention function besides query, key, value and mask.

    `scale` multiplies the scores and `softcap` bounds them (0: no bound); `window` is how many keys a row sees; `sink`
    is one extra score per head; `causal` overrides the module's own setting unless it is None; `bias` is added to the
    scores; `paged` is a paged cache; `segments` names the argument with the starts of packed prompts; `positions` are
    the positions of the rows; `dropout` is the share of probabilities that is dropped.
    """

    scale: float
    softcap: float
    window: int | None
    sink: torch.Tensor | None
    causal: bool | None
    bias: Any
    paged: Any
    segments: str | None
    positions: Any
    dropout: float

    @property
    def beyond_sdpa(self) -> str | None:
        """The first option that torch's scaled_dot_product_attention does not support, or None."""
        found = {"softcap": self.softcap or None, "s_aux": self.sink, "position_bias": self.bias, "cache": self.paged}
        return next((name for name, value in found.items() if value is not None), None)


def attention_options(query: torch.Tensor, options: Mapping[str, Any]) -> AttentionOptions:
    """The keyword arguments of an attention function, as AttentionInterface names them."""
    scaling = options.get("scaling")
    return AttentionOptions(
        scale=float(scaling) if scaling is not None else query.shape[3] ** -0.5,
        softcap=float(options.get("softcap") or 0.0),
        window=options.get("sliding_window"),
        sink=options.get("s_aux"),
        causal=options.get("is_causal"),
        bias=options.get("position_bias"),
        paged=options.get("cache"),
        segments=segments_in(options),
        positions=options.get("position_ids"),
        dropout=float(options.get(DROPOUT) or 0.0),
    )


def segments_in(given: Mapping[str, Any]) -> str | None:
    """The argument with the starts of prompts packed into one row, if the call has one."""
    return next((name for name in _SEGMENTS if given.get(name) is not None), None)


def implementation_of(module: Any) -> str | None:
    """The attention implementation in the (text) config of a module or model."""
    config = getattr(module, "config", None)
    if isinstance(module, PreTrainedModel):
        config = module.config.get_text_config()
    return getattr(config, "_attn_implementation", None)


def set_implementation(model: Any, implementation: str) -> None:
    """Switch the attention implementation of a whole model."""
    model.set_attn_implementation(implementation)


def implementations(config: Any) -> list[str]:
    """The attention implementations of a config and its sub-configs."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [str(getattr(each, "_attn_implementation", None)) for each in (config, *inner) if each is not None]


def attention_entry(module: nn.Module, layer: int) -> tuple[Any, str]:
    """Where a module looks up its attention function: (registry or modeling file, name of the entry).

    Eager is looked up in the modeling file, all others in the registry. Raises ValueError for
    a module without such a lookup.
    """
    modeling = sys.modules[type(module).__module__]
    implementation = implementation_of(module)
    registry = getattr(modeling, _REGISTRY, None)
    if registry is None or implementation is None:
        raise ValueError(
            f"model: layer {layer} ({type(module).__name__}) does not look up its attention function in transformers' "
            "AttentionInterface, so its attention cannot be captured"
        )
    if implementation != "eager":
        return registry, implementation
    if not hasattr(modeling, _EAGER):
        raise ValueError(
            f"model: {modeling.__name__} has no {_EAGER}; use attn_implementation='sdpa' for layer {layer}"
        )
    return modeling, _EAGER


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module is causal."""
    return bool(getattr(module, "is_causal", True))


def own_entry(registry: Any, name: str) -> Attention | None:
    """The entry of a registry or modeling file itself; None where the global entry is used."""
    if isinstance(registry, type(sys)):
        entry: Attention | None = getattr(registry, name)
        return entry
    try:
        local: Attention | None = registry._local_mapping.get(name)
    except AttributeError as error:
        raise changed(f"its registry of attention functions has changed ({error})") from error
    return local


def set_entry(registry: Any, name: str, entry: Attention | None) -> None:
    """Set the entry of a registry or modeling file; None deletes it."""
    if isinstance(registry, type(sys)):
        setattr(registry, name, entry)
    elif entry is None:
        del registry[name]
    else:
        registry[name] = entry


def is_builtin(entry: str) -> bool:
    """Whether an entry is one of transformers' own attention functions."""
    return entry in (_EAGER, "sdpa", "flex_attention") or entry.startswith("flash_attention_")


def is_flash(implementation: str) -> bool:
    """Whether an implementation is FlashAttention of some version."""
    return "flash" in implementation


def is_own(attention: Attention) -> bool:
    """Whether an attention function is one of transformers, not a replacement by other code."""
    return getattr(attention, "__module__", "").startswith("transformers.")


def attention_in(layer: nn.Module) -> nn.Module | None:
    """The self-attention module of a layer, by its class name, or None."""
    modules = (module for name, module in layer.named_modules() if name)
    return next((module for module in modules if _ATTENTION.match(type(module).__name__)), None)


# Models and their configurations
def inner_module(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper: torch.compile, DDP, DataParallel, PEFT. Known in: torch 2.10 to 2.14, PEFT 0.21."""
    return next((child for name in _WRAPPED if (child := module._modules.get(name)) is not None), None)


def inner_decoder(model: Any) -> Any:
    """One step from a model towards its text decoder; the model itself at the end."""
    inner = model.get_decoder()
    # Llama 4's stops one level early, at a model whose `model` has the layers.
    if inner is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        return model.model
    return inner


def key_value_size(config: Any) -> int:
    """The number of elements in one token's key and value in a layer."""
    _, heads, size = heads_of(config)
    return 2 * heads * size


def heads_of(config: Any) -> tuple[int, int, int]:
    """The numbers of query heads and key heads of most layers, and the size of a head."""
    query_heads = config.num_attention_heads
    key_heads = _of_all_layers(config, "num_key_value_heads") or query_heads
    size = _of_all_layers(config, "head_dim") or config.hidden_size // query_heads
    return int(query_heads), int(key_heads), int(size)


def _of_all_layers(config: Any, name: str) -> Any:
    """An attribute of a config; None if there is none, or if it is one for each layer, which some configs refuse."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def types_of_layers(config: Any) -> list[str] | None:
    """The type of each layer, if the config has them."""
    types = getattr(config, "layer_types", None)
    return None if types is None else list(types)


def windows(config: Any) -> list[int | None] | None:
    """The sliding window of each layer; None if only the layers know."""
    types = types_of_layers(config)
    if types is None:
        return None
    return [config.sliding_window if each == "sliding_attention" else None for each in types]


def tree_reason(model: Any, config: Any) -> str | None:
    """Why a model's class or text config rules out tree decoding, or None."""
    others = sorted({each for each in types_of_layers(config) or () if each not in (*_SOFTMAX, *RECURRENT)})
    if others:
        return f"it has layers of type {', '.join(others)}"
    # "vision": in blocks, which the masks of a prompt show.
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        return "its attention is not causal"
    return "it is an encoder-decoder model" if model.config.is_encoder_decoder else None


def cross_attention_in(decoder: nn.Module) -> str | None:
    """The first cross-attention module of a text decoder, for a message, or None."""
    for name, module in decoder.named_modules():
        if _CROSS_CLASS.search(type(module).__name__) or _CROSS_NAME.fullmatch(name):
            return f"{name} ({type(module).__name__})"
    layers = getattr(getattr(decoder, "config", None), "cross_attention_layers", None)
    return f"layer {layers[0]}" if layers else None


def states_added(decoder: nn.Module) -> str | None:
    """What a text decoder adds to the states between its layers, for a message, or None."""
    return next((f"the decoder adds {name}" for name in signature_of(decoder).parameters if "deepstack" in name), None)


def rotations(config: Any) -> set[str]:
    """The types of RoPE of all layers. Known in: `rope_parameters` since 5.0, `rope_scaling` in remote code."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [value for value in given.values() if isinstance(value, Mapping)] or [given]
    return {str(each.get("rope_type", each.get("type", "default"))) for each in parts}


def image_id(config: Any) -> int | None:
    """The id of the image token, which LLaVA's config calls an index, and Phi-4's vision config has."""
    both = (config, getattr(config, "vision_config", None))
    return next((each for part in both for name in _IMAGE_IDS if (each := getattr(part, name, None)) is not None), None)


def video_id(config: Any) -> int | None:
    """The same for the video token."""
    return next((found for name in _VIDEO_IDS if (found := getattr(config, name, None)) is not None), None)


def visual_ids(config: Any) -> list[int]:
    """The ids of the image and video tokens, ascending."""
    ids = (image_id(config), *(getattr(config, name, None) for name in _VIDEO_IDS))
    return sorted({each for each in ids if each is not None})


def position_modules(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Modules that store position offsets of the last prompt, as Qwen-VL does, with them."""
    return [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]


def stored_positions(modules: Iterable[nn.Module]) -> list[Any]:
    """The position offsets that these modules store."""
    return [module.rope_deltas for module in modules]


def restore_positions(notes: list[tuple[nn.Module, Any]]) -> None:
    """Restore what `position_modules` returned."""
    for module, noted in notes:
        module.rope_deltas = noted


# Processors
def templates_of(processor: Any) -> list[tuple[Any, dict[str, str]]]:
    """The processor and its tokenizer, if they have chat templates, with these by name, the default one first."""
    found = []
    for owner in (processor, getattr(processor, "tokenizer", None)):
        templates = getattr(owner, "chat_template", None)
        by_name = dict(templates) if isinstance(templates, Mapping) else {"default": templates}
        names = sorted((name for name in by_name if by_name[name]), key=lambda name: name != "default")
        if names:
            found.append((owner, {name: str(by_name[name]) for name in names}))
    return found


def image_features(model: Any, entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run the vision tower; the features that a forward takes, None if not of such entries. Known in: 5.20 to 5.24."""
    if _TOWER not in signature_of(model).parameters:
        return None
    encode = model.base_model.get_image_features
    known = inspect.signature(encode).parameters
    given = {name: value for name, value in entries.items() if name in known}
    missing = (each for name, each in known.items() if name not in given and each.kind is not each.VAR_KEYWORD)
    if not given or any(each.default is each.empty for each in missing):
        return None
    output = encode(**given, return_dict=True)
    read = {name: value for name, value in output.items() if name not in _UNREAD}
    return {_TOWER: {"image": type(output)(**read)}}


# generate
class Prepared(NamedTuple):
    """What `generate` decodes with: positions of the prompt (or None), logits processors, stopping criteria."""

    positions: torch.Tensor | None
    processors: Any
    criteria: Any


def prepared_by_generate(model: Any, inputs: Mapping[str, Any], criteria: Any) -> Prepared:
    """What `generate` would decode a prompt with; no forward runs."""
    arguments: dict[str, Any] = {}

    def note(_model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        arguments.update(prepared)
        return input_ids

    model.generate(**inputs, stopping_criteria=criteria, custom_generate=note)
    missing = [name for name in _DECODING if arguments.get(name) is None]
    if missing:
        raise changed(f"generate passes no {' and no '.join(missing)} to a custom decoding function")
    return Prepared(arguments.get("position_ids"), *(arguments[name] for name in _DECODING))


def prompt_of(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The prompt among the arguments of `generate`, ids or embeddings."""
    return next((found for name in _PROMPTS if isinstance(found := given.get(name), torch.Tensor)), None)


def callback_in(given: Mapping[str, Any]) -> str | None:
    """The first argument of `generate` that may call the model itself, or None."""
    return next((name for name in _CALLBACKS if given.get(name)), None)


def has_own_generate(model: Any) -> bool:
    """Whether a model overrides transformers' `generate` or a part of it."""
    if not isinstance(model, GenerationMixin):
        return hasattr(model, "generate")
    kind = type(model)
    own = [name for name in _OVERRIDABLE if not getattr(kind, name).__module__.startswith("transformers.")]
    replaced = [name for name in ("generate", *_OVERRIDABLE) if name in model.__dict__]
    return kind.generate is not GenerationMixin.generate or bool(own or replaced)


def logits_of(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """The argument that limits a forward's logits to some rows, if it takes one."""
    return {"logits_to_keep": rows} if "logits_to_keep" in signature_of(model).parameters else {}


def compiled_in_place(model: nn.Module) -> Any:
    """The compiled call that `model.compile()` installed, or None. Known in: torch 2.10 to 2.14."""
    return model._compiled_call_impl


def compiled_calls(model: nn.Module, around: Callable[[Attention], Attention]) -> Iterator[tuple[str, Attention]]:
    """The compiled calls of a model, which skip its hooks: the attribute of each, and the call wrapped by `around`.

    Known in: `get_compiled_call` 5.12 to 5.24, `_compiled_call_impl` torch 2.10 to 2.14.
    """
    if hasattr(model, "get_compiled_call"):
        compiled: Any = model.get_compiled_call
        yield "get_compiled_call", lambda *args, **kwargs: around(compiled(*args, **kwargs))
    if (in_place := compiled_in_place(model)) is not None:
        yield "_compiled_call_impl", around(in_place)


# PEFT
def has_virtual_tokens(module: Any) -> bool:
    """Whether a module has an adapter that prepends virtual tokens to the prompt. Known in: PEFT 0.21."""
    return any(getattr(peft, "is_prompt_learning", False) for peft in getattr(module, "peft_config", {}).values())


def adapter_reason(module: Any) -> str | None:
    """Why a module's adapters rule out tree decoding, or None. Known in: PEFT 0.21."""
    if has_virtual_tokens(module):
        return "its adapter prepends virtual tokens to the prompt"
    for peft in getattr(module, "peft_config", {}).values():
        if getattr(peft, "alora_invocation_tokens", None):
            return "its adapter starts in the middle of a prompt"
        kind = str(getattr(getattr(peft, "peft_type", None), "value", "of no type"))
        if kind not in _ADAPTERS:
            return f"its adapter is {kind}, which may mix tokens"
    return None


def adapter_states(model: nn.Module) -> list[tuple[Any, ...]]:
    """The active adapters of each module, their scaling, and whether they are disabled. Known in: PEFT 0.21."""
    states = ((name, module.__dict__) for name, module in model.named_modules())
    return [
        (name, str(state["_active_adapter"]), str(state.get("scaling")), bool(state.get("_disable_adapters")))
        for name, state in states
        if "_active_adapter" in state
    ]
