"""The user's own function as an opponent: `--opponent package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.support.answers import WrongAnswer


class BadOpponent(ValueError):
    """`--opponent` names no function."""


class OpponentFailed(WrongAnswer):
    """The user's function raised an error, or returned something else than an answer."""


class UserOpponent(NamedTuple):
    """The user's function under the name that the user typed."""

    path: str
    function: Callable[..., Any]
    second: str = "maps"

    @property
    def name(self) -> str:
        return f"--opponent {self.path}"

    def __call__(self, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Its answer: new tokens [T], and what `second` names, which the caller compares with ours."""
        try:
            answer = self.function(*args, **options)
        except (Exception, SystemExit) as error:
            raise OpponentFailed(f"{self.name}: raised {type(error).__name__}: {error}") from error
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise OpponentFailed(f"{self.name}: expected (ids, {self.second}), got {type(answer).__name__}")
        try:
            ids, maps = (torch.as_tensor(part) for part in answer)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OpponentFailed(f"{self.name}: expected (ids, {self.second}) of numbers: {error}") from error
        if ids.ndim != 1 or ids.is_floating_point() or not maps.is_floating_point():
            raise OpponentFailed(
                f"{self.name}: expected ids [T] of integers and floating-point {self.second}, got "
                f"{ids.dtype} {tuple(ids.shape)} and {maps.dtype} {tuple(maps.shape)}"
            )
        return ids.detach(), maps.detach()


def find(path: str, second: str = "maps") -> UserOpponent:
    """The function of `package.module:function`; `python -m` finds modules in the current folder first."""
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise BadOpponent(f"--opponent: expected package.module:function, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise BadOpponent(f"--opponent: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise BadOpponent(f"--opponent: expected a function {function_name} in {module_name}, got {function!r}")
    return UserOpponent(path, function, second)
