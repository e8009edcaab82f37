"""What a model is made of, on which devices it runs, and which code of other packages runs in its forward.

The names of accelerate, bitsandbytes and torchao, and torch's private names of hooks, are spelled here.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from carve_kernels.hf import names

# Hooks of these only read or compute weights, or record outputs.
_HARMLESS = ("carve_kernels.", "transformers.utils.output_capturing", "transformers.modeling_utils", "torch.nn.utils.")
_ACCELERATE = "accelerate.hooks"
# Modules of these process each token by itself, except those of _QUANTIZED.
_TOKEN_BY_TOKEN = ("torch", "transformers", "peft")
_QUANTIZED = ("torch.ao.", "transformers.integrations.")
_QUANTIZERS = ("auto_round", "bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "optimum", "torchao")
# Packages, Python's own included, whose functions and objects are known not to mix tokens.
_KNOWN = {"carve_kernels", "accelerate", "kernels", *_TOKEN_BY_TOKEN, *_QUANTIZERS, *sys.stdlib_module_names}
# The methods through which torch calls a module's forward.
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
# The files in which transformers' modules look up the functions that they call.
_FILES = ("transformers.models.", "transformers.activations", "transformers.modeling_layers")
# Layers of bitsandbytes that dequantise their weights and then multiply as usual.
_WEIGHT_ONLY_LAYERS = ("Linear4bit", "LinearFP4", "LinearNF4")
# Weights of bitsandbytes and torchao, with the attribute that says how activations are quantised (None: never).
_WEIGHT_ONLY_TENSORS = {
    "Params4bit": None,
    "Int4PlainInt32Tensor": None,
    "Int4TilePackedTo4dTensor": None,
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
}
_PLAIN = (torch.Tensor, nn.Parameter)
# The dimension of a mesh of processes over which tensor parallelism divides weights.
_TENSOR_PARALLEL = "tp"
_MIXERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def wrapped_models(model: nn.Module) -> list[nn.Module]:
    """A model and the models inside it, down to the transformers model."""
    chain = [model]
    # A transformers model has children with the wrappers' names too, so stop at the first one.
    while not isinstance(chain[-1], PreTrainedModel):
        inner = names.inner_module(chain[-1]) if isinstance(chain[-1], nn.Module) else None
        if inner is None:
            raise TypeError(f"model: expected a transformers model or a wrapper of one, got {type(model).__name__}")
        chain.append(inner)
    return chain


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile, DDP and PEFT wrappers. Raises TypeError if there is none."""
    return wrapped_models(model)[-1]  # type: ignore[return-value]


def text_backbone(model: nn.Module) -> PreTrainedModel:
    """The text decoder: the module whose `layers` process the tokens. Raises TypeError if the model has none."""
    decoder = unwrap(names.inner_decoder(unwrap(model)))
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        inner = unwrap(names.inner_decoder(decoder))
        if inner is decoder:
            crossing = names.cross_attention_in(unwrap(model))
            why = "" if crossing is None else f", whose {crossing} uses cross-attention, which cannot be captured"
            raise TypeError(f"model: found no text decoder with `layers` in {type(unwrap(model)).__name__}{why}")
        decoder = inner
    return decoder


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the text decoder, first to last."""
    layers: nn.ModuleList = text_backbone(model).layers  # type: ignore[assignment]
    return layers


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of each text layer that has softmax attention, by the layer's number."""
    types = names.types_of_layers(getattr(text_backbone(model), "config", None))
    modules = {
        number: names.attention_in(layer)
        for number, layer in enumerate(decoder_layers(model))
        if types is None or types[number] not in names.RECURRENT
    }
    return {number: attention for number, attention in modules.items() if attention is not None}


def layer_window(model: nn.Module, layer: int) -> bool | None:
    """Whether old tokens leave the view of a text layer, by a window or chunks; None if not only positions decide."""
    config: Any = text_backbone(model).config
    types = names.types_of_layers(config)
    if types is None or layer >= len(types):
        return getattr(config, "sliding_window", None) is not None
    return {"full_attention": False, "sliding_attention": True, "chunked_attention": True}.get(types[layer])


def makes_own_masks(model: Any) -> bool:
    """Whether a model makes the masks of its prompts itself: they may be bidirectional over an image."""
    return hasattr(type(model), "create_masks_for_generate")


def masks_by_type(mask: Any) -> dict[Any, Any]:
    """The mask argument of a text model by the type of its layers that attend; None stands for all of them."""
    return (
        {each: mask[each] for each in mask if each not in names.RECURRENT} if isinstance(mask, dict) else {None: mask}
    )


def windows_by_type(config: Any) -> dict[Any, int | None]:
    """The window of each type of layers that attend; None for all layers, if these have the same."""
    found = dict(zip(names.types_of_layers(config) or (), names.windows(config) or (), strict=True))
    return found if found else {None: getattr(config, "sliding_window", None)}


def check_decoder(model: nn.Module) -> None:
    """Raises TypeError unless the model generates by self-attention over the columns of its prompt."""
    inner = unwrap(model)
    kind = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise TypeError(
            f"model: expected a decoder-only model, got {kind}, an encoder-decoder model, whose decoder does not "
            "attend to the prompt by self-attention"
        )
    crossing = names.cross_attention_in(text_backbone(model))
    if crossing is not None:
        raise TypeError(
            f"model: expected a decoder with self-attention over image tokens, got {kind}, whose {crossing} uses "
            "cross-attention to the image, which cannot be captured; use a model with image tokens in the prompt"
        )
    if any(names.has_virtual_tokens(each) for each in wrapped_models(model)):
        raise TypeError(
            "model: expected a model whose prompt is its input_ids, got one with an adapter that prepends virtual "
            "tokens (prompt learning); pass the model without it, or use LoRA"
        )


def check_steady(model: nn.Module) -> None:
    """Raises ValueError for a model with active dropout, whose results are not reproducible."""
    for name, module in unwrap(model).named_modules():
        if not module.training:
            continue
        # Dropout modules have `p`; attention modules have a rate of dropout among their attributes.
        rates = [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else max(rates, default=0.0)
        if rate:
            raise ValueError(
                f"model: expected a deterministic model, got one in training mode with dropout of {rate:.0%} in "
                f"{name}; call model.eval()"
            )


def devices_of(module: nn.Module) -> set[torch.device]:
    """The devices on which a module runs: where accelerate moves its weights, else where they are, if not on meta."""
    weights = ((each, weight) for each in module.modules() for weight in each.parameters(recurse=False))
    devices = {execution_device(each) or weight.device for each, weight in weights}
    return {device for device in devices if device.type != "meta"}


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first floating-point parameter; None without one."""
    return next((each.dtype for each in module.parameters() if each.is_floating_point()), None)


def input_device(model: nn.Module) -> torch.device:
    """The device of a model's inputs: where its embedding runs. Raises ValueError for a model without weights."""
    inner = unwrap(model)
    for module in (inner.get_input_embeddings(), inner):
        devices = devices_of(module)
        if devices:
            return min(devices, key=str)
    raise ValueError(
        f"model: expected weights on a device, got {type(inner).__name__} on the meta device without a hook of "
        "accelerate that loads them; load its weights"
    )


def image_token_positions(model: nn.Module, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """The columns of the image and video tokens in each row of input_ids [B, S], int32 [n], ascending.

    Raises ValueError if the config names no image token.
    """
    config = unwrap(model).config
    ids = names.visual_ids(config)
    if not ids:
        raise ValueError(f"model: the config of model_type {config.model_type!r} names no image token; pass tokens=")
    marks = torch.tensor(ids, device=input_ids.device)
    return [row.nonzero().flatten().to(torch.int32) for row in torch.isin(input_ids, marks)]


def foreign_code(model: nn.Module) -> str | None:
    """The first code of an unknown package that runs in a model's forward, for a message, or None."""
    hook = _foreign_hook(torch_hooks._global_forward_hooks, torch_hooks._global_forward_pre_hooks, " on all modules")
    if hook is not None:
        return f"{hook}, runs in it"
    by_class: dict[type[nn.Module], str | None] = {}
    for name, module in _modules(model):
        if type(module) not in by_class:
            by_class[type(module)] = _replaced_methods(type(module))
        reason = _on_module(module) or by_class[type(module)]
        if reason is not None:
            return f"{name} {reason}"
    return _replaced_functions({each for kind in by_class for each in kind.__mro__})


def _unknown_packages(code: Any) -> str:
    """The packages of a callable that are not known to process tokens separately, for a message; "" if none."""
    return " and ".join(sorted({_path(each).split(".")[0] for each in _callables_in(code)} - _KNOWN))


def token_mixer(model: nn.Module, decoder: nn.Module, recurrent: Collection[int] = ()) -> str | None:
    """The first module outside of attention that may mix tokens, for a message, or None.

    `recurrent` are the ids of the modules that are known to.
    """
    decoding = {id(module) for module in decoder.modules()}.difference(recurrent)
    training = None
    for name, module in _modules(model):
        kind, path = type(module), _forward_owner(type(module)).__module__
        if is_mixer(module) and id(module) in decoding:
            return f"{name} in its text decoder, {kind.__name__}, mixes tokens"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return f"{name} normalises over the whole batch"
        known = kind.__name__ in _WEIGHT_ONLY_LAYERS and path.startswith("bitsandbytes.")
        if not known and (path.startswith(_QUANTIZED) or path.split(".")[0] not in _TOKEN_BY_TOKEN):
            return f"{name}, {kind.__name__} of {path}, may scale a token by other tokens"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not _is_weight_only(tensor):
                return f"the weights of {name}, {type(tensor).__name__}, may scale a token by other tokens"
        training = training or (name if module.training else None)
    return None if training is None else f"{training} is in training mode"


def is_mixer(module: nn.Module) -> bool:
    """Whether a module of torch mixes neighbouring tokens."""
    return isinstance(module, _MIXERS)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a module whose weights it offloads, or None."""
    for hook in _hooks_of_accelerate(module):
        name = getattr(hook, "execution_device", None)
        device = torch.device("meta" if name is None else name)
        if device.type not in ("meta", "cpu") and device.index is None:
            index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0
            return torch.device(device.type, index)
        if device.type != "meta":
            return device
    return None


def tensor_parallel_group(module: nn.Module) -> Any:
    """The group of processes among which tensor parallelism divides the weights of a module, or None.

    Known in: transformers 5.12, a mesh at each divided module; 5.24, weights that are DTensors on a mesh named "tp".
    """
    for each in module.modules():
        mesh = each.__dict__.get("_hf_device_mesh")
        if mesh is not None and mesh.ndim == 1:
            return mesh.get_group()
        meshes = [mesh, *(weight.device_mesh for weight in each.parameters(False) if hasattr(weight, "device_mesh"))]
        # FSDP divides weights over meshes as well, but gathers them before a forward.
        for mesh in meshes:
            if mesh is not None and _TENSOR_PARALLEL in (mesh.mesh_dim_names or ()):
                return mesh.get_group(_TENSOR_PARALLEL)
    return None


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is sharded over processes, by torch, FSDP or DeepSpeed."""
    return type(tensor).__name__ in ("DTensor", "FlatParameter") or hasattr(tensor, "ds_id")


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that process tokens, with a name for a message; parametrizations only compute weights."""
    parametrizations = (each for each in model.modules() if isinstance(each, ParametrizationList))
    inside = {id(inner) for each in parametrizations for inner in each.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            yield (f"its module {name!r}" if name else "the model itself"), module


def _foreign_hook(hooks: Mapping[int, Any], pre_hooks: Mapping[int, Any], where: str = "") -> str | None:
    """The first hook of an unknown package, for a message, or None."""
    for kind, group in (("forward hook", hooks), ("forward pre-hook", pre_hooks)):
        for hook in group.values():
            if not all(_path(each).startswith(_HARMLESS) for each in _callables_in(hook)):
                return f"a {kind}{where}, {_qualified_name(hook)}"
    return None


def _on_module(module: nn.Module) -> str | None:
    hook = _foreign_hook(module._forward_hooks, module._forward_pre_hooks)
    if hook is not None:
        return f"has {hook}"
    if "forward" in module.__dict__ and not _is_accelerate_forward(module):
        return f"has a replaced forward, {_qualified_name(module.__dict__['forward'])}"
    for key, value in module.__dict__.items():
        if callable(value) and (packages := _unknown_packages(value)):
            return f"holds code of {packages}, {key!r}"
    return None


def _replaced_methods(kind: type[nn.Module]) -> str | None:
    """The first method between a call and the forward of a class that an unknown package replaced."""
    for method in _CALLS:
        if packages := _unknown_packages(inspect.getattr_static(kind, method)):
            return f"runs a {method} of {packages}, {kind.__name__}"
    owner = _forward_owner(kind)
    paths = (owner.__module__, *map(_path, _callables_in(owner.__dict__["forward"])))
    owners = {path.split(".")[0] for path in paths}
    known = owners <= {"carve_kernels", *_TOKEN_BY_TOKEN, *_QUANTIZERS}
    return None if known else f"runs a forward of {' and '.join(sorted(owners))}, {kind.__name__}"


def _replaced_functions(kinds: set[type]) -> str | None:
    """The first method of transformers' classes, or function that they call, that an unknown package replaced."""
    todo = [(f"torch.nn.functional.{name}", code) for name, code in vars(nn.functional).items() if callable(code)]
    for kind in kinds:
        if kind.__module__.startswith(_FILES):
            members = ((name, member) for name, member in vars(kind).items() if name != "__init__")
            todo += [(f"{kind.__name__}.{name}", each) for name, each in members if hasattr(each, "__get__")]
    visited: set[int] = set()
    while todo:
        where, code = todo.pop()
        for each in _callables_in(code):
            if id(each) in visited:
                continue
            visited.add(id(each))
            path = _path(each)
            if path.split(".")[0] not in _KNOWN:
                return f"{where} was replaced by code of {path}"
            if isinstance(each, types.FunctionType) and path.startswith(_FILES):
                todo += [(f"{path}.{name}", called) for name, called in _called_by(each)]
    return None


def _called_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The functions that a function may call by a global name, transformers' attention functions included."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        for name in code.co_names:
            called = function.__globals__.get(name)
            if callable(called):
                yield name, called
            elif isinstance(called, Mapping):
                # A session in another thread may add or remove entries meanwhile.
                entries = ((key, called.get(key)) for key in called if names.is_builtin(str(key)))
                yield from ((f"{name}[{key!r}]", entry) for key, entry in entries if callable(entry))


def _callables_in(code: Any) -> Iterator[Any]:
    """The callables inside a callable: bound functions, itself, and what it wraps."""
    if isinstance(code, (functools.partial, functools.partialmethod)):
        for each in (code.func, *code.args, *code.keywords.values()):
            if callable(each):
                yield from _callables_in(each)
    elif isinstance(code, (types.MethodType, staticmethod, classmethod)):
        yield from _callables_in(code.__func__)
    elif isinstance(code, functools.cached_property):
        yield from _callables_in(code.func)
    elif isinstance(code, property):
        yield from _callables_in(code.fget)
    else:
        yield code
        inner = getattr(code, "__dict__", {}).get("__wrapped__")
        if inner is not None:
            yield from _callables_in(inner)


def _path(code: Any) -> str:
    """The module in which a callable was defined; its `__module__` may be that of the function it wraps."""
    if isinstance(code, types.FunctionType):
        return str(code.__globals__.get("__name__", code.__module__))
    if isinstance(code, types.BuiltinFunctionType):
        return code.__module__ or _path(code.__self__)
    return str((code if isinstance(code, type) else type(code)).__module__)


def _qualified_name(code: Any) -> str:
    each = next(_callables_in(code))
    return f"{_path(each)}.{getattr(each, '__qualname__', type(each).__name__)}"


def _hooks_of_accelerate(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _is_accelerate_forward(module: nn.Module) -> bool:
    """Whether a module's forward was replaced by accelerate, only to move weights and inputs."""
    forward, before = module.__dict__["forward"], module.__dict__.get("_old_forward")
    hooks = _hooks_of_accelerate(module)
    return (
        isinstance(forward, functools.partial)
        and _path(forward.func) == _ACCELERATE
        and bool(hooks)
        and all(type(hook).__module__ == _ACCELERATE for hook in hooks)
        and getattr(before, "__func__", None) is type(module).forward
    )


def _forward_owner(kind: type[nn.Module]) -> type:
    return next(each for each in kind.__mro__ if "forward" in each.__dict__)


def _is_weight_only(tensor: torch.Tensor) -> bool:
    """Whether a product with a weight treats each row separately: plain, or quantised in a known weight-only way."""
    kind = type(tensor)
    if kind in _PLAIN:
        return not tensor.is_quantized
    if kind.__name__ not in _WEIGHT_ONLY_TENSORS or not kind.__module__.startswith(("bitsandbytes.", "torchao.")):
        return False
    attribute = _WEIGHT_ONLY_TENSORS[kind.__name__]
    # A missing attribute is not the same as None.
    return attribute is None or getattr(tensor, attribute, attribute) is None


def version_of(value: Any) -> int | None:
    """How often a tensor was written to; None where that is not counted, and for other values."""
    if torch.compiler.is_compiling() or not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def is_capturing(device: torch.device) -> bool:
    """Whether operators on a device go into a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
