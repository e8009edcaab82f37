"""What other code puts on a model: hooks, forwards in place of a class's own, quantised weights, parked weights.

Each name of accelerate, bitsandbytes and torchao, and what is private in torch about hooks, stands here.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.nn.utils.parametrize import ParametrizationList

from carve_kernels.hf import names

# They read or compute weights, or note outputs that somebody asked for.
_HARMLESS = ("carve_kernels.", "transformers.utils.output_capturing", "transformers.modeling_utils", "torch.nn.utils.")
_ACCELERATE = "accelerate.hooks"
# Their modules compute each token by itself, but for those of _QUANTIZED.
_TOKEN_BY_TOKEN = ("torch", "transformers", "peft")
_QUANTIZED = ("torch.ao.", "transformers.integrations.")
_QUANTIZERS = ("auto_round", "bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "optimum", "torchao")
# Of these a function or an object beside the modules is known, and Python's own.
_KNOWN = {"carve_kernels", "accelerate", "kernels", *_TOKEN_BY_TOKEN, *_QUANTIZERS, *sys.stdlib_module_names}
# By these torch gets from a call of a module to its forward.
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
# What transformers' modules call by name, they call by a name of one of these files.
_FILES = ("transformers.models.", "transformers.activations", "transformers.modeling_layers")
# Of bitsandbytes: the layers that turn weights back into numbers of their own, and then multiply as usual.
_WEIGHT_ONLY_LAYERS = ("Linear4bit", "LinearFP4", "LinearNF4")
# Of bitsandbytes and torchao, and what each says of the tensors that it is multiplied with: None leaves them alone.
_WEIGHT_ONLY_TENSORS = {
    "Params4bit": None,
    "Int4PlainInt32Tensor": None,
    "Int4TilePackedTo4dTensor": None,
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
}
_PLAIN = (torch.Tensor, nn.Parameter)
_MIXERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def code_on(model: nn.Module) -> str | None:
    """The first code of somebody else's that runs inside a model's forward, for a message, or None."""
    for kind, hooks in (
        ("forward hook", torch_hooks._global_forward_hooks),
        ("forward pre-hook", torch_hooks._global_forward_pre_hooks),
    ):
        for hook in hooks.values():
            if not _is_harmless(hook):
                return f"a {kind} on all modules, {_named(hook)}, runs in it"
    on_classes: dict[type[nn.Module], str | None] = {}
    for name, module in _modules(model):
        if type(module) not in on_classes:
            on_classes[type(module)] = _in_place_of_methods(type(module))
        found = _on_module(module) or on_classes[type(module)]
        if found is not None:
            return f"{name} {found}"
    return _in_place_of_functions({each for kind in on_classes for each in kind.__mro__})


def strangers(code: Any) -> set[str]:
    """The packages of a callable that are none of those that are known to leave tokens apart."""
    return {_path(part).split(".")[0] for part in _parts(code)} - _KNOWN


def mixer(model: nn.Module, decoder: nn.Module) -> str | None:
    """The first module whose result for a token may depend on the tokens beside it, for a message, or None.

    How its attention looks at others is known (row.py); this is about all the rest.
    """
    decoding = {id(module) for module in decoder.modules()}
    training = None
    for name, module in _modules(model):
        kind, path = type(module), _forward_owner(type(module)).__module__
        if isinstance(module, _MIXERS) and id(module) in decoding:
            return f"{name} in its text decoder, {kind.__name__}, mixes tokens"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return f"{name} normalises over all that it is given"
        known = kind.__name__ in _WEIGHT_ONLY_LAYERS and path.startswith("bitsandbytes.")
        if not known and (path.startswith(_QUANTIZED) or path.split(".")[0] not in _TOKEN_BY_TOKEN):
            return f"{name}, {kind.__name__} of {path}, may scale a token by those beside it"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not _is_weight_only(tensor):
                return f"the weights of {name}, {type(tensor).__name__}, may scale a token by those beside it"
        training = training or (name if module.training else None)
    return None if training is None else f"{training} is in training mode"


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it parks elsewhere; None where it says nothing of this one."""
    for hook in _hooks_of_accelerate(module):
        told = getattr(hook, "execution_device", None)
        device = None if told is None else torch.device(told)
        if device is not None and device.type != "meta":
            return device if device.index is not None or device.type == "cpu" else torch.device(device.type, _current())
    return None


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor has parts of it in other processes: those of torch, of FSDP and of DeepSpeed."""
    return type(tensor).__name__ in ("DTensor", "FlatParameter") or hasattr(tensor, "ds_id")


def _current() -> int:
    return torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that tokens pass through, with a name for a message; parametrizations make weights alone."""
    inside = {id(part) for each in model.modules() if isinstance(each, ParametrizationList) for part in each.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            yield (f"its module {name!r}" if name else "the model itself"), module


def _on_module(module: nn.Module) -> str | None:
    for kind, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            if not _is_harmless(hook):
                return f"has a {kind}, {_named(hook)}"
    if "forward" in module.__dict__ and not _is_moved_by_accelerate(module):
        return f"has a forward put in place of its own, {_named(module.__dict__['forward'])}"
    for key, value in module.__dict__.items():
        if callable(value) and strangers(value):
            return f"holds code of {_listed(strangers(value))}, {key!r}"
    return None


def _in_place_of_methods(kind: type[nn.Module]) -> str | None:
    """The first way from a call to a forward's result that another package put on a class."""
    for method in _CALLS:
        packages = strangers(inspect.getattr_static(kind, method))
        if packages:
            return f"runs a {method} of {_listed(packages)}, {kind.__name__}"
    owner = _forward_owner(kind)
    packages = {path.split(".")[0] for path in (owner.__module__, *map(_path, _parts(owner.__dict__["forward"])))}
    known = packages <= {"carve_kernels", *_TOKEN_BY_TOKEN, *_QUANTIZERS}
    return None if known else f"runs a forward of {_listed(packages)}, {kind.__name__}"


def _in_place_of_functions(kinds: set[type]) -> str | None:
    """The first method of these classes of transformers that another package put there, or function that they call."""
    todo = [(f"torch.nn.functional.{name}", code) for name, code in vars(nn.functional).items() if callable(code)]
    for kind in kinds:
        if kind.__module__.startswith(_FILES):
            members = ((name, member) for name, member in vars(kind).items() if name != "__init__")
            todo += [(f"{kind.__name__}.{name}", each) for name, each in members if hasattr(each, "__get__")]
    seen: set[int] = set()
    while todo:
        where, code = todo.pop()
        for part in _parts(code):
            if id(part) in seen:
                continue
            seen.add(id(part))
            path = _path(part)
            if path.split(".")[0] not in _KNOWN:
                return f"{where} is one of {path}"
            if isinstance(part, types.FunctionType) and path.startswith(_FILES):
                todo += [(f"{path}.{name}", called) for name, called in _called(part)]
    return None


def _called(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function may call by names of its file, and of transformers' own attention functions by their names."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        for name in code.co_names:
            called = function.__globals__.get(name)
            if callable(called):
                yield name, called
            elif isinstance(called, Mapping):
                # A session in another thread may put an entry there meanwhile, or take one away.
                entries = ((key, called.get(key)) for key in called if names.is_builtin(str(key)))
                yield from ((f"{name}[{key!r}]", entry) for key, entry in entries if callable(entry))


def _parts(code: Any) -> Iterator[Any]:
    """What a callable runs, as far as it says: what it binds, itself, and what it wraps."""
    if isinstance(code, (functools.partial, functools.partialmethod)):
        for each in (code.func, *code.args, *code.keywords.values()):
            if callable(each):
                yield from _parts(each)
    elif isinstance(code, (types.MethodType, staticmethod, classmethod)):
        yield from _parts(code.__func__)
    elif isinstance(code, functools.cached_property):
        yield from _parts(code.func)
    elif isinstance(code, property):
        yield from _parts(code.fget)
    else:
        yield code
        inner = getattr(code, "__dict__", {}).get("__wrapped__")
        if inner is not None:
            yield from _parts(inner)


def _path(part: Any) -> str:
    """Where a part was written; its own `__module__` may be that of what it wraps."""
    if isinstance(part, types.FunctionType):
        return str(part.__globals__.get("__name__", part.__module__))
    if isinstance(part, types.BuiltinFunctionType):
        return part.__module__ or _path(part.__self__)
    return str((part if isinstance(part, type) else type(part)).__module__)


def _listed(packages: set[str]) -> str:
    return " and ".join(sorted(packages))


def _is_harmless(hook: Any) -> bool:
    return all(_path(part).startswith(_HARMLESS) for part in _parts(hook))


def _named(code: Any) -> str:
    part = next(_parts(code))
    return f"{_path(part)}.{getattr(part, '__qualname__', type(part).__name__)}"


def _hooks_of_accelerate(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _is_moved_by_accelerate(module: nn.Module) -> bool:
    """Whether the forward on a module is the one by which accelerate moves weights and inputs, around its own."""
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
    """Whether a product with a tensor treats each row by itself: plain, or quantised in a way that is known."""
    kind = type(tensor)
    if kind in _PLAIN:
        return not tensor.is_quantized
    if kind.__name__ not in _WEIGHT_ONLY_TENSORS or not kind.__module__.startswith(("bitsandbytes.", "torchao.")):
        return False
    says = _WEIGHT_ONLY_TENSORS[kind.__name__]
    # An attribute that is not there is not one that is not set.
    return says is None or getattr(tensor, says, says) is None
