"""What the engine returns: the result for one image and one question, or in a batch its failure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from PIL.Image import Image

from carve_kernels.complexity import complexity
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import Preset
from carve_kernels.types import Regions, VisualLayout, brief


@dataclass(frozen=True)
class CarvedImage:
    """What CARVE found in one image of a prompt.

    ========  =========  ======  ======================================================================================
    name      dtype      shape   meaning
    ========  =========  ======  ======================================================================================
    image     PIL image  H x W   the upright original
    refined   PIL image          its selected regions magnified, or the image itself where none was selected
    saliency  float32    [H, W]  the contrast of its tokens, in its pixels; 0 where it is not seen
    regions   Regions            the selected regions
    seen      bool       [H, W]  the pixels that the model was shown
    unseen    float              share of the area that the model was not shown
    reason    str                why no region was selected, or None
    strength  float              of several images: how strong the contrast is, its standard deviation over the seen
                                 pixels; the strongest image is refined unless others are named
    ========  =========  ======  ======================================================================================
    """

    image: Image
    refined: Image
    saliency: torch.Tensor
    regions: Regions
    seen: torch.Tensor
    unseen: float = 0.0
    reason: str | None = None
    strength: float | None = None

    def __repr__(self) -> str:
        return brief(self, image=self.image, refined=self.refined, box=self.regions.box, reason=self.reason)


@dataclass(frozen=True)
class CarveResult:
    """The result of CARVE for one question about an image, or about several.

    ===============  =================================================================================================
    question         as it was passed; `prompt` is the whole text that the model read
    answer           the plain answer, empty without `plain`; `answer_ids` its tokens
    refined_answer   the answer on the refined image; `refined_ids` its tokens
    image            the upright original; `refined` is the refined image; of several images, the first refined one
    task, general    the captured maps of the question and of the general instruction
    saliency         fp32 [H, W], their contrast in pixels of the image, 0 where that is not `seen` (bool [H, W])
    regions          the selected regions; `mask`, `boxes` and `box` are theirs
    entropy          H / ln N of the task map for each layer that was read
    seconds          the time of each stage: first pass, contrast, regions, zoom, second pass; of a batch, its share
    preset           the preset that was used
    reason           why the whole image was kept, or None
    images           a CarvedImage for each image of the prompt, in order
    refined_images   the numbers of the images that were refined
    unseen           share of the image's area that the model was not shown, as under a centre crop
    layers_left_out  captured layers that were not read: they did not see the whole image at the steps that are
    complexity       computed on first access, in about a tenth of the time of an answer
    ===============  =================================================================================================
    """

    question: str
    prompt: str
    answer: str
    refined_answer: str
    image: Image
    refined: Image
    task: AttentionMaps
    general: AttentionMaps
    saliency: torch.Tensor
    regions: Regions
    entropy: dict[int, float]
    seconds: dict[str, float]
    preset: Preset
    reason: str | None = None
    answer_ids: tuple[int, ...] = field(default=(), repr=False)
    refined_ids: tuple[int, ...] = field(default=(), repr=False)
    unseen: float = 0.0
    images: tuple[CarvedImage, ...] = field(default=(), repr=False)
    refined_images: tuple[int, ...] = (0,)
    layers_left_out: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return brief(
            self, question=self.question, answer=self.answer, refined_answer=self.refined_answer, image=self.image,
            box=self.box, reason=self.reason, seconds=math.fsum(self.seconds.values()),
        )  # fmt: skip

    @cached_property
    def complexity(self) -> dict[str, float]:
        """Edge density and colour entropy of the image: "edges" and "colours", each from 0 to 1."""
        return complexity(self.image)

    @property
    def error(self) -> None:
        """Always None; `CarveFailure.error` has the exception."""
        return None

    @property
    def layout(self) -> VisualLayout:
        """Where the visual tokens of the original images are in the first prompt."""
        return cast(VisualLayout, self.task.layout)

    @property
    def seen(self) -> torch.Tensor:
        return self.images[self.refined_images[0]].seen

    @property
    def mask(self) -> torch.Tensor:
        return self.regions.mask

    @property
    def boxes(self) -> torch.Tensor:
        return self.regions.boxes

    @property
    def box(self) -> tuple[int, ...]:
        return self.regions.box


@dataclass(frozen=True)
class CarveFailure:
    """What a batch yields instead of a CarveResult for an image or a question that could not be used.

    `image` is the path or the image, or a list of them, as it was passed; `error` is what the same request alone would
    have raised.
    """

    question: str
    image: Any
    error: Exception
    prompt: str | None = None
