"""Names that changed: the old one keeps working for two minor releases, and says what it is called now."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[_Function], _Function]:
    """Let a function take arguments by their old names as well: `renamed(directory="model")`."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{old}: expected {new} alone, which is its name now, got both")
                    warnings.warn(f"{old}: this argument is called {new} now", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(_Function, call)

    return decorate
