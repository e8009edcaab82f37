"""What a frontend and a whole engine agree on, and how a frontend finds the engines that are installed.

A `CarveBackend` is a whole engine; the folder `backends` has implementations of the kernels of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch

from carve_kernels import checks
from carve_kernels.checks import BackendUnavailable
from carve_kernels.pipeline import CarveOutcome
from carve_kernels.presets import Preset
from carve_kernels.types import Box, Capture, Regions, Size

if TYPE_CHECKING:
    from carve_kernels.hf.engine.result import CarveResult

VERSION = 1
"""The version of the protocol: another one may have other methods, arguments or results."""

GROUP = "carve.backends"
"""The group of the entry points of backends; each is a CarveBackend under its name."""

FRONTENDS = "carve.frontends"
"""The group of the entry points of frontends; each is a function of a CarveBackend."""

METHODS = ("supports", "load", "maps", "contrast", "regions", "carve")

Array = Any
"""A torch tensor, a NumPy array or a nested list of numbers."""

_Found = TypeVar("_Found")


@runtime_checkable
class CarveBackend(Protocol):
    """An engine that computes attention maps and CARVE for a frontend.

    =========  =========================================================================================================
    member     meaning
    =========  =========================================================================================================
    name       of the backend, the same as that of its entry point
    version    the version of the protocol that it was written for
    supports   why a model cannot be loaded here, or None if it can
    load       a model as a function: image, question -> CarveResult
    maps       attention of rows on the visual tokens, from queries and keys -> Capture, see `carve_kernels.capture`
    contrast   maps of a question and of a general instruction -> saliency, see `carve_kernels.contrast`
    regions    saliency -> Regions, see `carve_kernels.regions`
    carve      an image and its maps -> CarveOutcome, see `carve_kernels.carve`
    =========  =========================================================================================================

    Arrays are torch tensors, NumPy arrays or nested lists, and none is changed. Results hold tensors, on the device of
    the tensors that were passed. An argument of the wrong kind, shape or range is a TypeError or a ValueError that
    begins with the name of the argument; `carve_kernels.conformance.check` tries all of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def supports(self, model: Any) -> str | None: ...

    def load(
        self, model: Any, *, preset: str | Preset | Mapping[str, Any] | None = None
    ) -> Callable[[Any, str], CarveResult]: ...

    def maps(
        self,
        query: Array,
        key: Array,
        tokens: Array,
        *,
        scale: float,
        mask: Array | None = None,
        positions: Array | None = None,
        softcap: float | None = None,
        window: int | None = None,
        sink: Array | None = None,
        heads: Literal["mean", "each"] = "mean",
    ) -> Capture: ...

    def contrast(
        self,
        task: Array,
        general: Array,
        grid: Size | Sequence[Size],
        size: Size | Sequence[Size],
        *,
        lam: float | str = "mean",
        layer_weights: Array | None = None,
        step_weights: Array | None = None,
        normalize: str = "none",
    ) -> torch.Tensor | list[torch.Tensor]: ...

    def regions(
        self,
        saliency: Array,
        *,
        keep: float,
        top: int | None = None,
        floor: int | None = None,
        min_size: int | None = None,
        connectivity: int | None = None,
        score: str = "sum",
    ) -> Regions: ...

    def carve(
        self,
        image: Any,
        task: Array,
        general: Array,
        *,
        grid: Size | Sequence[Size],
        preset: str | Preset | Mapping[str, Any] = "paper",
        box: Box | Sequence[Box] | None = None,
    ) -> CarveOutcome: ...


class Installed(Mapping[str, _Found]):
    """What installed packages offer, by name; each is imported when it is read, so that a broken one breaks no other.

    Reading one raises KeyError for a name that is not installed, and BackendUnavailable for one that cannot serve.
    """

    def __init__(
        self, kind: str, entries: Iterable[metadata.EntryPoint], mismatch: Callable[[Any, str], str | None]
    ) -> None:
        self._kind, self._mismatch = kind, mismatch
        self._entries: dict[str, list[metadata.EntryPoint]] = {}
        for entry in entries:
            self._entries.setdefault(entry.name, []).append(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._kind}s: {', '.join(self) or 'none'})"

    def __getitem__(self, name: str) -> _Found:
        if name not in self._entries:
            raise KeyError(f"name: expected one of the installed {self._kind}s, {', '.join(self) or 'none'}")
        entry, *others = self._entries[name]
        if others:
            packages = " and ".join(sorted(map(_package, (entry, *others))))
            raise BackendUnavailable(f"{name}: {packages} each install a {self._kind} of this name; uninstall one")
        where = f"{name}: {entry.value} of {_package(entry)}"
        try:
            found = entry.load()
        except Exception as error:
            raise BackendUnavailable(f"{where} cannot be imported ({type(error).__name__}: {error})") from error
        reason = self._mismatch(found, name)
        if reason is not None:
            raise BackendUnavailable(f"{where} {reason}")
        return cast(_Found, found)

    def working(self) -> dict[str, _Found]:
        """Those that can be read, by name."""
        return {name: found for name, found in self._tried() if not isinstance(found, BackendUnavailable)}

    def broken(self) -> dict[str, str]:
        """Why the others cannot, by name."""
        return {name: str(found) for name, found in self._tried() if isinstance(found, BackendUnavailable)}

    def _tried(self) -> Iterator[tuple[str, _Found | BackendUnavailable]]:
        for name in self:
            try:
                yield name, self[name]
            except BackendUnavailable as error:
                yield name, error


def discover() -> Installed[CarveBackend]:
    """The installed backends by name: the entry points of the group `carve.backends`.

    Nothing is imported until one is read, `discover()["toy"]`. Reading one raises BackendUnavailable if it fails to
    import, is written for another version of the protocol, lacks a member, has another name than its entry point, or
    shares that with one of another package.
    """
    return Installed("backend", metadata.entry_points(group=GROUP), mismatch)


def discover_frontends() -> Installed[Callable[[CarveBackend], Any]]:
    """The installed frontends by name: the entry points of the group `carve.frontends`, functions of a backend."""
    return Installed(
        "frontend",
        metadata.entry_points(group=FRONTENDS),
        lambda found, _name: None if callable(found) else f"is no function of a backend, got {checks.describe(found)}",
    )


def mismatch(backend: Any, name: str | None = None) -> str | None:
    """Why an object is no CarveBackend of this version (and this name), or None."""
    version = getattr(backend, "version", None)
    if isinstance(version, bool) or not isinstance(version, int):
        return f"is not a CarveBackend: expected a version of the protocol, an integer, got {checks.describe(version)}"
    if version != VERSION:
        older = "the backend" if version < VERSION else "carve-kernels"
        return f"is for version {version} of the protocol, expected {VERSION}; install a newer release of {older}"
    missing = [method for method in METHODS if not callable(getattr(backend, method, None))]
    if missing:
        return f"is not a CarveBackend: it lacks {', '.join(missing)}"
    if isinstance(backend, type):
        return "is a class, expected an instance of it"
    own = getattr(backend, "name", None)
    if not isinstance(own, str) or not own:
        return f"is not a CarveBackend: expected a name, got {checks.describe(own)}"
    return f"calls itself {own!r}, expected the name of its entry point" if name not in (None, own) else None


def _package(entry: metadata.EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
