"""One look at one picture gives the maps of every layer and of every choice of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image

from carve_kernels.hf.apart import generated
from carve_kernels.hf.backbone import attention_modules, unwrap
from carve_kernels.hf.evidence import Choice
from carve_kernels.hf.layouts import layout_of
from carve_kernels.hf.prompts import build_prompt, prepare
from carve_kernels.hf.rows import RowsSpec, check_rows, resolve_rows, template_suffix, tokenizer_of
from carve_kernels.hf.session import capture_attention
from carve_kernels.presets import Preset
from carve_kernels.types import View

# So many last words of the user's text are candidates one by one: what is asked for stands near the end.
LAST_WORDS = 4


class Seen(NamedTuple):
    """Maps [L, T, N] by rows, NaN where a layer has none, and the views that the tokens lie in."""

    maps: dict[RowsSpec, torch.Tensor]
    views: tuple[View, ...]


class RowReader:
    """Looks for a text at a picture with all layers and all candidate rows captured in the same forwards."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        preset: Preset,
        rows: Sequence[RowsSpec] | None,
        steps: Sequence[str],
        backend: str,
    ) -> None:
        self._model, self._processor, self._preset, self._backend = model, processor, preset, backend
        self._tokenizer, self._template = tokenizer_of(processor), template_suffix(processor)
        # Candidates of ours that a prompt does not have are left out; those of a caller are an error.
        self._given = rows is not None
        # What a preset cannot say cannot be picked.
        candidates = [check_rows(row, self._tokenizer) for row in (self._candidates() if rows is None else rows)]
        self.rows: list[RowsSpec] = [replace(preset, rows=row).rows for row in candidates]  # type: ignore[arg-type]
        self.layers = tuple(sorted(attention_modules(model)))
        self.choices = [Choice(row, step) for row in self.rows for step in steps if step == "t_start" or row == "last"]
        if not self.choices:
            raise ValueError(f"rows: expected 'last' beside steps {list(steps)}, got {self.rows}")
        self._new_tokens = preset.max_new_tokens if set(steps) != {"t_start"} else 1

    def look(self, image: Image.Image, text: str, *, general: bool = False) -> Seen:
        """The maps of one prompt; for the general instruction a word's place is taken by the whole text."""
        prompt = build_prompt(self._processor, text + self._preset.suffix)
        device = unwrap(self._model).device
        inputs = prepare(self._processor, [image], prompt, device, self._preset.max_pixels)
        layout = layout_of(self._model, self._processor, inputs, [image])
        columns = self._columns(inputs["input_ids"].cpu(), layout.tokens(), general)
        first = min(int(group.min()) for group in columns.values())
        length = inputs["input_ids"].shape[1]
        with capture_attention(
            self._model,
            layers=self.layers,
            rows=length - first,
            tokens=layout,
            max_steps=self._new_tokens,
            backend=self._backend,
        ) as session:
            generated(self._model, inputs, self._new_tokens)
            maps = session.maps
        values = maps.values[0].masked_fill(~maps.valid[0, ..., None], torch.nan).cpu()
        end = maps.last_step(0) + 1
        found = {
            rows: values[:, :end, -1] if rows == "last" else values[:, :1, group - first].mean(2)
            for rows, group in columns.items()
        }
        return Seen(found, layout.views[0])

    def _columns(self, ids: torch.Tensor, tokens: torch.Tensor, general: bool) -> dict[RowsSpec, torch.Tensor]:
        """The columns of each candidate's rows; only rows behind the picture see it."""
        attended, after = torch.ones_like(ids, dtype=torch.bool), int(tokens.max())
        found: dict[RowsSpec, torch.Tensor] = {}
        for rows in self.rows:
            meant = "question" if general and isinstance(rows, tuple) and rows[0] == "word" else rows
            try:
                group = resolve_rows(meant, ids, attended, tokens, self._tokenizer, self._template).columns[0]
                if int(group.min()) <= after:
                    raise ValueError(
                        f"rows: expected rows behind the picture, got {rows!r} in a prompt of {ids.numel()}"
                    )
            except ValueError:
                if self._given:
                    raise
                continue
            found[rows] = group
        if not found:
            raise ValueError(f"rows: expected rows behind the picture, the prompt has none of {self.rows}")
        return found

    def _candidates(self) -> list[RowsSpec]:
        suffix = self._preset.suffix
        behind = self._template + (len(self._tokenizer(suffix, add_special_tokens=False)["input_ids"]) if suffix else 0)
        words = [(-place,) for place in range(behind + 1, behind + LAST_WORDS + 1) if place > 1]
        return ["last", "question", *words]
