"""AttentionMaps: the captured maps of a prompt and its decode steps, from the buffers of capture to a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from carve_kernels import checks, extras
from carve_kernels.atomic_write import refuse_foreign, write_whole
from carve_kernels.numerics import entropy
from carve_kernels.types import Capture, View, VisualLayout

UNCAPTURED = -1.0
"""The mass of a row before it is captured; a captured mass is never negative."""

# Maps with missing tokens have a tensor more, which earlier versions would not know of.
_FORMAT, _FORMAT_WITH_MISSING = "carve_kernels.AttentionMaps/1", "carve_kernels.AttentionMaps/2"
# The limit of safetensors.
_LONGEST_HEADER = 100_000_000
_TENSORS: dict[str, tuple[str, ...]] = {_FORMAT: ("values", "mass", "entropy", "valid", "tokens")}
_TENSORS[_FORMAT_WITH_MISSING] = (*_TENSORS[_FORMAT], "missing")


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Head-averaged attention of the captured rows to the visual tokens, at each step.

    =======  ==================  ===============  ================================================================
    name     dtype               shape            meaning
    =======  ==================  ===============  ================================================================
    values   float32             [B, L, T, R, N]  probabilities; zero where not valid, missing, and where is no token
    mass     float32             [B, L, T, R]     sum of the values over the tokens, those that are missing left out
    entropy  float32             [B, L, T, R]     H / ln N of the values renormalised over the tokens, 0 to 1; N counts
                                                  all tokens of a batch row, also those that are missing
    valid    bool                [B, L, T, R]     False: no map (row finished, a row of step 0 only, keys evicted)
    layers   int                 L                numbers of the captured layers
    steps    int                 T                forward passes: 0 is the prefill, t has the t-th new token as its row
    tokens   int32               [B, N]           columns of the visual tokens in the sequence, -1 is padding
    dtype    str                                  dtype that the model's attention ran in
    layout   VisualLayout, None                   grids and boxes of the tokens, where known
    missing  bool, None          [B, L, T, R, N]  True: a token that a valid row could not attend to, since it was
                                                  evicted from a sliding cache, is outside of the layer's window, hidden
                                                  by a mask or after the row; None: there are none
    =======  ==================  ===============  ================================================================

    A value of 0 says that a row did not look at a token only where `seen` is True: a missing token is not a dark one.
    """

    values: torch.Tensor
    mass: torch.Tensor
    entropy: torch.Tensor
    valid: torch.Tensor
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    tokens: torch.Tensor
    dtype: str
    layout: VisualLayout | None = None
    missing: torch.Tensor | None = None

    def __repr__(self) -> str:
        batch, _, steps, rows, tokens = self.values.shape
        return (
            f"AttentionMaps(batch={batch}, layers={list(self.layers)}, steps={steps}, rows={rows}, tokens={tokens}, "
            f"dtype={self.dtype!r}, layout={'known' if self.layout is not None else None}"
            f"{'' if self.missing is None else ', some tokens missing'})"
        )

    @property
    def seen(self) -> torch.Tensor:
        """Which tokens each row could attend to, bool [B, L, T, R, N]: False where there is none or no map."""
        seen = self.valid[..., None] & (self.tokens >= 0)[:, None, None, None]
        return seen if self.missing is None else seen & ~self.missing

    def whole(self, b: int = 0) -> torch.Tensor:
        """At which layers and steps batch row b has maps, and each of them of all its tokens: bool [L, T]."""
        valid = self.valid[b]
        there = valid.any(-1)
        return there if self.missing is None else there & ~(self.missing[b].any(-1) & valid).any(-1)

    def view(self, b: int = 0, i: int = 0) -> torch.Tensor:
        """Maps of view i of batch row b on its grid, [L, T, R, GH, GW]; `seen_in_view` has its missing tokens."""
        return self._in_view(self.values, b, i)

    def seen_in_view(self, b: int = 0, i: int = 0) -> torch.Tensor:
        """`seen` of view i of batch row b on its grid, bool [L, T, R, GH, GW]."""
        return self._in_view(self.seen, b, i)

    def _in_view(self, values: torch.Tensor, b: int, i: int) -> torch.Tensor:
        if self.layout is None:
            raise ValueError("layout: expected maps with a layout, got none; see layout_of and with_layout")
        checks.integer("b", b, low=0, high=len(self.layout.views) - 1)
        views = self.layout.views[b]
        checks.integer("i", i, low=0, high=len(views) - 1)
        return values[b][..., self.layout.spans(b)[i]].unflatten(-1, views[i].grid)

    def last_step(self, b: int = 0) -> int:
        """The last step at which batch row b has a map in any layer: t_end. `whole` says which layers see all of it."""
        steps = self.valid[b].any(-1).any(0).nonzero()
        if not len(steps):
            raise ValueError(
                f"maps: expected a step with maps for batch row {b}, got none; its rows see no visual token (are they "
                "before the image, or beyond a sliding window?)"
            )
        return int(steps[-1])

    def with_layout(self, layout: VisualLayout) -> AttentionMaps:
        """The same maps with a layout, whose tokens must be the captured ones."""
        if not torch.equal(layout.tokens(), self.tokens.cpu()):
            raise ValueError(
                f"layout: expected the {_counts(self.tokens)} captured tokens of each row, "
                f"got other positions ({_counts(layout.tokens())})"
            )
        return replace(self, layout=layout)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, in place of maps that were saved there before.

        Raises ValueError if the path is any other file.
        """
        target = checks.path("path", path)
        refuse_foreign("path", target, is_saved)
        write_whole(target, encode(self))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> AttentionMaps:
        """Read what `save` wrote."""
        source = checks.path("path", path)
        return decode(source.read_bytes(), os.fspath(source))[0]

    def _repr_png_(self) -> bytes | None:
        if self.layout is None or not self.layout.views[0]:
            return None
        last, seen = (each[:, self.last_step(0)].sum((0, 1)) for each in (self.view(0, 0), self.seen_in_view(0, 0)))
        grid = last / seen.clamp(min=1)
        factor = max(1, 448 // max(grid.shape))
        # An image needs Pillow, which maps do not.
        from carve_kernels.visualize import saliency_image

        image = saliency_image(grid)
        buffer = BytesIO()
        image.resize((image.width * factor, image.height * factor), 0).save(buffer, "PNG")
        return buffer.getvalue()


def new_buffers(shape: tuple[int, int, int, int], tokens: int, device: torch.device) -> Capture:
    """Buffers of captures, float32: maps [*shape, tokens], mass and entropy [*shape]."""
    return Capture(
        torch.zeros(*shape, tokens, dtype=torch.float32, device=device),
        torch.full(shape, UNCAPTURED, dtype=torch.float32, device=device),
        torch.zeros(shape, dtype=torch.float32, device=device),
    )


def average_rows(capture: Capture, weight: torch.Tensor, used: torch.Tensor) -> Capture:
    """Weighted means over the rows of maps [L, B, Q, N], by weight [B, R, Q]; UNCAPTURED rows stay so."""
    maps = weight @ capture.maps
    mass = torch.where((capture.mass == UNCAPTURED).any(-1, keepdim=True), UNCAPTURED, maps.sum(-1))
    return Capture(maps, mass, torch.stack([entropy(layer, used) for layer in maps]))


class Hidden(NamedTuple):
    """Tokens that captured rows could not attend to: `first` bool [L, B, Q, N], `later` [T - 1, L, B, N] or None."""

    first: torch.Tensor
    later: torch.Tensor | None


def assemble(
    first: Capture,
    later: Capture | None,
    running: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    layers: tuple[int, ...],
    tokens: torch.Tensor,
    dtype: str,
    layout: VisualLayout | None,
    hidden: Hidden | None = None,
) -> AttentionMaps:
    """The maps of a prompt and its decode steps, copied out of the buffers.

    =======  =======  ================  ====================================================================
    name     dtype    shape             meaning
    =======  =======  ================  ====================================================================
    first    float32  [L, B, Q, N]      maps of the prefill; mass and entropy without N
    later    float32  [T - 1, L, B, N]  maps of the decode steps, one row each; None if there are none
    running  bool     [B, T]            False from the step on whose token would follow the end token
    weight   float32  [B, R, Q]         means over the rows of the prefill; None where R = Q
    tokens   int      [B, N]            columns of the visual tokens, -1 is padding
    hidden   bool                       tokens that rows could not attend to; None if there are none
    =======  =======  ================  ====================================================================

    Raises RuntimeError if a layer was not captured in a step before the last one.
    """
    used, steps = tokens >= 0, running.shape[1]
    if weight is not None:
        first = average_rows(first, weight.to(used.device), used)
    _, batch, rows = first.mass.shape
    maps = new_buffers((batch, len(layers), steps, rows), tokens.shape[1], used.device)
    valid = torch.zeros(maps.mass.shape, dtype=torch.bool, device=used.device)
    for target, part in zip(maps, first, strict=True):
        target[:, :, 0] = part.transpose(0, 1)
    valid[:, :, 0] = True
    if later is not None:
        for target, part in zip(maps, later, strict=True):
            target[:, :, 1:, -1] = part.movedim((0, 1, 2), (2, 1, 0))
        valid[:, :, 1:, -1] = True
    uncaptured = ((maps.mass == UNCAPTURED) & valid).any(-1).any(0)
    # A last step that was interrupted is dropped.
    complete = steps - int(steps > 1 and bool(uncaptured[:, -1].any()))
    if bool(uncaptured[:, :complete].any()):
        numbers = [layer for layer, gone in zip(layers, uncaptured[:, :complete].any(-1), strict=True) if gone]
        raise RuntimeError(
            f"layers: nothing was captured in layers {numbers}; their attention was not called in the captured "
            "forward (was the implementation switched inside the session?)"
        )
    # Where all tokens lie outside of a row's window the mass is exactly 0: there is no map, rather than a black one.
    valid &= running[:, None, :, None] & (maps.mass != 0)
    end = int(running[:, :complete].any(0).nonzero()[-1]) + 1
    for part in maps:
        part[~valid] = 0.0
    values, mass, spread = (part[:, :, :end] for part in maps)
    missing = None if hidden is None else _missing(hidden, weight, used, valid[:, :, :end])
    return AttentionMaps(
        values, mass, spread, valid[:, :, :end], layers, tuple(range(end)), tokens.clone(), dtype, layout, missing
    )


def _missing(
    hidden: Hidden, weight: torch.Tensor | None, used: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor | None:
    """The hidden ones among the tokens of valid rows, bool [B, L, T, R, N]; None if there are none.

    A mean over rows lacks the tokens that any of them lacks.
    """
    first, later = hidden
    if weight is not None:
        first = (weight != 0).to(used.device, torch.float32) @ first.float() > 0
    missing = torch.zeros(*valid.shape, used.shape[1], dtype=torch.bool, device=used.device)
    missing[:, :, 0] = first.transpose(0, 1)
    if later is not None:
        missing[:, :, 1:, -1] = later.movedim((0, 1, 2), (2, 1, 0))[:, :, : valid.shape[2] - 1]
    missing &= valid[..., None] & used[:, None, None, None]
    return missing if bool(missing.any()) else None


def encode(maps: AttentionMaps, **facts: str) -> bytes:
    """Maps as the bytes of a safetensors file with a checksum and more `facts` in its metadata."""
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        with extras.needed_by("AttentionMaps.save"):
            raise
    written = _FORMAT if maps.missing is None else _FORMAT_WITH_MISSING
    header = {
        "format": written,
        "layers": list(maps.layers),
        "steps": list(maps.steps),
        "dtype": maps.dtype,
        "layout": None if maps.layout is None else _layout_to_json(maps.layout),
    }
    kept = {name: getattr(maps, name) for name in _TENSORS[written]}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
    text = json.dumps(header)
    return save(tensors, metadata={**facts, "carve": text, "checksum": _sha256(text, tensors)})


def decode(data: bytes, name: str) -> tuple[AttentionMaps, dict[str, str]]:
    """The maps and all metadata of a file from `encode`, in new memory; `name` is for errors.

    Raises ValueError for another file or a damaged one.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ModuleNotFoundError:
        with extras.needed_by("AttentionMaps.load"):
            raise
    try:
        tensors = load(data)
        facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {name!r} ({error})") from error
    text = facts.get("carve", "{}")
    header = json.loads(text)
    expected = _TENSORS.get(str(header.get("format"))) if isinstance(header, dict) else None
    if expected is None or set(tensors) != set(expected):
        raise ValueError(f"path: expected maps written by AttentionMaps.save, got {name!r}")
    if facts.get("checksum") != _sha256(text, tensors):
        raise ValueError(
            f"path: {name!r} is damaged: the checksum of its numbers is not the one that was written with them"
        )
    layout = None if header["layout"] is None else _layout_from_json(header["layout"], tensors["tokens"])
    maps = AttentionMaps(
        **tensors, layers=tuple(header["layers"]), steps=tuple(header["steps"]), dtype=header["dtype"], layout=layout
    )
    return maps, facts


def is_saved(path: Path) -> bool:
    """Whether a file begins like one from `AttentionMaps.save`; its numbers may be damaged."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            facts = json.loads(file.read(size)).get("__metadata__", {}) if size < _LONGEST_HEADER else {}
            return bool(json.loads(facts["carve"])["format"] in _TENSORS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _sha256(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in filter(tensors.__contains__, _TENSORS[_FORMAT_WITH_MISSING]):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _counts(tokens: torch.Tensor) -> list[int]:
    return [int(count) for count in (tokens >= 0).sum(-1)]


def _layout_to_json(layout: VisualLayout) -> dict[str, Any]:
    fields = ("grid", "box", "image", "frame", "kind", "seconds")
    views = [[{name: getattr(view, name) for name in fields} for view in row] for row in layout.views]
    sizes = [[list(size) for size in row] for row in layout.sizes]
    return {"sizes": sizes, "views": views, "measured": layout.measured}


def _layout_from_json(data: dict[str, Any], tokens: torch.Tensor) -> VisualLayout:
    rows = []
    for row, entries in enumerate(data["views"]):
        views, start = [], 0
        for entry in entries:
            height, width = entry["grid"]
            end = start + height * width
            # Files of earlier versions have no seconds.
            spans = {name: tuple(span) for name in ("frame", "seconds") if (span := entry.get(name)) is not None}
            box, image, kind = tuple(entry["box"]), entry["image"], entry["kind"]
            views.append(View(tokens[row, start:end], (height, width), box, image, kind=kind, **spans))
            start = end
        rows.append(tuple(views))
    sizes = tuple(tuple((size[0], size[1]) for size in row) for row in data["sizes"])
    return VisualLayout(tuple(rows), sizes, data.get("measured", False))
