"""Names that changed: the old one works for two more minor releases, with a warning that says the new one."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

MODULES = {
    "extension": "backends.native.extension",
    "files": "atomic_write",
    "hf.backbone": "hf.model",
    "hf.batch": "hf.engine.batching",
    "hf.checkpoint": "hf.loading",
    "hf.contract": "hf.session.contract",
    "hf.evidence": "hf.profile.scores",
    "hf.identity": "hf.engine.fingerprint",
    "hf.letterbox": "hf.layouts.letterbox",
    "hf.memory": "hf.engine.cache",
    "hf.pictures": "hf.inputs",
    "hf.prompts": "hf.inputs",
    "hf.record": "hf.session.recording",
    "hf.requests": "hf.engine.passes",
    "hf.row_maps": "hf.profile.candidate_maps",
    "hf.rows": "hf.query_rows",
    "picture": "visualize",
    "region_buffers": "backends.native.region_buffers",
    "roofline": "selfcheck.roofline",
    "schemas": "backends.native.schemas",
    "work": "selfcheck.work",
}
"""Modules that moved, by their old path in the package."""


def renamed(**names: str) -> Callable[[_Function], _Function]:
    """A decorator that accepts arguments by their old names too: `renamed(directory="model")`."""

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


def renamed_attribute(old: str, new: str) -> property:
    """A property that reads an attribute by its old name: `size = renamed_attribute("size", "shape")`."""

    def get(instance: Any) -> Any:
        _warn(f"{type(instance).__name__}.{old}", new)
        return getattr(instance, new)

    return property(get)


def moved_names(module: str, **names: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module for names that moved: `moved_names(__name__, Capture="carve_kernels.types")`."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{names[name]}.{name}")
        return getattr(importlib.import_module(names[name]), name)

    return find


def with_old_keys(values: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """A record that has values under their old keys too: `with_old_keys(facts, directory="model")`."""
    return {**values, **{old: values[new] for old, new in names.items()}}


def moved_module(path: str) -> ModuleSpec | None:
    """How to import a module by its old path; None for a path that has not moved."""
    package, _, old = path.partition(".")
    return ModuleSpec(path, _MovedModule(f"{package}.{MODULES[old]}")) if old in MODULES else None


class _MovedModule(Loader):
    """Puts the module from its new path into sys.modules under the old one too."""

    def __init__(self, path: str) -> None:
        self._path = path

    def exec_module(self, module: ModuleType) -> None:
        _warn(module.__name__, self._path)
        # The import system then returns this entry, not the empty module that it created.
        sys.modules[module.__name__] = importlib.import_module(self._path)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=3)
