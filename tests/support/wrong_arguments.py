"""Calls with one wrong argument after another: each must be refused by the name that was typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from carve_kernels.checks import BackendUnavailable


class Thing:
    """An object of a kind that nothing knows."""


def values() -> list[Any]:
    """Wrong values of every kind; some are right for some arguments, which `accepts` of `refusals` says."""
    nan = float("nan")
    return [
        None, True, 3, -1, 0, 1.5, nan, float("inf"), 10**400, 1j, "x", "", b"x", "\ud800", Path("x\0"),
        [], [1], [1, "x"], [[1.0, 2.0], [3.0]], [None], (), (1, 2), (nan, nan), (-3, -4), {}, {"a": 1}, {1, 2},
        range(3), iter([1]), Thing(), Thing, len,
        numpy.zeros(3), numpy.zeros((2, 2)), numpy.full((2, 2), nan), numpy.array([[Thing()]]), numpy.float32(2),
        numpy.int64(3), torch.zeros(3), torch.zeros(2, 2), torch.tensor(5), torch.zeros(0), torch.zeros(1, 2, 3, 4, 5),
        Image.new("F", (3, 2)),
    ]  # fmt: skip


def is_number(value: Any) -> bool:
    plain: Any = value
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(plain) < 2**63)


def is_integer(value: Any) -> bool:
    return is_number(value) and isinstance(value, Integral)


def is_limit(value: Any) -> bool:
    """A largest number, which may be beyond 64 bits."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def at_least(low: float, kind: Callable[[Any], bool] = is_number) -> Callable[[Any], bool]:
    """Accepts numbers from `low` on."""
    return lambda value: kind(value) and value >= low


def never(_value: Any) -> bool:
    return False


def nothing(value: Any) -> bool:
    """Accepts None."""
    return value is None


def one_of(*options: Any) -> Callable[[Any], bool]:
    """Accepts None, tuples and other plain values that are equal to one of these."""
    return lambda value: any(type(value) is type(option) and value == option for option in options)


def either(*accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(accept(value) for accept in accepts)


def optional(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def refusals(
    call: Callable[..., Any],
    right: Mapping[str, Any],
    accepts: Mapping[str, Callable[[Any], bool]],
    *,
    more: Mapping[str, Iterable[Any]] | None = None,
    leaves: Iterable[str] = (),
) -> list[str]:
    """A line for each wrong value of each argument that is not refused, or not by its name.

    `right` has arguments that are accepted, `accepts` says of an argument which values are (by default, none), `more`
    has wrong values of its own. Arguments that `leaves` names are not tried.
    """
    call(**right)
    lines = []
    for name in right:
        if name in leaves:
            continue
        is_right = accepts.get(name, never)
        for value in [*values(), *(more or {}).get(name, ())]:
            if is_right(value):
                continue
            what = f"{name}={_short(value)}"
            try:
                call(**{**right, name: value})
            except (TypeError, ValueError, BackendUnavailable) as error:
                if not names(str(error), name):
                    lines.append(f"{what}: expected an error that begins with {name}, got {error!r}")
            except Exception as error:
                lines.append(f"{what}: expected a TypeError or a ValueError, got {error!r}")
            else:
                lines.append(f"{what}: expected an error, got a result")
    return lines


def names(message: str, name: str) -> bool:
    """Whether a message begins with this argument: alone, an item or an attribute of it, or beside others."""
    leading = re.match(r"[\w\[\]., =']+?: ", message)
    return leading is not None and name in re.split(r"[\[\].,= ']+", leading[0][:-2])


def _short(value: Any) -> str:
    return "10**400" if isinstance(value, int) and abs(value) > 1e300 else repr(value)[:60]
