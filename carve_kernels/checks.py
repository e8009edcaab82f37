"""Checks of arguments at the public edge: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy
import torch

# One letter in front of a colon is a drive of Windows.
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class BackendUnavailable(RuntimeError):
    """A room was asked for by name and cannot serve; the message says why and how to mend it."""


class UpstreamChanged(RuntimeError):
    """The installed transformers works in another way than the tested ones; the message names both versions.

    `what` is the part of it that says in which way.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


def describe(value: Any) -> str:
    """A value in an error message: tensors by dtype and shape, the rest by type and a short repr."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    try:
        text = repr(value)
    except ValueError:
        # Python does not print integers of thousands of digits.
        text = "too long to print"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def plain(value: Any) -> Any:
    """Arrays, tensors and their numbers as lists and numbers of Python; anything else as it is."""
    return value.tolist() if isinstance(value, (numpy.ndarray, numpy.generic, torch.Tensor)) else value


def tensor(
    name: str, value: Any, *, shape: tuple[int | str | None, ...], dtypes: Collection[torch.dtype]
) -> torch.Tensor:
    """Check a tensor: `shape` holds sizes, or letters for sizes that are free."""
    # A loop, and what fits first: these checks stand before every call, and any() over a generator takes three times
    # as long.
    fits = isinstance(value, torch.Tensor) and len(value.shape) == len(shape)
    if fits:
        for want, got in zip(shape, value.shape):  # noqa: B905  (as long as each other; `strict` costs a tenth more)
            if type(want) is int and want != got:
                fits = False
        if fits and value.dtype in dtypes:
            return value
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if not fits:
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise ValueError(f"{name}: expected shape {wanted}, got {describe(value)}")
    names = ", ".join(sorted(str(dtype) for dtype in dtypes))
    raise TypeError(f"{name}: expected dtype {names}, got {describe(value)}")


def device(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Check that a tensor is on the device of the query."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as the query, got one on {value.device}")


def number(name: str, value: Any, *, low: float | None = None, high: float | None = None) -> float:
    """Check a finite real number, ends included."""
    # Abstract classes are slow to ask, so the common type goes first.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = float("inf")
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected a finite number, got {describe(value)}")
    if (low is not None and result < low) or (high is not None and result > high):
        raise ValueError(f"{name}: expected a number {_range(low, high)}, got {describe(value)}")
    return result


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """Check a whole number, ends included."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    result = int(value)
    if (low is not None and result < low) or (high is not None and result > high):
        raise ValueError(f"{name}: expected an integer {_range(low, high)}, got {describe(value)}")
    return result


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """Check that a value is one of a few."""
    for option in allowed:
        if type(value) is type(option) and value == option:
            return value
    options = ", ".join(repr(option) for option in allowed)
    expected = f"one of {options}" if len(allowed) > 1 else options
    raise ValueError(f"{name}: expected {expected}, got {describe(value)}")


def text(name: str, value: Any) -> str:
    """Check a string that says something, in characters that can be written as UTF-8."""
    return writable(name, filled(name, value))


def filled(name: str, value: Any) -> str:
    """Check a string that is not blank; of a path, whose bytes may be no UTF-8, no more can be asked."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {describe(value)}")
    if not value.strip():
        raise ValueError(f"{name}: expected a string with at least one visible character, got {describe(value)}")
    return value


def writable(name: str, value: str) -> str:
    """Check a string without halves of characters (lone surrogates), which no tokenizer and no file takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name}: expected characters that can be written, got {describe(value)}")
    return value


def path(name: str, value: Any) -> Path:
    """Check the path of a file or a folder; a `~` in front is the user's own folder, as in a shell."""
    given = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(given, str):
        raise TypeError(f"{name}: expected a path, got {describe(value)}")
    # An empty one would be the folder in which the process runs.
    filled(name, given)
    if "\0" in given:
        raise ValueError(f"{name}: expected a path, got {describe(given)}, which holds a null character")
    if _URL.match(given):
        shown = given if len(given) <= 80 else f"{given[:77]}..."
        raise ValueError(f"{name}: expected a path, {shown} is a URL, and nothing is fetched")
    return Path(os.path.expanduser(given))


def size(name: str, value: Any) -> tuple[int, int]:
    """Check a (height, width) pair of positive whole numbers."""
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (height, width), got {describe(value)}")
    return integer(f"{name}[0]", value[0], low=1), integer(f"{name}[1]", value[1], low=1)


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"of at least {low}"
    if low is None:
        return f"of at most {high}"
    return f"from {low} to {high}"
