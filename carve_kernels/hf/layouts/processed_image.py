"""What a kind of layout is given: one image of a batch, and a cursor over the image tokens of its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from carve_kernels.types import Size


@dataclass(frozen=True)
class ProcessedImage:
    """One image of a batch.

    =========  ==========================================================================================
    config     the model's config
    processor  its processor
    entries    the output of the processor, and what the image processor returned beyond it, where known
    options    the options of the family
    size       (height, width) of the image
    number     number of the image in the batch
    total      the number of images in the batch
    before     the number of views of the images before it
    original   the PIL image, None if only its size was given
    =========  ==========================================================================================
    """

    config: Any
    processor: Any
    entries: Mapping[str, Any]
    options: Mapping[str, Any]
    size: Size
    number: int
    total: int
    before: int = 0
    original: Any = None

    what: ClassVar[str] = "image"

    @property
    def image_processor(self) -> Any:
        return self.processor.image_processor

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The whole image."""
        return 0.0, 0.0, float(self.size[1]), float(self.size[0])

    def has(self, name: str) -> bool:
        """Whether the processor or the image processor returned an entry."""
        return self.entries.get(name) is not None

    def entry(self, name: str, shape: str | None = None) -> Any:
        """An entry of the processor's output; `shape` has a name for each dimension, as in "[tiles, 3, H, W]"."""
        found = self.entries.get(name)
        if found is None:
            returned = ", ".join(sorted(self.entries)) or "nothing"
            raise ValueError(f"inputs: expected {name!r} from the processor, got {returned}")
        if shape is not None and (not isinstance(found, torch.Tensor) or found.ndim != shape.count(",") + 1):
            got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"inputs: expected {name} of shape {shape}, got {got}")
        return found

    def item(self, name: str, shape: str | None = None) -> Any:
        """The item of this image in an entry that has one for each image; of a video, likewise."""
        found = self.entry(name, shape)
        if len(found) != self.total:
            raise ValueError(
                f"{self.what}s: the inputs hold {len(found)} {self.what}(s), got {self.total}; give every {self.what} "
                "of the prompts in order, one list a row, and select views afterwards by `view.image`"
            )
        return found[self.number]


class Cursor:
    """Reads the image tokens of one row of input_ids, from the first to the last."""

    def __init__(self, ids: torch.Tensor, is_image: torch.Tensor, tokenizer: Any) -> None:
        self._ids, self._tokenizer = ids.tolist(), tokenizer
        self._positions: list[int] = is_image.nonzero().flatten().tolist()
        self.taken = 0

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, count: int) -> torch.Tensor:
        """The positions of the next `count` image tokens, int32; -1 for those that the row does not have."""
        found = self._positions[self.taken : self.taken + count]
        self.taken += count
        return torch.tensor(found + [-1] * (count - len(found)), dtype=torch.int32)

    def take_rows(self, rows: int, columns: int) -> torch.Tensor:
        """The same for rows of image tokens [rows, columns], each of which one more image token ends, a newline."""
        return self.take(rows * (columns + 1)).view(rows, columns + 1)[:, :columns]

    def run(self) -> int:
        """How many of the next image tokens follow each other without another token between them."""
        start, end, positions = self.taken, self.taken, self._positions
        while end < len(positions) and positions[end] - positions[start] == end - start:
            end += 1
        return end - start

    def between(self) -> list[str]:
        """The tokens between the last image token that was taken, or the row's first token, and the next one."""
        start = self._positions[min(self.taken, len(self)) - 1] + 1 if self.taken else 0
        end = self._positions[self.taken] if self.taken < len(self) else len(self._ids)
        found: list[str] = self._tokenizer.convert_ids_to_tokens(self._ids[start:end])
        return found

    @property
    def runs(self) -> int:
        """The number of runs of image tokens in the row."""
        return sum(1 for index, at in enumerate(self._positions) if not index or at != self._positions[index - 1] + 1)
