"""Weights that are offloaded or on several devices, as accelerate does it: only its names and its structure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from tests.support.families import as_written_in


class AlignDevicesHook:
    """Holds the weights of a module, and loads them for the duration of its forward."""

    def __init__(self, execution_device: Any) -> None:
        self.execution_device = execution_device
        self.weights: dict[str, nn.Parameter] = {}

    def offload(self, module: nn.Module) -> None:
        for name, weight in module._parameters.items():
            if weight is not None:
                self.weights.setdefault(name, weight)
                module._parameters[name] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)

    def load(self, module: nn.Module) -> None:
        for name, weight in self.weights.items():
            module._parameters[name] = weight


def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    module._hf_hook.load(module)
    try:
        return module._old_forward(*args, **kwargs)
    finally:
        module._hf_hook.offload(module)


AlignDevicesHook.__module__ = "accelerate.hooks"
new_forward = as_written_in("accelerate.hooks", new_forward)


def offload(model: nn.Module, which: Callable[[str], bool] = lambda name: True, device: Any = "cpu") -> None:
    """Offload the weights of the modules whose names `which` accepts; they still run on a device."""
    for name, module in model.named_modules():
        if which(name) and any(weight is not None for weight in module._parameters.values()):
            hook = module.__dict__["_hf_hook"] = AlignDevicesHook(device)
            module.__dict__["_old_forward"] = module.forward
            forward = functools.partial(new_forward, module)
            module.__dict__["forward"] = functools.update_wrapper(forward, module.forward)
            hook.offload(module)


class MovingHook(AlignDevicesHook):
    """Moves the inputs of a module to the device of its weights; a cache moves nothing."""

    def load(self, module: nn.Module) -> None:
        pass

    def offload(self, module: nn.Module) -> None:
        pass

    def inputs(self, values: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.execution_device), values)


def moving_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module._old_forward(*module._hf_hook.inputs(args), **module._hf_hook.inputs(kwargs))


MovingHook.__module__ = "accelerate.hooks"
MovingHook.__qualname__ = "AlignDevicesHook"
moving_forward = as_written_in("accelerate.hooks", moving_forward)


def dispatch(module: nn.Module, device: torch.device) -> None:
    """Put the weights of a module on a device, to which its inputs are moved."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                each._parameters[name] = nn.Parameter(weight.data.to(device), requires_grad=False)
        for name, value in each._buffers.items():
            if value is not None:
                each._buffers[name] = value.to(device)
    module.__dict__["_hf_hook"], module.__dict__["_old_forward"] = MovingHook(device), module.forward
    module.__dict__["forward"] = functools.update_wrapper(functools.partial(moving_forward, module), module.forward)
