"""Every name of transformers and PEFT that is a convention or private: one small function each.

Nothing else in the package spells these names but caches.py, which has those of caches, and processor_names.py. A
release that changes one is followed there, and `contract` finds out whether the installed one still has what is relied
on. "Known in" says which versions have a name. What other libraries put on a model is in foreign.py.
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
"""The oldest and the newest transformers that the tests have run with, both included."""

_WRAPPED = ("_orig_mod", "module", "base_model", "model")
_RECURRENT = ("linear_attention", "mamba", "conv", "moe")
_SEEING = ("full_attention", "sliding_attention")
_ATTENTION = re.compile(r"^(?!.*(Linear|Lightning|Cross)).*Attention", re.IGNORECASE)
_CROSS_CLASS = re.compile(r"Cross\w*Attention", re.IGNORECASE)
_CROSS_NAME = re.compile(r"(.*\.)?(cross_?att\w*|encoder_attn)")
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
_IMAGE_IDS = ("image_token_id", "image_token_index")
_VIDEO_IDS = ("video_token_id", "video_token_index")
_SEGMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")
_TOWER = "mm_encoder_outputs"
# What a vision tower also returns, and no language model reads.
_UNREAD = ("last_hidden_state", "hidden_states", "attentions")
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
# Adapters that change what a layer makes of a token, by that token alone.
_ADAPTERS = ("ADALORA", "BOFT", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT",
             "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA")  # fmt: skip
_STEPS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample")
_DECISIONS = ("logits_processor", "stopping_criteria")
# What may call the model itself.
_BESIDE = (*_DECISIONS, "prefix_allowed_tokens_fn", "custom_generate", "streamer")
_PROMPTS = ("inputs_embeds", "inputs", "input_ids")

Attention = Callable[..., Any]


# Versions
def version() -> str:
    """The installed transformers."""
    return __version__


def is_tested() -> bool:
    """Whether the installed transformers lies within TESTED; a pre-release does not."""
    try:
        found = Version(version())
    except InvalidVersion:
        return False
    oldest, newest = (Version(each).release for each in TESTED)
    return not found.is_prerelease and oldest <= found.release[:2] <= newest


def mend() -> str:
    """The line that installs a tested version."""
    return f"pip install 'transformers>={TESTED[0]},<={TESTED[1]}.99'"


def changed(what: str) -> UpstreamChanged:
    """The error for something that the installed transformers does in another way than the tested ones."""
    return UpstreamChanged(
        f"transformers {version()} does not work as those that carve_kernels was tested with ({TESTED[0]} to "
        f"{TESTED[1]}): {what}; install one of them, {mend()}, or a newer carve_kernels",
        what,
    )


def contract() -> dict[str, str | None]:
    """Try on tiny models what is relied on: each check by name, and why it failed, or None. See contract.py."""
    from carve_kernels.hf.session import contract as checks

    return checks.results()


# The arguments of a forward
def arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those that it takes beyond its named ones included."""
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        # A forward in another's place may take more than its signature says; one that does not says so itself.
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
    """How many last rows alone go through the layers that use the keys of others; None where all do.

    Known in: 5.20 to 5.24, of Gemma 4.
    """
    kept = given.get("logits_to_keep")
    shares = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    return kept if shares and isinstance(kept, int) and kept > 0 else None


def full_mask(attention_mask: Any) -> Any:
    """The mask of layers that see everything, where `generate` prepared one for each type. Known in: 5.12 to 5.24."""
    if isinstance(attention_mask, dict):
        return attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    return attention_mask


# Attention
class AttentionOptions(NamedTuple):
    """What an attention function is told beside query, key, value and mask.

    `scale` multiplies the scores, `softcap` bounds them (0 is none), `window` is how many keys a row sees, `sink` one
    more score for each head, `causal` whether rows see what is before them alone (None: the module says), `bias`
    what is added to the scores, `paged` a cache in pages, `segments` the name of what says where packed prompts
    begin, `positions` those of the rows.
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

    @property
    def beyond_sdpa(self) -> str | None:
        """The name of the first option that torch's own attention does not take, or None."""
        found = {"softcap": self.softcap or None, "s_aux": self.sink, "position_bias": self.bias, "cache": self.paged}
        return next((name for name, value in found.items() if value is not None), None)


def attention_options(query: torch.Tensor, options: Mapping[str, Any]) -> AttentionOptions:
    """The options of a call of an attention function, by the names of AttentionInterface. Known in: 5.12 to 5.24."""
    scaling = options.get("scaling")
    sink = options.get("s_aux")
    return AttentionOptions(
        scale=float(scaling) if scaling is not None else query.shape[3] ** -0.5,
        softcap=float(options.get("softcap") or 0.0),
        window=options.get("sliding_window"),
        sink=None if sink is None else sink.detach(),
        causal=options.get("is_causal"),
        bias=options.get("position_bias"),
        paged=options.get("cache"),
        segments=segments_in(options),
        positions=options.get("position_ids"),
    )


def segments_in(given: Mapping[str, Any]) -> str | None:
    """The argument that says where packed prompts begin in one row, if a call has it. Known in: 5.12 to 5.24."""
    return next((name for name in _SEGMENTS if given.get(name) is not None), None)


def implementation_of(module: Any) -> str | None:
    """The attention implementation of a module or model, by its (text) config. Known in: 5.12 to 5.24."""
    config = getattr(module, "config", None)
    if isinstance(module, PreTrainedModel):
        config = module.config.get_text_config()
    return getattr(config, "_attn_implementation", None)


def set_implementation(model: Any, implementation: str) -> None:
    """Switch the attention implementation of a whole model. Known in: 5.12 to 5.24."""
    model.set_attn_implementation(implementation)


def implementations(config: Any) -> list[str]:
    """The attention implementations of a configuration and of the ones inside it. Known in: 5.12 to 5.24."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [str(getattr(each, "_attn_implementation", None)) for each in (config, *inner) if each is not None]


def attention_entry(module: nn.Module, layer: int) -> tuple[Any, str]:
    """Where the attention function of a module is looked up: (its registry or its modeling file, the name).

    Known in: 5.12 to 5.24, the registry for every implementation but eager, which stands in the modeling file. Raises
    ValueError where a module looks nothing up.
    """
    modeling = sys.modules[type(module).__module__]
    implementation = implementation_of(module)
    registry = getattr(modeling, _REGISTRY, None)
    if registry is None or implementation is None:
        raise ValueError(
            f"model: layer {layer} ({type(module).__name__}) does not look its attention up in transformers' "
            "AttentionInterface, so nothing can be captured beside it"
        )
    if implementation != "eager":
        return registry, implementation
    if not hasattr(modeling, _EAGER):
        raise ValueError(
            f"model: {modeling.__name__} has no {_EAGER}; use attn_implementation='sdpa' for layer {layer}"
        )
    return modeling, _EAGER


def is_causal(module: nn.Module) -> bool:
    """Whether the rows of an attention module see what is before them alone. Known in: 5.12 to 5.24."""
    return bool(getattr(module, "is_causal", True))


def dropout_of(module: nn.Module) -> float:
    """The share of numbers that a module drops at random while it trains. Known in: 5.12 to 5.24."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return max(
        [value for name, value in module.__dict__.items() if "drop" in name and isinstance(value, float)] or [0.0]
    )


def own_entry(place: Any, name: str) -> Attention | None:
    """What this place has of its own under a name; None where the global entry serves. Known in: 5.12 to 5.24."""
    if isinstance(place, type(sys)):
        entry: Attention | None = getattr(place, name)
        return entry
    try:
        own: Attention | None = place._local_mapping.get(name)
    except AttributeError as error:
        raise changed(f"its registry of attention functions is another one ({error})") from error
    return own


def set_entry(place: Any, name: str, entry: Attention | None) -> None:
    """Put an attention function there, or take this place's own away. Known in: 5.12 to 5.24."""
    if isinstance(place, type(sys)):
        setattr(place, name, entry)
    elif entry is None:
        del place[name]
    else:
        place[name] = entry


def is_builtin(entry: str) -> bool:
    """Whether the name of an entry is one of transformers' own attention functions. Known in: 5.12 to 5.24."""
    return entry in (_EAGER, "sdpa", "flex_attention") or entry.startswith("flash_attention_")


def attention_in(layer: nn.Module) -> nn.Module | None:
    """The self-attention of a layer, by the name of its class; None where it has none. Known in: 5.12 to 5.24."""
    modules = (module for name, module in layer.named_modules() if name)
    return next((module for module in modules if _ATTENTION.match(type(module).__name__)), None)


# Models and their configurations
def wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper: torch.compile, DDP, DataParallel, PEFT. Known in: torch 2.10 to 2.14, PEFT 0.21."""
    return next((child for name in _WRAPPED if (child := module._modules.get(name)) is not None), None)


def inner_decoder(model: Any) -> Any:
    """One step from a model to its text decoder; the module itself where there is none further in.

    Known in: 5.12 to 5.24. Llama 4's stops one level early, at a model whose own `model` has the layers.
    """
    inner = model.get_decoder()
    if inner is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        return model.model
    return inner


def layers_in(decoder: Any) -> nn.ModuleList | None:
    """The layers of a text decoder; None where this is none. Known in: 5.12 to 5.24."""
    found = getattr(decoder, "layers", None)
    return found if isinstance(found, nn.ModuleList) else None


def key_value_size(config: Any) -> int:
    """How many numbers the keys and values of one token have in a layer. Known in: 5.12 to 5.24."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * size)


def types_of_layers(config: Any) -> list[str] | None:
    """What each layer does, where the configuration says so. Known in: 5.12 to 5.24."""
    types = getattr(config, "layer_types", None)
    return None if types is None else list(types)


def is_recurrent(layer_type: str) -> bool:
    """Whether layers of a type have no softmax attention. Known in: 5.12 to 5.24."""
    return layer_type in _RECURRENT


def windows(config: Any) -> list[int | None] | None:
    """How far back each layer sees; None where the layers say so themselves. Known in: 5.12 to 5.24."""
    types = types_of_layers(config)
    if types is None:
        return None
    return [config.sliding_window if each == "sliding_attention" else None for each in types]


def tree_obstacle(model: Any, config: Any) -> str | None:
    """What a model's class or its text config says against decoding as a tree, or None. Known in: 5.12 to 5.24."""
    others = sorted({each for each in types_of_layers(config) or () if each not in _SEEING})
    if others:
        return f"it has layers of type {', '.join(others)}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers use the keys of others"
    if getattr(config, "use_bidirectional_attention", None):
        return "its layers see what comes later"
    if hasattr(type(model), "create_masks_for_generate"):
        return f"{type(model).__name__} makes masks of its own, under which a picture may be seen both ways"
    return "it is an encoder and a decoder" if has_encoder(model) else None


def has_encoder(model: Any) -> bool:
    """Whether a model's text decoder attends to the prompt through an encoder. Known in: 5.12 to 5.24."""
    return bool(model.config.is_encoder_decoder)


def cross_attention_in(decoder: nn.Module) -> str | None:
    """The first module of a text decoder that attends to something else than its prompt. Known in: 5.12 to 5.24."""
    for name, module in decoder.named_modules():
        if _CROSS_CLASS.search(type(module).__name__) or _CROSS_NAME.fullmatch(name):
            return f"{name} ({type(module).__name__})"
    layers = getattr(getattr(decoder, "config", None), "cross_attention_layers", None)
    return f"layer {layers[0]}" if layers else None


def rotations(config: Any) -> set[str]:
    """The kinds of rotation in use; some configurations have one for each type of layer.

    Known in: `rope_parameters` since 5.0, `rope_scaling` in remote code.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [value for value in given.values() if isinstance(value, Mapping)]
    return {str(each.get("rope_type", each.get("type", "default"))) for each in by_layer or [given]}


def image_id(config: Any) -> int | None:
    """The id of the image token; LLaVA and kin call it an index. Known in: 5.12 to 5.24."""
    return next((found for name in _IMAGE_IDS if (found := getattr(config, name, None)) is not None), None)


def visual_ids(config: Any) -> list[int]:
    """The ids of image and video tokens, ascending. Known in: 5.12 to 5.24."""
    return sorted({found for name in (*_IMAGE_IDS, *_VIDEO_IDS) if (found := getattr(config, name, None)) is not None})


def position_notes(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """What modules have noted of the last prompt's positions, as Qwen-VL's do. Known in: 5.12 to 5.24."""
    return [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]


def noted_positions(modules: Iterable[nn.Module]) -> list[Any]:
    """What these modules have noted of the last prompt's positions. Known in: 5.12 to 5.24."""
    return [module.rope_deltas for module in modules]


def set_position_notes(notes: list[tuple[nn.Module, Any]]) -> None:
    """Put back what `position_notes` found."""
    for module, noted in notes:
        module.rope_deltas = noted


# Images
def is_text(name: str) -> bool:
    """Whether an entry of a processor's output is about the text. Known in: 5.12 to 5.24."""
    return name in _TEXT


def tower_results(model: Any, entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run the vision tower over a processor's entries; what the forward takes in place of them.

    None where the forward takes no such thing, as in 5.12 and 5.17. Known in: 5.20 to 5.24.
    """
    if _TOWER not in signature_of(model).parameters:
        return None
    encode = model.base_model.get_image_features
    known = inspect.signature(encode).parameters
    given = {name: value for name, value in entries.items() if name in known}
    output = encode(**given, return_dict=True)
    read = {name: value for name, value in output.items() if name not in _UNREAD}
    return {_TOWER: {"image": type(output)(**read)}}


# generate
class Prepared(NamedTuple):
    """What `generate` would decode with: positions of the prompt or None, logits processors, stopping criteria."""

    positions: torch.Tensor | None
    processors: Any
    criteria: Any


def prepared_by_generate(model: Any, inputs: Mapping[str, Any], criteria: Any) -> Prepared:
    """Ask `generate` what it would decode a prompt with; no forward runs. Known in: 5.12 to 5.24."""
    asked: dict[str, Any] = {}

    def take(_model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        asked.update(prepared)
        return input_ids

    model.generate(**inputs, stopping_criteria=criteria, custom_generate=take)
    missing = [name for name in _DECISIONS if asked.get(name) is None]
    if missing:
        raise changed(f"generate hands over no {' and no '.join(missing)} to a decoding function of one's own")
    return Prepared(asked.get("position_ids"), *(asked[name] for name in _DECISIONS))


def prompt_of(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The prompt among the arguments of `generate`, as ids or as embeddings. Known in: 5.12 to 5.24."""
    return next((found for name in _PROMPTS if isinstance(found := given.get(name), torch.Tensor)), None)


def beside_generate(given: Mapping[str, Any]) -> str | None:
    """The first argument of `generate` that may call the model by itself, or None. Known in: 5.12 to 5.24."""
    return next((name for name in _BESIDE if given.get(name)), None)


def has_own_generate(model: Any) -> bool:
    """Whether a model generates in another way than transformers' own. Known in: 5.12 to 5.24."""
    if not isinstance(model, GenerationMixin):
        return hasattr(model, "generate")
    kind = type(model)
    own = [name for name in _STEPS if not getattr(kind, name).__module__.startswith("transformers.")]
    replaced = [name for name in ("generate", *_STEPS) if name in model.__dict__]
    return kind.generate is not GenerationMixin.generate or bool(own or replaced)


def logits_of(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """What a forward takes to give some rows' logits alone; nothing where it gives all. Known in: 5.12 to 5.24."""
    return {"logits_to_keep": rows} if "logits_to_keep" in signature_of(model).parameters else {}


def compiled_in_place(model: nn.Module) -> Any:
    """What `model.compile()` put in the place of a model's call, or None. Known in: torch 2.10 to 2.14."""
    return model._compiled_call_impl


def compiled_calls(model: nn.Module, around: Callable[[Attention], Attention]) -> Iterator[tuple[str, Attention]]:
    """The compiled calls of a model, which skip its hooks: the attribute of each, and it with `around` about it.

    Known in: `get_compiled_call` 5.12 to 5.24, the other torch 2.10 to 2.14.
    """
    if hasattr(model, "get_compiled_call"):
        compiled: Any = model.get_compiled_call
        yield "get_compiled_call", lambda *args, **kwargs: around(compiled(*args, **kwargs))
    if (in_place := compiled_in_place(model)) is not None:
        yield "_compiled_call_impl", around(in_place)


# PEFT
def has_virtual_tokens(module: Any) -> bool:
    """Whether a module's adapters put tokens of their own before a prompt. Known in: PEFT 0.21."""
    return any(getattr(peft, "is_prompt_learning", False) for peft in getattr(module, "peft_config", {}).values())


def adapter_obstacle(module: Any) -> str | None:
    """What a module's adapters say against decoding as a tree, or None. Known in: PEFT 0.21."""
    if has_virtual_tokens(module):
        return "its adapter puts tokens of its own before a prompt"
    for peft in getattr(module, "peft_config", {}).values():
        if getattr(peft, "alora_invocation_tokens", None):
            return "its adapter begins in the middle of a prompt"
        kind = str(getattr(getattr(peft, "peft_type", None), "value", "of no type"))
        if kind not in _ADAPTERS:
            return f"its adapter is {kind}, which may look at more than one token"
    return None


def adapter_states(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which adapters are active in which modules, how strong, and whether they are off. Known in: PEFT 0.21."""
    return [
        (
            *(name, str(module.__dict__.get("_active_adapter")), str(module.__dict__.get("scaling"))),
            bool(module.__dict__.get("_disable_adapters")),
        )
        for name, module in model.named_modules()
        if "_active_adapter" in module.__dict__
    ]
