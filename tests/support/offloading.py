"""Weights that stand elsewhere until their module runs, as accelerate parks them: its names, its shape, none of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tests.support.families import as_written_in


class AlignDevicesHook:
    """Holds the weights of a module, and brings them for the length of its forward."""

    def __init__(self, execution_device: Any) -> None:
        self.execution_device = execution_device
        self.weights: dict[str, nn.Parameter] = {}

    def park(self, module: nn.Module) -> None:
        for name, weight in module._parameters.items():
            if weight is not None:
                self.weights.setdefault(name, weight)
                module._parameters[name] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)

    def bring(self, module: nn.Module) -> None:
        for name, weight in self.weights.items():
            module._parameters[name] = weight


def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    module._hf_hook.bring(module)
    try:
        return module._old_forward(*args, **kwargs)
    finally:
        module._hf_hook.park(module)


AlignDevicesHook.__module__ = "accelerate.hooks"
new_forward = as_written_in("accelerate.hooks", new_forward)


def park(model: nn.Module, which: Callable[[str], bool] = lambda name: True, device: Any = "cpu") -> None:
    """Park the weights of the modules that `which` chooses by their names; they run on a device all the same."""
    for name, module in model.named_modules():
        if which(name) and any(weight is not None for weight in module._parameters.values()):
            hook = module.__dict__["_hf_hook"] = AlignDevicesHook(device)
            module.__dict__["_old_forward"] = module.forward
            forward = functools.partial(new_forward, module)
            module.__dict__["forward"] = functools.update_wrapper(forward, module.forward)
            hook.park(module)
