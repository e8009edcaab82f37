"""Offloaded weights, as accelerate does it, but without accelerate: only its names and its structure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

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
