"""Recipes of attention-guided cropping: small functions over the maps of a session; docs/frontends.md has an example.

A layer by its sensitivity to the question, heads that attend to one place, a crop only when the answer is unsure,
several peaks of one map. Each says which paper its formula is from, or that it is ours.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from carve_kernels import checks
from carve_kernels.arrays import as_tensor
from carve_kernels.backends.reference.labels import label
from carve_kernels.hf.decoding import exclusive
from carve_kernels.hf.decoding.generation import greedy_config, preserved_positions
from carve_kernels.hf.engine.engine import CarveEngine
from carve_kernels.hf.engine.passes import decode_answer
from carve_kernels.hf.engine.requests import ImageSource
from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.hf.model import unwrap
from carve_kernels.hf.query_rows import tokenizer_of
from carve_kernels.types import Capture, Size

Head = tuple[int, int]
"""A head: the index of its layer among the captured ones, and its number in it."""
Pixels = tuple[int, int, int, int]
_FLOATS = (torch.float32, torch.float64)


class HeadMaps:
    """Keeps the maps of each head of a session: `capture_attention(model, heads="each", on_layer=HeadMaps())`.

    They are those of the last prompt and its decode steps, at no further pass. Tokens that were dropped have 0 behind
    the layer that dropped them: take earlier layers. `maps` raises ValueError for what was not captured.
    """

    def __init__(self) -> None:
        self._steps: dict[int, dict[int, torch.Tensor]] = {}

    def __call__(self, layer: int, step: int, capture: Capture) -> None:
        if capture.maps.ndim != 4:
            raise ValueError("heads: expected a session with heads='each', got one with heads='mean'")
        if step == 0 and layer in self._steps.get(0, {}):
            self._steps.clear()
        self._steps.setdefault(step, {})[layer] = capture.maps

    def maps(self, b: int = 0, step: int = 0, row: int = -1) -> torch.Tensor:
        """Maps of batch row b at a step, of one of its captured rows, float32 [L, A, N]: layers in ascending order."""
        if not self._steps:
            raise ValueError("maps: expected a forward of the model inside the session, got none")
        if step not in self._steps:
            raise ValueError(f"step: expected one of {sorted(self._steps)}, got {checks.describe(step)}")
        parts = [maps for _, maps in sorted(self._steps[step].items())]
        batch, _, rows, _ = parts[0].shape
        b = checks.integer("b", b, low=0, high=batch - 1)
        row = checks.integer("row", row, low=-rows, high=rows - 1)
        if len({maps.shape[1] for maps in parts}) > 1:
            raise ValueError(
                f"layers: expected layers with as many heads each, got {[maps.shape[1] for maps in parts]}; capture "
                "those with as many"
            )
        return torch.stack([maps[b, :, row].to(parts[0].device) for maps in parts])


class QueryLayer(NamedTuple):
    """A layer chosen by `query_layer`.

    ==========  ========  =====  =======================================================================
    place       int              which of the captured layers reacts most to the question
    map         as task   [N]    the attention that its heads pay more with the question than without it
    activation  as task   [L]    `query_activation` of each layer
    ==========  ========  =====  =======================================================================
    """

    place: int
    map: torch.Tensor
    activation: torch.Tensor


def query_activation(task: Any, without: Any, *, heads: int | None = None) -> torch.Tensor:
    """How strongly the question activates each layer: Visual Activation by Query (VAQ) of LASER.

    Equals::

        (task - without).relu().norm(dim=-1).topk(heads).values.mean(-1)  # [L]

    ========  ==================  =========  =======================================================================
    name      dtype               shape      meaning
    ========  ==================  =========  =======================================================================
    task      float32 or float64  [L, A, N]  attention of the last row of the prompt with the question, by head; means
                                             over the heads are [L, 1, N]
    without   as task             [L, A, N]  the same for the prompt without the question, its image and template alike
    heads     int                            how many of the most activated heads of a layer count; None: all (ours, the
                                             paper has a number K and does not say which)
    (result)  as task             [L]
    ========  ==================  =========  =======================================================================

    Raises TypeError or ValueError for arguments that do not fit. Source: LASER, arXiv 2602.04304; the equation after
    renditions of the paper, whose program is not public.
    """
    changed, count = _changed(task, without, heads)
    return changed.norm(dim=-1).topk(count).values.mean(-1)


def query_layer(task: Any, without: Any, *, heads: int | None = None) -> QueryLayer:
    """The layer with the highest `query_activation`, the first one among equals, and what the question changed in it.

    Equals::

        changed = (task - without).relu()                                    # [L, A, N]
        place = query_activation(task, without, heads=heads).argmax()
        map = changed[place][changed[place].norm(dim=-1).topk(heads).indices].mean(0)

    Arguments, errors and source are those of `query_activation`; the mean over these heads is ours. Where the question
    changed no layer, all are 0 and the first is returned with a map of 0: there is nothing to crop.
    """
    changed, count = _changed(task, without, heads)
    by_head = changed.norm(dim=-1)
    activation = by_head.topk(count).values.mean(-1)
    place = int(activation.argmax())
    return QueryLayer(place, changed[place][by_head[place].topk(count).indices].mean(0), activation)


def spatial_entropy(maps: Any, grid: Size) -> torch.Tensor:
    """How scattered each map is: the entropy of the sizes of its connected parts, 0 where it looks at one place.

    The tokens above the mean of a map are connected to their 8 neighbours; with the share p of these tokens that each
    connected part has, it is -sum(p ln p). Infinite for a map without a token above its mean.

    ========  ==================  ========  ===============================
    maps      float32 or float64  [..., N]  attention, such as that of heads
    grid      int                 (GH, GW)  rows and columns of the N tokens
    (result)  float64             [...]     nats
    ========  ==================  ========  ===============================

    Raises TypeError or ValueError for arguments that do not fit. Source: localization heads, arXiv 2503.06287 (their
    program weights a part by its attention above the mean instead). HAVC (arXiv 2601.22483) also ranks heads by a
    spatial entropy; its formula was not found.
    """
    values, (rows, columns) = _floating("maps", maps), checks.size("grid", grid)
    if values.ndim < 1 or values.shape[-1] != rows * columns:
        raise ValueError(f"maps: expected {rows} x {columns} tokens last, as the grid, got {checks.describe(values)}")
    flat = values.reshape(-1, rows, columns).double()
    # The rounding of the mean must not put tokens of a constant map above it.
    uneven = flat.amax((1, 2), keepdim=True) > flat.amin((1, 2), keepdim=True)
    above = ((flat > flat.mean((1, 2), keepdim=True)) & uneven).cpu().numpy()
    # A frame that is empty behind each map, so that nothing is connected from one map to the next.
    frames = np.zeros((2 * len(above), rows, columns), dtype=bool)
    frames[::2] = above
    entropy = np.full(len(above), math.inf)
    found = above.any((1, 2))
    entropy[found] = 0.0
    if found.any():
        parts, boxes = label(frames, 26)
        owners, sizes = boxes[:, 2] // 2, np.bincount(parts.ravel())[1:]
        shares = sizes / np.bincount(owners, sizes, len(above))[owners]
        np.add.at(entropy, owners, -shares * np.log(shares))
    return torch.from_numpy(entropy).reshape(values.shape[:-1])


def concentrated_heads(maps: Any, grid: Size, *, count: int = 10, mass: float | None = None) -> list[Head]:
    """The heads that attend to the image and there to one place, by `spatial_entropy`, the least scattered first.

    ========  ==================  =========  =====================================================================
    maps      float32 or float64  [L, A, N]  attention of the last row on the image, see `HeadMaps`
    grid      int                 (GH, GW)   rows and columns of the N tokens
    count     int                            at most so many heads
    mass      float                          the least share of its attention that a head pays to the image; None: the
                                             bend of the sorted shares, the one farthest from the line that connects the
                                             lowest with the highest
    (result)                                 (layer, head) pairs, see `Head`
    ========  ==================  =========  =====================================================================

    Heads of one prompt are a guess; `frequent_heads` chooses those of many prompts. Raises TypeError or ValueError for
    arguments that do not fit. Source: localization heads, arXiv 2503.06287, with ten heads a prompt.
    """
    values = _by_head("maps", maps)
    checks.integer("count", count, low=1)
    shares = values.sum(-1).double().flatten().cpu()
    least = _bend(shares) if mass is None else checks.number("mass", mass, low=0.0, high=1.0)
    scattered = spatial_entropy(values, grid).flatten()
    scattered[shares < least] = math.inf
    order = scattered.argsort(stable=True)[:count]
    return [divmod(int(head), values.shape[1]) for head in order if math.isfinite(scattered[head])]


def grounding_heads(maps: Sequence[Any], inside: Sequence[Any], *, count: int = 3) -> list[Head]:
    """The heads with the largest share of their attention inside of a known place, over several prompts, best first.

    Equals, for maps [L, A, N] and tokens `inside` of each prompt::

        sum((maps * inside).sum(-1) / maps.sum(-1) for maps, inside in prompts).flatten().topk(count)

    ========  ==================  =============  ==============================================================
    maps      float32 or float64  n x [L, A, N]  attention of the last row, of each prompt
    inside    bool                n x [N]        the tokens where what the prompt asks about is known to be
    count     int                                at most so many heads
    ========  ==================  =============  ==============================================================

    A head without attention on the image counts 0. HAVC (arXiv 2601.22483) first filters heads by a diagnostic task of
    reading text; its score was not found, and this one is ours. Raises TypeError or ValueError for arguments that do
    not fit.
    """
    checks.integer("count", count, low=1)
    many, places = _listed("maps", maps), _listed("inside", inside)
    if not many:
        raise ValueError("maps: expected those of at least one prompt, got none")
    if len(many) != len(places):
        raise ValueError(f"inside: expected the tokens of each of {len(many)} prompts, got {len(places)}")
    shares: list[torch.Tensor] = []
    for number, (each, place) in enumerate(zip(many, places, strict=True)):
        values = _by_head(f"maps[{number}]", each)
        tokens = as_tensor(f"inside[{number}]", place)
        checks.tensor(f"inside[{number}]", tokens, shape=(values.shape[2],), dtypes=(torch.bool,))
        on_image = values.sum(-1).double().cpu()
        share = values[..., tokens.to(values.device)].sum(-1).double().cpu() / on_image
        shares.append(share.where(on_image > 0, 0.0))
        if share.shape != (first := shares[0].shape):
            raise ValueError(f"maps[{number}]: expected {list(first)} heads as maps[0], got {list(share.shape)}")
    total = torch.stack(shares).sum(0)
    order = total.flatten().argsort(descending=True, stable=True)[:count]
    return [divmod(int(head), total.shape[1]) for head in order]


def frequent_heads(choices: Iterable[Iterable[Head]], *, count: int = 3) -> list[Head]:
    """The heads that were chosen for most prompts, such as by `concentrated_heads`; among equals the first by number.

    Raises TypeError or ValueError for what are no pairs of numbers. Source: localization heads, arXiv 2503.06287, with
    three heads of a model.
    """
    checks.integer("count", count, low=1)
    votes: Counter[Head] = Counter()
    for number, chosen in enumerate(_listed("choices", choices)):
        votes.update({_head(f"choices[{number}]", each) for each in _listed(f"choices[{number}]", chosen)})
    return [head for head, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0]))[:count]]


def confidence(scores: Any, ids: Any) -> float:
    """How sure a model is of its answer: the mean probability of the answer's own tokens, in [0, 1].

    Equals::

        scores.softmax(-1).gather(-1, ids[:, None]).mean()

    ======  =====  ======  =====================================================================================
    scores  float  [T, V]  of each token of the answer; or as `generate` returns them, T tensors [1, V]
    ids     int    [T]     the tokens of the answer, the end token included; or [1, T]
    ======  =====  ======  =====================================================================================

    Raises TypeError or ValueError for arguments that do not fit. Source: AdaFocus, now LookWise (arXiv 2603.00171), as
    in its program.
    """
    if isinstance(scores, tuple) and all(isinstance(each, torch.Tensor) and each.shape[:-1] == (1,) for each in scores):
        scores = torch.cat(scores) if scores else torch.empty(0, 0)
    logits, tokens = as_tensor("scores", scores, floating=True), as_tensor("ids", ids)
    tokens = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
    if logits.ndim != 2 or not logits.numel() or not logits.is_floating_point():
        raise ValueError(
            f"scores: expected floating-point scores [T, V] of at least one token, got {checks.describe(scores)}"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.shape != logits.shape[:1]:
        raise ValueError(f"ids: expected {len(logits)} tokens as the scores, got {checks.describe(ids)}")
    vocabulary = logits.shape[1]
    if not bool(((tokens >= 0) & (tokens < vocabulary)).all()):
        raise ValueError(f"ids: expected tokens from 0 to {vocabulary - 1}, got {checks.describe(tokens.tolist())}")
    probabilities = logits.double().softmax(-1).gather(-1, tokens.to(logits.device, torch.int64)[:, None])
    if not bool(probabilities.isfinite().all()):
        raise ValueError("scores: expected numbers and -inf, got NaN or inf among them")
    return float(probabilities.mean())


@dataclass(frozen=True)
class CheckedAnswer:
    """What `carve_if_unsure` returns.

    ==========  ===========  =====================================================================
    answer      str          the plain answer where it was sure, else the refined one
    plain       str          the plain answer
    confidence  float        of the plain answer, see `confidence`
    carved      CarveResult  of the engine where the plain answer was not sure, else None
    ==========  ===========  =====================================================================
    """

    answer: str
    plain: str
    confidence: float
    carved: CarveResult | None = None


def carve_if_unsure(engine: CarveEngine, image: ImageSource, question: str, *, threshold: float) -> CheckedAnswer:
    """The plain answer of a model if its `confidence` is at least the threshold, else that of CARVE.

    ==========  ======================================================================================================
    engine      a CarveEngine; one with `plain=False` does not decode the plain answer again
    image       a path or a PIL image
    question    a text
    threshold   in [0, 1]; there is no value for every model: LookWise's program shows 0.96, and crops always by default
    ==========  ======================================================================================================

    The plain answer is the model's own `generate`, greedy, of at most `max_new_tokens` of the engine's preset. Raises
    TypeError or ValueError for invalid arguments before the model runs. Source: as of `confidence`; where to crop is
    CARVE's.
    """
    if not isinstance(engine, CarveEngine):
        raise TypeError(f"engine: expected a CarveEngine, got {checks.describe(engine)}")
    least = checks.number("threshold", threshold, low=0.0, high=1.0)
    if isinstance(image, (list, tuple)):
        raise TypeError(f"image: expected one path or PIL image, got {checks.describe(image)}")
    request = engine.request(image, question)
    model: Any = unwrap(engine.model)
    inputs = {**request.task.inputs, **request.features.entries}
    config = greedy_config(model, engine.preset.max_new_tokens)
    config.update(return_dict_in_generate=True, output_scores=True)
    # generate takes unset fields from the model's own config, so it gets a shallow copy of the model with this config.
    twin = copy.copy(model)
    twin.generation_config = config
    tokenizer = {"tokenizer": tokenizer_of(engine.processor)} if config.stop_strings else {}
    with exclusive(engine.model), torch.no_grad(), preserved_positions(model):
        output = twin.generate(**inputs, **tokenizer)
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    sure = confidence(output.scores, ids)
    plain = decode_answer(engine.processor, tuple(ids.tolist()))
    if sure >= least:
        return CheckedAnswer(plain, plain, sure)
    [carved] = engine.answer([request])
    if not engine.plain and carved.reason is None:
        carved = replace(carved, answer=plain, answer_ids=tuple(ids.tolist()))
    return CheckedAnswer(carved.refined_answer, plain, sure, carved)


def peak_boxes(
    saliency: Any, size: Size, window: int | Size, *, count: int = 2, share: float = 0.7, overlap: float = 0.2
) -> list[Pixels]:
    """The windows of a map with the largest sums that hardly overlap: a box for each of several peaks, best first.

    ========  ==================  ========  =========================================================================
    saliency  float32 or float64  [GH, GW]  a map of the whole image, by tokens or by pixels
    size      int                 (H, W)    of the image in pixels
    window    int                 (h, w)    of each window in pixels, or one side of both; cut to whole tokens
    count     int                           at most so many boxes
    share     float                         the least sum of a window, as a share of the largest, in (0, 1]
    overlap   float                         windows whose intersection over union is as large are left out, in (0, 1]
    (result)  int                 4         x0 y0 x1 y1 in pixels of each; none where all windows have the same sum
    ========  ==================  ========  =========================================================================

    Among equal sums the first row wins, then the first column. Raises TypeError or ValueError for arguments that do not
    fit, and for a window that is smaller than a token. Source: how LookWise's program (arXiv 2603.00171) finds all
    objects of a kind, with its share and its overlap; that there are two is ours.
    """
    values = _floating("saliency", saliency)
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"saliency: expected a map [GH, GW], got {checks.describe(values)}")
    sides = checks.size("size", size)
    wanted = checks.size("window", (window, window) if isinstance(window, int) else window)
    checks.integer("count", count, low=1)
    for name, number in (("share", share), ("overlap", overlap)):
        if checks.number(name, number, high=1.0) <= 0.0:
            raise ValueError(f"{name}: expected a number in (0, 1], got {number}")
    tokens = [side / cells for side, cells in zip(sides, values.shape, strict=True)]
    cells = [min(int(each / token), most) for each, token, most in zip(wanted, tokens, values.shape, strict=True)]
    if not all(cells):
        least = tuple(math.ceil(token) for token in tokens)
        raise ValueError(f"window: expected at least the {least} pixels of a token, got {wanted}")
    sums = values.cpu().double().unfold(0, cells[0], 1).sum(-1).unfold(1, cells[1], 1).sum(-1).numpy()
    best = sums.max()
    if best <= 0 or (sums.size > 1 and best == sums.min()):
        return []
    rows, columns = np.ogrid[: sums.shape[0], : sums.shape[1]]
    boxes: list[Pixels] = []
    left = sums >= share * best
    while len(boxes) < count and left.any():
        row, column = divmod(int(np.where(left, sums, -math.inf).argmax()), sums.shape[1])
        (y0, y1), (x0, x1) = (
            (round(start * token), round((start + length) * token))
            for start, length, token in zip((row, column), cells, tokens, strict=True)
        )
        boxes.append((x0, y0, x1, y1))
        common = np.clip(cells[0] - abs(rows - row), 0, None) * np.clip(cells[1] - abs(columns - column), 0, None)
        left &= common < overlap * (2 * cells[0] * cells[1] - common)
    return boxes


def _changed(task: Any, without: Any, heads: Any) -> tuple[torch.Tensor, int]:
    """The positive changes [L, A, N] of checked maps, and how many heads count."""
    with_question = _by_head("task", task)
    before = as_tensor("without", without, floating=True, like=with_question)
    checks.tensor("without", before, shape=tuple(with_question.shape), dtypes=(with_question.dtype,))
    before = _floating("without", before)
    most = with_question.shape[1]
    return (with_question - before).relu(), most if heads is None else checks.integer("heads", heads, low=1, high=most)


def _by_head(name: str, maps: Any) -> torch.Tensor:
    values = _floating(name, maps)
    if values.ndim != 3 or not values.numel():
        raise ValueError(f"{name}: expected maps [L, A, N] of at least one head and token, got {checks.describe(maps)}")
    if bool((values < 0).any()):
        raise ValueError(f"{name}: expected attention, which is never negative, got {float(values.min())} among it")
    return values


def _floating(name: str, value: Any) -> torch.Tensor:
    values = as_tensor(name, value, floating=True)
    if values.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected dtype torch.float32, torch.float64, got {checks.describe(values)}")
    values = values.detach()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or inf among them")
    return values


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name}: expected a list, got {checks.describe(value)}")
    return list(value)


def _head(name: str, value: Any) -> Head:
    pair = checks.plain(value)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: expected pairs of a layer and a head, got {checks.describe(value)}")
    layer, head = (checks.integer(f"{name}[{axis}]", number, low=0) for axis, number in enumerate(pair))
    return layer, head


def _bend(shares: torch.Tensor) -> float:
    """The value of the sorted numbers that is farthest from the line between the lowest and the highest."""
    ordered = shares.sort().values
    line = torch.linspace(float(ordered[0]), float(ordered[-1]), len(ordered), dtype=ordered.dtype)
    return float(ordered[int((ordered - line).abs().argmax())])
