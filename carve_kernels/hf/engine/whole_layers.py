"""Which captured layers a question is read from: those that see the whole image at the steps that are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset


@dataclass(frozen=True)
class WholeLayers:
    """The maps of a question and of the general instruction, up to their last steps, in the layers that are read.

    ========  =======  ==========  ======================================================================
    name      dtype    shape       meaning
    ========  =======  ==========  ======================================================================
    task      float32  [L, T1, N]  means over the rows that each step has
    general   float32  [L, T2, N]  the same for the general instruction
    layers    int      L           numbers of these layers
    left_out  int                  numbers of the captured layers that are past their windows
    weights   float    L           the preset's layer weights, or None
    ========  =======  ==========  ======================================================================
    """

    task: torch.Tensor
    general: torch.Tensor
    layers: tuple[int, ...]
    left_out: tuple[int, ...]
    weights: tuple[float, ...] | None


def whole_layers(task: AttentionMaps, general: AttentionMaps, preset: Preset) -> WholeLayers:
    """The layers in which both prompts see every token of batch row 0 at the steps that the preset reads.

    The others would show a part of the image as dark that they cannot see. `layer_weights` are in the order of the
    captured layers. Raises ValueError if no layer is left.
    """
    spans = _steps(task, general, preset)
    whole = torch.stack(
        [maps.whole(0)[:, span].all(1).cpu() for maps, span in zip((task, general), spans, strict=True)]
    )
    kept = whole.all(0)
    layers, left_out = (
        tuple(layer for layer, is_kept in zip(task.layers, kept.tolist(), strict=True) if is_kept == wanted)
        for wanted in (True, False)
    )
    if not layers:
        raise ValueError(
            f"layers: expected a layer that sees the whole image at the steps that are read ({preset.steps}), got "
            f"{list(left_out)}, whose rows are past their windows or inside of the image; choose layers with full "
            "attention, rows after the image, or fewer new tokens"
        )
    weights = preset.layer_weights
    if weights is not None:
        weights = tuple(weight for weight, is_kept in zip(weights, kept.tolist(), strict=True) if is_kept)
    return WholeLayers(_by_step(task)[kept], _by_step(general)[kept], layers, left_out, weights)


def _steps(task: AttentionMaps, general: AttentionMaps, preset: Preset) -> tuple[slice, slice]:
    """The steps of each that are read, as `pair` pairs them."""
    counts = [maps.last_step(0) + 1 for maps in (task, general)]
    if preset.steps == "t_start":
        return slice(0, 1), slice(0, 1)
    if preset.steps == "t_end":
        return slice(counts[0] - 1, counts[0]), slice(counts[1] - 1, counts[1])
    common = min(*counts, len(preset.step_weights or range(max(counts))))
    return slice(0, common), slice(0, common)


def _by_step(maps: AttentionMaps) -> torch.Tensor:
    """The maps of batch row 0 as [L, T, N] up to its last step, the mean over the rows that each step has."""
    count = maps.last_step(0) + 1
    values, valid = maps.values[0, :, :count], maps.valid[0, :, :count]
    return (values.sum(2) / valid.sum(2).clamp(min=1).unsqueeze(-1)).cpu()
