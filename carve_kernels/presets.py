"""The parameters of CARVE: the paper's values, the release's values, or others."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carve_kernels import checks
from carve_kernels.ops.contrast import weights
from carve_kernels.ops.regions import CONNECTIVITY, limits, share
from carve_kernels.ops.zoom import RESAMPLE, SIZES, colour
from carve_kernels.types import NORMALIZE, SCORES, Size

STEPS = ("t_start", "t_end", "t_full")
LAYERS = ("paper", "release", "all")
"""The layers that have a name."""
FITS = (None, "pad")
"""How an image can be shown to a processor that crops: as it does, or padded on a canvas that is shown whole."""
IMAGES = ("refined", "original+refined")
OVERLAPS = ("mean", "max")
"""Where views of an image overlap: their mean, weighted by tokens per area, or the highest value."""


@dataclass(frozen=True)
class Preset:
    """Every parameter of CARVE; the defaults are the paper's, or `# ours` where the paper gives none.

    ==============  ====================================================================================================
    field           meaning
    ==============  ====================================================================================================
    name            what the preset is called: "paper", "release", or any other text
    layers          the layers that are read: "paper", "release", "all", or their numbers (-1 is the last)
    rows            the rows whose attention is captured, as `capture_attention` takes them for one prompt
    steps           the steps of both answers that are paired: "t_start" the first, "t_end" the last, "t_full" each
    step_weights    a weight for each step of "t_full"; None is 1, 2, 3, ...
    layer_weights   a weight for each of `layers`; None is 1
    lam             what is added to the general map before the division; "mean" is the mean of that map
    normalize       how the contrast is scaled: "none", "sum", "max" or "minmax"
    overlap         where views of an image overlap: "mean" of them, by tokens per area, or "max"
    keep            the share of the pixels that are above the threshold, in (0, 1]
    top             the most regions that are selected (the paper); None where `floor` is given
    floor           select max(floor, int(count * keep)) of the regions (the release); None where `top` is given
    connectivity    the neighbours of a pixel in one region: 4, or 8 with the corners
    score           how regions are ranked: "sum", "mean" or "max" of the saliency inside them
    fill            the colour (red, green, blue) of the pixels that were not selected
    resample        the filter of the magnification: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos"
    size            of the refined image: "longer" side as the image's, both sides to "cover" it, or (height, width)
    limit           the most pixels of the refined image, as a multiple of the image's
    general_prompt  the general instruction whose map is divided by
    suffix          a text after every prompt
    images          what the second pass is shown: "refined", or "original+refined"
    max_new_tokens  the most tokens of an answer
    max_pixels      the most pixels to which a processor that can scales an image; None leaves it as it is
    ==============  ====================================================================================================
    """

    name: str = "paper"
    layers: str | tuple[int, ...] = "paper"
    rows: str | int | tuple[Any, ...] = "last"
    steps: str = "t_end"
    step_weights: tuple[float, ...] | None = None  # 1, 2, 3, ...
    layer_weights: tuple[float, ...] | None = None  # all 1
    lam: float | str = "mean"  # ours
    normalize: str = "none"
    overlap: str = "mean"  # ours
    keep: float = 0.4
    top: int | None = 2
    floor: int | None = None
    connectivity: int = 4  # ours
    score: str = "sum"
    fill: tuple[int, ...] = (0, 0, 0)
    resample: str = "lanczos"  # ours
    size: str | Size = "longer"
    limit: float = 4.0  # ours
    general_prompt: str = "Write a general description of the image."
    suffix: str = ""
    images: str = "refined"
    max_new_tokens: int = 32  # ours
    max_pixels: int | None = 448 * 448

    @classmethod
    def paper(cls, **overrides: Any) -> Preset:
        """The paper's values; layers 20 to 25, or the same share of other models (ours, see `layers_of`)."""
        return cls(**overrides)

    @classmethod
    def release(cls, **overrides: Any) -> Preset:
        """The values of the code that the paper's authors released; `limit` is ours."""
        values: dict[str, Any] = {
            "name": "release",
            "layers": "release",
            "steps": "t_full",
            "lam": 1e-8,
            "keep": 0.2,
            "top": None,
            "floor": 3,
            "size": "cover",
            "suffix": " Answer the question using a single word or phrase.",
            "images": "original+refined",
            "max_pixels": 256 * 28 * 28,
        }
        return cls(**{**values, **overrides})

    @classmethod
    def of(cls, preset: str | Preset | Mapping[str, Any]) -> Preset:
        """A preset from its name, from a dict as `to_dict` makes it, or the preset itself."""
        if isinstance(preset, Preset):
            return preset
        return cls.from_dict({"preset": preset} if isinstance(preset, str) else preset)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """A preset from {"preset": "paper", ...other values}, as in a model's carve.json.

        "evidence" says how the values were chosen; it is not read.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"preset: expected a name, a Preset or a dict, got {checks.describe(values)}")
        overrides = {name: value for name, value in values.items() if name != "evidence"}
        base = checks.choice("preset", overrides.pop("preset", "paper"), ("paper", "release"))
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in overrides if name not in known]
        if unknown:
            raise ValueError(f"preset: {_unknown(unknown, ['preset', *known, 'evidence'])}")
        return cls.release(**overrides) if base == "release" else cls.paper(**overrides)

    def to_dict(self) -> dict[str, Any]:
        """The argument of `from_dict`, ready for JSON: the named preset and the values that differ from it."""
        base = Preset.release() if self.name == "release" else Preset.paper()
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(base)
        return {"preset": base.name} | {name: value for name, value in mine.items() if value != theirs[name]}

    def __post_init__(self) -> None:
        # JSON has lists instead of tuples, and callers pass ranges and arrays.
        for field in dataclasses.fields(self):
            value = checks.plain(getattr(self, field.name))
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, (list, range)) else value)
        checks.text("name", self.name)
        if isinstance(self.layers, tuple):
            _integers("layers", self.layers)
        else:
            checks.choice("layers", self.layers, LAYERS)
        _check_rows(self.rows)
        check_steps(self.steps, self.step_weights)
        if self.layer_weights is not None:
            weights("layer_weights", self.layer_weights, self.layer_weights)
        if not isinstance(self.lam, str) or self.lam != "mean":
            checks.number("lam", self.lam, low=0)
        checks.choice("normalize", self.normalize, NORMALIZE)
        checks.choice("overlap", self.overlap, OVERLAPS)
        share("keep", self.keep)
        limits(self.top, self.floor)
        checks.choice("connectivity", self.connectivity, CONNECTIVITY[2])
        checks.choice("score", self.score, SCORES)
        colour(self.fill)
        checks.choice("resample", self.resample, RESAMPLE)
        if isinstance(self.size, str):
            checks.choice("size", self.size, SIZES)
        else:
            checks.size("size", self.size)
        checks.number("limit", self.limit, low=1)
        checks.text("general_prompt", self.general_prompt)
        if not isinstance(self.suffix, str):
            raise TypeError(f"suffix: expected a string, got {checks.describe(self.suffix)}")
        checks.writable("suffix", self.suffix)
        checks.choice("images", self.images, IMAGES)
        checks.integer("max_new_tokens", self.max_new_tokens, low=1)
        if self.max_pixels is not None:
            checks.integer("max_pixels", self.max_pixels, low=1)

    def layers_of(self, depth: int, attention: Iterable[int] | None = None) -> tuple[int, ...]:
        """The layers of a model with `depth` of them, of which those in `attention` have softmax attention."""
        return layers_of(self.layers, depth, attention)


def layers_of(layers: str | int | Iterable[int], depth: int, attention: Iterable[int] | None = None) -> tuple[int, ...]:
    """The chosen layers of a model with `depth` of them, of which those in `attention` (None: all) have attention.

    =========  ====================================================================================================
    layers     chosen
    =========  ====================================================================================================
    "paper"    20 to 25; of a model with fewer than 26 layers, or some without attention, those with attention in the
               same share of the depth, 20/28 to 26/28; of a hybrid at least two, the nearest to that share
    "release"  those of 20 to 25 that have attention
    "all"      all that have attention
    numbers    themselves, where -1 is the last layer
    =========  ====================================================================================================

    Raises ValueError for a number beyond the model, one twice, a layer without attention, and "release" for a model
    without attention in any of 20 to 25.
    """
    checks.integer("depth", depth, low=1)
    every = range(depth) if attention is None else sorted(attention)
    if not every:
        raise ValueError(f"layers: expected a model with softmax attention, got none in any of its {depth} layers")
    layers = checks.plain(layers)
    if layers == "all":
        return tuple(every)
    if layers == "release":
        chosen = tuple(number for number in every if 20 <= number < 26)
        if not chosen:
            having = f"a model of {depth} layers" if len(every) == depth else f"attention in layers {list(every)}"
            raise ValueError(
                f"layers: expected layers 20 to 25 for preset release, got {having}; "
                "preset paper scales them to any depth"
            )
        return chosen
    if layers == "paper":
        return _paper_layers(depth, every)
    if isinstance(layers, str) or not isinstance(layers, (int, Iterable)):
        raise ValueError(f"layers: expected 'paper', 'release', 'all' or layer numbers, got {checks.describe(layers)}")
    numbers = _integers("layers", (layers,) if isinstance(layers, int) else tuple(layers))
    if any(not -depth <= number < depth for number in numbers):
        raise ValueError(
            f"layers: expected numbers from {-depth} to {depth - 1} for {depth} layers, got {list(numbers)}"
        )
    chosen = tuple(number % depth for number in numbers)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers: expected each layer once, got {list(numbers)} for {depth} layers")
    for number in chosen:
        if number not in every:
            raise ValueError(f"layers: layer {number} has no softmax attention, expected layers among {list(every)}")
    return chosen


def _paper_layers(depth: int, attention: Sequence[int]) -> tuple[int, ...]:
    """The layers with attention in the paper's share of the depth."""
    if len(attention) == depth:
        start = min(round(20 * depth / 28), depth - 1)
        return tuple(range(20, 26)) if depth >= 26 else tuple(range(start, max(start + 1, round(26 * depth / 28))))
    inside = [number for number in attention if 20 * depth <= 28 * number < 26 * depth]
    # From the middle of a layer to the middle of the share.
    nearest = sorted(attention, key=lambda number: (abs(28 * (2 * number + 1) - 46 * depth), -number))
    return tuple(sorted(inside if len(inside) >= 2 else nearest[:2]))


def check_steps(steps: str, step_weights: Sequence[float] | None) -> None:
    """Check which steps are read, and that only several steps have weights."""
    checks.choice("steps", steps, STEPS)
    if step_weights is None:
        return
    if steps != "t_full":
        raise ValueError(f"step_weights: expected None with {steps}, which reads one step, got {step_weights!r}")
    weights("step_weights", step_weights, step_weights)


def _unknown(keys: Sequence[Any], known: Sequence[str]) -> str:
    """A message about unknown keys, with the nearest known one for each."""
    listed = []
    for key in keys:
        near = difflib.get_close_matches(str(key).lower(), known, n=1)
        listed.append(f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key))
    return f"no such key: {', '.join(listed)}; expected keys among {', '.join(known)}"


def _integers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    if not values:
        raise ValueError(f"{name}: expected at least one number, got {values!r}")
    return tuple(checks.integer(f"{name}[{index}]", checks.plain(value)) for index, value in enumerate(values))


def _check_rows(rows: Any) -> None:
    if isinstance(rows, tuple) and rows[:1] in (("word",), ("text",)):
        checks.text("rows[1]", rows[1] if len(rows) == 2 else None)
    elif isinstance(rows, tuple):
        if any(isinstance(row, (str, list, tuple)) for row in rows):
            raise TypeError(
                "rows: expected one choice for every prompt in a preset, since an engine batches by itself, got "
                + checks.describe(rows)
            )
        _integers("rows", rows)
    elif isinstance(rows, int):
        checks.integer("rows", rows, low=1)
    else:
        checks.choice("rows", rows, ("last", "question"))
