"""Checks of the arguments of public functions: an error names the argument, what was expected and what was passed."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch

_Number = TypeVar("_Number", int, float)

# One letter before a colon is a drive of Windows.
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class BackendUnavailable(RuntimeError):
    """A backend was requested by name and cannot serve; the message says why and how to fix it."""


class UpstreamChanged(RuntimeError):
    """The installed transformers does not work as the tested versions do; the message names both.

    `what` is the part of the message that describes the difference.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


def describe(value: Any) -> str:
    """A value in an error message: tensors and arrays by dtype and shape, the rest by type and a short repr."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    if isinstance(value, numpy.ndarray):
        return f"a NumPy array of {value.dtype} and shape {list(value.shape)}"
    try:
        text = repr(value)
    except ValueError:
        # Python does not print integers with thousands of digits.
        text = "too long to print"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def plain(value: Any) -> Any:
    """Arrays, tensors and their numbers as Python lists and numbers; anything else unchanged."""
    return value.tolist() if isinstance(value, (numpy.ndarray, numpy.generic, torch.Tensor)) else value


def tensor(
    name: str, value: Any, *, shape: tuple[int | str | None, ...], dtypes: Collection[torch.dtype]
) -> torch.Tensor:
    """Check a tensor: `shape` holds sizes, or letters for sizes that are free."""
    # A loop, and the common case first: every call pays for these checks, and any() over a generator takes three times
    # as long.
    fits = isinstance(value, torch.Tensor) and len(value.shape) == len(shape)
    if fits:
        for want, got in zip(shape, value.shape):  # noqa: B905  (of equal length; `strict` costs a tenth more)
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
    # `isinstance` is slow for abstract classes, so the common type comes first.
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
    if not -(2**63) <= result < 2**63:
        # No operator and no file takes it.
        raise ValueError(f"{name}: expected an integer of at most 64 bits, got {describe(value)}")
    return result


def limit(name: str, value: Any) -> int:
    """Check a largest number of at least 1; one beyond 64 bits is no limit."""
    beyond = isinstance(value, Integral) and int(value) >= 2**63
    return 2**63 - 1 if beyond else integer(name, value, low=1)


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """Check that a value is one of a few."""
    for option in allowed:
        if type(value) is type(option) and value == option:
            return value
    options = ", ".join(repr(option) for option in allowed)
    expected = f"one of {options}" if len(allowed) > 1 else options
    raise ValueError(f"{name}: expected {expected}, got {describe(value)}")


def function(name: str, value: Any) -> None:
    """Check a function that may be left out."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {describe(value)}")


def flag(name: str, value: Any) -> bool | None:
    """Check a choice between True, False and None, which leaves it to the callee."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}: expected True, False or None, got {describe(value)}")
    return value


def layers(query: Any, key: Any, sink: Any) -> None:
    """Check lists of tensors with an entry a layer; there may be no sinks."""
    for name, given in (("query", query), ("key", key), ("sink", sink)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors, one for each layer, got {describe(given)}")
    if not query or len(query) != len(key) or len(sink) not in (0, len(query)):
        raise ValueError(
            f"query, key, sink: expected one entry a layer, got {len(query)}, {len(key)} and {len(sink)} of them"
        )


def text(name: str, value: Any) -> str:
    """Check a string that is not blank and can be encoded as UTF-8."""
    return writable(name, filled(name, value))


def filled(name: str, value: Any) -> str:
    """Check a string that is not blank; a path, whose bytes may not be UTF-8, is checked for no more."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {describe(value)}")
    if not value.strip():
        raise ValueError(f"{name}: expected a string with at least one visible character, got {describe(value)}")
    return value


def writable(name: str, value: str) -> str:
    """Check a string without lone surrogates, which no tokenizer and no file accepts."""
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name}: expected characters that can be written, got {describe(value)}")
    return value


def path(name: str, value: Any) -> Path:
    """Check the path of a file or a folder; a leading `~` is the user's home folder, as in a shell."""
    given = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(given, str):
        raise TypeError(f"{name}: expected a path, got {describe(value)}")
    # An empty path would be the current folder of the process.
    filled(name, given)
    if "\0" in given:
        raise ValueError(f"{name}: expected a path, got {describe(given)}, which holds a null character")
    try:
        os.fsencode(given)
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        advice = "" if encoding == "utf-8" else "; set a UTF-8 locale, or PYTHONUTF8=1"
        raise ValueError(
            f"{name}: expected a path in {encoding}, the encoding of this system's locale, got "
            f"{describe(given)}{advice}"
        ) from error
    if _URL.match(given):
        short = given if len(given) <= 80 else f"{given[:77]}..."
        raise ValueError(f"{name}: expected a path, {short} is a URL, and nothing is fetched")
    return Path(os.path.expanduser(given))


def size(name: str, value: Any) -> tuple[int, int]:
    """Check a (height, width) pair of positive whole numbers."""
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (height, width), got {describe(value)}")
    return integer(f"{name}[0]", value[0], low=1), integer(f"{name}[1]", value[1], low=1)


def numbers(
    name: str, value: Any, meanings: tuple[str, ...], check: Callable[[str, Any], _Number]
) -> tuple[_Number, ...]:
    """Check a tuple or list of numbers, each with a meaning; `check` is `number` or `integer`."""
    if not isinstance(value, (tuple, list)) or len(value) != len(meanings):
        kind = "integers" if check is integer else "numbers"
        raise TypeError(f"{name}: expected {len(meanings)} {kind} ({', '.join(meanings)}), got {describe(value)}")
    return tuple(check(f"{name}[{index}]", each) for index, each in enumerate(value))


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"of at least {low}"
    if low is None:
        return f"of at most {high}"
    return f"from {low} to {high}"


def is_many(value: Any) -> bool:
    """Whether this is a list or an ordered iterable of values; arrays and open files are not."""
    single = (str, os.PathLike, bytes, bytearray, memoryview, Mapping, Set)
    is_single = isinstance(value, single) or hasattr(value, "shape") or hasattr(value, "read")
    return isinstance(value, Iterable) and not is_single
