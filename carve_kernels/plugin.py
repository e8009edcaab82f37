"""This package as a CarveBackend: what a frontend finds under the entry point `carve_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from carve_kernels import checks, extras, pipeline
from carve_kernels.arrays import as_tensor
from carve_kernels.backends import BACKENDS
from carve_kernels.ops.capture import capture
from carve_kernels.ops.contrast import contrast
from carve_kernels.ops.regions import regions
from carve_kernels.pipeline import CarveOutcome
from carve_kernels.presets import Preset
from carve_kernels.protocol import Array, CarveBackend
from carve_kernels.types import Box, Capture, Regions, Size, View

if TYPE_CHECKING:
    from carve_kernels.hf.engine.result import CarveResult


class KernelsBackend:
    """This package as a CarveBackend; `kernels` chooses the implementation of its kernels, as `backend` elsewhere."""

    name = "carve_kernels"
    version = 1

    def __init__(self, kernels: str = "auto") -> None:
        self.kernels: str = checks.choice("kernels", kernels, ("auto", *BACKENDS))

    def supports(self, model: Any) -> str | None:
        """Why a checkpoint (a directory, "small", an id) or a loaded model with its processor is refused, or None."""
        try:
            _check_supported(model)
        except (ImportError, OSError, TypeError, ValueError) as error:
            return str(error)
        return None

    def load(
        self, model: Any, *, preset: str | Preset | Mapping[str, Any] | None = None
    ) -> Callable[[Any, str], CarveResult]:
        """A CarveEngine of a checkpoint, or of a pair (model, processor) that is loaded already."""
        with extras.needed_by("load"):
            from carve_kernels.hf.engine import CarveEngine
            from carve_kernels.hf.loading import load
        _check_supported(model)
        return CarveEngine(*(model if isinstance(model, tuple) else load(model)), preset=preset, backend=self.kernels)

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
    ) -> Capture:
        query = as_tensor("query", query, floating=True)
        return capture(
            query,
            as_tensor("key", key, floating=True, like=query),
            as_tensor("tokens", tokens, like=query),
            scale=scale,
            mask=None if mask is None else as_tensor("mask", mask, like=query),
            positions=None if positions is None else as_tensor("positions", positions, like=query),
            softcap=softcap,
            window=window,
            sink=None if sink is None else as_tensor("sink", sink, floating=True, like=query),
            heads=heads,
            backend=self.kernels,
        )

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
    ) -> torch.Tensor | list[torch.Tensor]:
        task = as_tensor("task", task, floating=True)
        general = as_tensor("general", general, floating=True, like=task)
        return contrast(
            task, general, checks.plain(grid), checks.plain(size), lam=checks.plain(lam),
            layer_weights=checks.plain(layer_weights), step_weights=checks.plain(step_weights), normalize=normalize,
            backend=self.kernels,
        )  # fmt: skip

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
    ) -> Regions:
        saliency = as_tensor("saliency", saliency, floating=True)
        return regions(
            saliency, keep=keep, top=top, floor=floor, min_size=min_size, connectivity=connectivity, score=score,
            backend=self.kernels,
        )  # fmt: skip

    def carve(
        self,
        image: Any,
        task: Array,
        general: Array,
        *,
        grid: Size | View | Sequence[Size] | Sequence[View],
        preset: str | Preset | Mapping[str, Any] = "paper",
        box: Box | Sequence[Box] | None = None,
    ) -> CarveOutcome:
        task = as_tensor("task", task, floating=True)
        general = as_tensor("general", general, floating=True, like=task)
        return pipeline.carve(
            _image(image), task, general, grid=checks.plain(grid), preset=preset, box=checks.plain(box),
            backend=self.kernels,
        )  # fmt: skip


def _check_supported(model: Any) -> None:
    """Raise TypeError, ValueError or ImportError for what cannot be loaded, as far as is known without its weights."""
    with extras.needed_by("load"):
        from carve_kernels.hf.families import FAMILIES
        from carve_kernels.hf.layouts import check_processor
        from carve_kernels.hf.loading import check_checkpoint
        from carve_kernels.hf.model import check_decoder
    if isinstance(model, tuple):
        if len(model) != 2:
            raise TypeError(f"model: expected a checkpoint or a pair (model, processor), got {checks.describe(model)}")
        check_decoder(model[0])
        check_processor(*model)
        return
    _, family = check_checkpoint(model)
    listed = FAMILIES.get(family)
    if listed is not None and listed.reason is not None:
        raise ValueError(f"model: the image tokens of {family} have no place in the image: {listed.reason}")


def _image(image: Any) -> Any:
    """A PIL image of pixels, uint8 [H, W, 3] or [H, W]; anything else unchanged."""
    if not isinstance(image, (list, tuple)) and not hasattr(image, "__array__"):
        return image
    with extras.needed_by("carve"):
        from PIL import Image
    if isinstance(image, Image.Image):
        return image
    pixels = as_tensor("image", image)
    # A list has no dtype; its integers have to be bytes.
    if not hasattr(image, "dtype") and not pixels.is_floating_point() and bool(((pixels >= 0) & (pixels < 256)).all()):
        pixels = pixels.to(torch.uint8)
    if pixels.dtype != torch.uint8 or pixels.dim() not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"image: expected a PIL image or pixels, uint8 [H, W, 3] or [H, W], got {checks.describe(pixels)}"
        )
    return Image.fromarray(pixels.cpu().numpy())


backend: CarveBackend = KernelsBackend()
