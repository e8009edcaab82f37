"""Presets, the pairing of steps, and `carve` against an independent implementation of the release's procedure."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from scipy import ndimage

from carve_kernels import BackendUnavailable, Preset, carve
from carve_kernels.pipeline import pair
from carve_kernels.presets import layers_of
from tests.support.planted_maps import maps
from tests.support.tolerances import relative


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def release(
    image: Image.Image, task: torch.Tensor, general: torch.Tensor, grid: tuple[int, int]
) -> tuple[numpy.ndarray, numpy.ndarray, tuple[int, ...], Image.Image]:
    """The release's procedure from its description, map by map: saliency, mask, box, refined image."""
    layers, steps = task.shape[0], min(task.shape[1], general.shape[1])
    saliency = numpy.zeros((image.height, image.width), dtype=numpy.float64)
    for step in range(steps):
        for layer in range(layers):
            ratio = task[layer, step].double().numpy() / (general[layer, step].double().numpy() + 1e-8)
            ratio_image = Image.fromarray(ratio.reshape(grid).astype(numpy.float32), mode="F")
            saliency += (step + 1) * numpy.asarray(ratio_image.resize(image.size, Image.Resampling.BILINEAR))
    above = saliency >= numpy.percentile(saliency, 80)
    labels, count = ndimage.label(above)
    best = numpy.argsort(ndimage.sum(saliency, labels, range(1, count + 1)))[::-1][: max(3, int(count * 0.2))]
    mask = numpy.isin(labels, best + 1)
    y, x = numpy.nonzero(mask)
    box = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
    black = Image.fromarray(numpy.where(mask[..., None], numpy.asarray(image), 0).astype(numpy.uint8)).crop(box)
    scale = max(image.width / black.width, image.height / black.height)
    size = int(black.width * scale), int(black.height * scale)
    return saliency, mask, box, black.resize(size, Image.Resampling.LANCZOS)


CASES = [
    ((8, 32), (403, 101)),
    ((32, 8), (67, 251)),
    ((18, 32), (161, 91)),
    ((16, 36), (301, 123)),
    ((16, 64), (311, 79)),
    ((64, 16), (13, 51)),
    ((16, 64), (51, 13)),
    ((16, 16), (333, 111)),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("seed", [6, 13])
@pytest.mark.parametrize(("grid", "size"), CASES)
def test_preset_release_reproduces_the_release(
    grid: tuple[int, int], size: tuple[int, int], seed: int, backend: str
) -> None:
    image = photograph(*size)
    task, general = maps(grid, layers=6, steps=4, seed=seed)
    general = general[:, :3]
    saliency, mask, box, refined = release(image, task, general, grid)
    found = carve(image, task, general, grid=grid, preset="release", backend=backend)
    assert relative(found.saliency, torch.from_numpy(saliency)) < 1e-5
    threshold = numpy.percentile(saliency, 80)
    above = saliency >= threshold
    gap = (saliency[above].min() - saliency[~above].max()) / threshold
    assert gap > 1e-5, "float32 would decide which pixels pass, so this case shows nothing: take another seed"
    assert numpy.array_equal(found.regions.mask.numpy(), mask)
    assert found.regions.box == box and found.reason is None
    if refined.width * refined.height <= 4 * image.width * image.height:
        assert found.refined.size == refined.size and found.refined.tobytes() == refined.tobytes()
    else:
        assert found.refined.width * found.refined.height <= 4 * image.width * image.height


def test_the_release_magnifies_without_a_limit_and_this_does_not() -> None:
    image, (task, general) = photograph(300, 20), maps((2, 30), steps=1, spot=(1, 15))
    task[..., ::7] *= 1e-3
    wanted = release(image, task, general, (2, 30))[3]
    preset = Preset.release(limit=1.0)
    assert wanted.width * wanted.height > 300 * 20
    capped = carve(image, task, general, grid=(2, 30), preset=preset).refined
    assert capped.width * capped.height <= 300 * 20


def test_a_square_number_of_tokens_needs_no_square_grid() -> None:
    # The release reshapes 576 tokens to 24 x 24 before it reads the grid.
    image, (task, general) = photograph(320, 180), maps((18, 32), spot=(14, 5))
    found = carve(image, task, general, grid=(18, 32))
    x0, y0, x1, y1 = found.regions.boxes[0].tolist()
    assert x0 < 55 < x1 and y0 < 145 < y1
    scrambled = carve(image, task, general, grid=(24, 24))
    assert not torch.equal(scrambled.regions.mask, found.regions.mask)


@pytest.mark.parametrize("count", [575, 577])
def test_a_count_unlike_the_grid_is_an_error_that_names_both(count: int) -> None:
    # The release skips or truncates such a layer.
    task, general = maps((1, count))
    with pytest.raises(ValueError, match=f"expected {count} tokens, got 18 x 32 = 576"):
        carve(photograph(32, 18), task, general, grid=(18, 32), preset="release")


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("landscape", [True, False])
def test_a_centre_crop_is_at_its_position(preset: str, landscape: bool) -> None:
    # LLaVA sees the middle square of a 2:1 image; a map stretched over all of it would put the spot elsewhere.
    size, box = ((401, 200), (100.5, 0, 300.5, 200)) if landscape else ((200, 401), (0, 100.5, 200, 300.5))
    task, general = maps((24, 24), spot=(5, 4), steps=1)
    found = carve(photograph(*size), task, general, grid=(24, 24), preset=preset, box=box)
    spot = [200 * 4.5 / 24 + (100 if landscape else 0), 200 * 5.5 / 24 + (0 if landscape else 100)]
    x0, y0, x1, y1 = found.regions.boxes[0].tolist()
    assert x0 < spot[0] < x1 and y0 < spot[1] < y1
    y, x = divmod(int(found.saliency.argmax()), size[0])
    assert abs(x - spot[0]) < 10 and abs(y - spot[1]) < 10
    covered = torch.zeros(size[1], size[0], dtype=torch.bool)
    left, top, right, bottom = (round(edge) for edge in box)
    covered[top:bottom, left:right] = True
    assert not found.regions.mask[~covered].any() and not found.saliency[~covered].any()
    # `keep` is a share of the covered pixels: with 1, all of them are selected.
    everything = carve(photograph(*size), task, general, grid=(24, 24), preset=Preset.paper(keep=1.0), box=box)
    assert torch.equal(everything.regions.mask, covered) and everything.regions.box == (left, top, right, bottom)


def test_degenerate_maps_select_the_whole_image() -> None:
    image, (task, general) = photograph(33, 17), maps((3, 5))
    flat = torch.full_like(task, 0.3)
    for one, other, reason in [
        (task * 0, general, "constant"),
        (flat, flat * 2, "constant"),
        (general, general, "constant"),
        (task[:, :0], general, "empty"),
        (task, general[..., :0], "empty"),
    ]:
        found = carve(image, one, other, grid=(3, 5), preset=Preset.paper(lam=0.0))
        assert found.reason is not None and reason in found.reason and found.regions.reason == found.reason
        assert found.refined.tobytes() == image.tobytes() and bool(found.regions.mask.all())
        assert found.regions.box == (0, 0, 33, 17) and found.saliency.shape == (17, 33)
    single = carve(photograph(1, 1), task, general, grid=(3, 5))
    assert single.reason == "the saliency is constant" and single.refined.size == (1, 1)


def test_pair() -> None:
    task, general = torch.rand(2, 4, 3), torch.rand(2, 3, 3)
    one, other, weights = pair(task, general, "t_end")
    assert torch.equal(one, task[:, 3:]) and torch.equal(other, general[:, 2:]) and weights.tolist() == [1]
    one, other, weights = pair(task, general, "t_start")
    assert torch.equal(one, task[:, :1]) and torch.equal(other, general[:, :1]) and weights.tolist() == [1]
    one, other, weights = pair(task, general, "t_full")
    assert torch.equal(one, task[:, :3]) and torch.equal(other, general) and weights.tolist() == [1, 2, 3]
    assert pair(task, general[:, :2], "t_full", step_weights=(5, 0, 1, 2))[2].tolist() == [5, 0]
    one, other, weights = pair(task, general, "t_full", step_weights=(1, 2))
    assert torch.equal(one, task[:, :2]) and torch.equal(other, general[:, :2]) and weights.tolist() == [1, 2]
    with pytest.raises(ValueError, match="step_weights: expected None with t_end"):
        pair(task, general, "t_end", step_weights=(1,))
    with pytest.raises(ValueError, match="steps: expected one of"):
        pair(task, general, "last")


def test_the_presets_are_the_table_of_the_method() -> None:
    paper, released = Preset.paper(), Preset.release()
    assert (paper.steps, paper.lam, paper.normalize, paper.keep) == ("t_end", "mean", "none", 0.4)
    assert (paper.top, paper.floor, paper.size, paper.images, paper.suffix) == (2, None, "longer", "refined", "")
    assert (paper.max_pixels, paper.rows, paper.max_new_tokens) == (448 * 448, "last", 32)
    assert (released.steps, released.lam, released.normalize, released.keep) == ("t_full", 1e-8, "none", 0.2)
    assert (released.top, released.floor, released.size, released.images) == (None, 3, "cover", "original+refined")
    assert (released.max_pixels, released.limit) == (256 * 28 * 28, 4.0)
    assert released.suffix == " Answer the question using a single word or phrase."
    for preset in (paper, released):
        assert preset.general_prompt == "Write a general description of the image."
        assert (preset.connectivity, preset.fill, preset.resample, preset.score) == (4, (0, 0, 0), "lanczos", "sum")


def test_layers_of_a_preset() -> None:
    paper, released = Preset.paper(), Preset.release()
    for depth in (26, 28, 80):
        assert paper.layers_of(depth) == released.layers_of(depth) == (20, 21, 22, 23, 24, 25)
    assert paper.layers_of(24) == (17, 18, 19, 20, 21) and paper.layers_of(5) == (4,)
    assert all(0 <= layer < depth for depth in range(1, 26) for layer in paper.layers_of(depth))
    assert all(paper.layers_of(depth) for depth in range(1, 26))
    assert released.layers_of(23) == (20, 21, 22) and released.layers_of(21) == (20,)
    with pytest.raises(ValueError, match="got a model of 20 layers; preset paper scales them"):
        released.layers_of(20)
    assert Preset.paper(layers=(-1, 0)).layers_of(5) == (4, 0)
    assert layers_of(range(2, 4), 5) == (2, 3) and layers_of(-1, 5) == layers_of([4], 5) == (4,)
    for layers, message in [((5,), "expected numbers from -5 to 4"), ((4, -1), "each layer once"), ("each", "'paper'")]:
        with pytest.raises(ValueError, match=f"layers: .*{message}"):
            layers_of(layers, 5)


def test_layers_among_those_with_attention() -> None:
    """The numbers of layers are those of Qwen3.5 (every fourth of 32, 64 and 24), LFM2 and a made-up model of five."""
    every_fourth = {depth: range(3, depth, 4) for depth in (24, 32, 64)}
    paper, released, lfm2 = Preset.paper(), Preset.release(), (2, 5, 8, 10, 12, 14)
    assert [paper.layers_of(depth, every_fourth[depth]) for depth in (24, 32, 64)] == [
        (19, 23), (23, 27), (47, 51, 55, 59),
    ]  # fmt: skip
    assert paper.layers_of(16, lfm2) == (12, 14)
    assert paper.layers_of(5, (0,)) == (0,) and paper.layers_of(5, (0, 1, 2)) == (1, 2)
    assert released.layers_of(32, every_fourth[32]) == (23,) and released.layers_of(24, range(20, 24)) == (
        20,
        21,
        22,
        23,
    )
    with pytest.raises(ValueError, match=r"got attention in layers \[2, 5, 8, 10, 12, 14\]; preset paper scales them"):
        released.layers_of(16, lfm2)
    assert Preset.paper(layers="all").layers_of(16, reversed(lfm2)) == lfm2 and layers_of("all", 3) == (0, 1, 2)
    assert layers_of((-2, 2), 16, lfm2) == (14, 2)
    with pytest.raises(ValueError, match=r"layers: layer 3 has no softmax attention, expected layers among \[2, 5, 8"):
        layers_of((2, 3), 16, lfm2)
    with pytest.raises(ValueError, match="layers: expected a model with softmax attention, got none in any of its 16"):
        layers_of("all", 16, ())
    for depth in range(1, 90):
        for preset in (paper, Preset.paper(layers="all")):
            assert preset.layers_of(depth, range(depth)) == preset.layers_of(depth)


def test_presets_survive_json() -> None:
    mine = Preset.release(rows=("word", "red"), layers=(0, -1), lam=0.5, size=(40, 30), layer_weights=(1, 2))
    for preset in (Preset.paper(), Preset.release(), mine, Preset.paper(name="mine", rows=4, top=None, floor=2)):
        assert Preset.of(json.loads(json.dumps(preset.to_dict()))) == preset
    assert Preset.release(keep=0.3).to_dict() == {"preset": "release", "keep": 0.3}
    assert Preset.of("release") == Preset.release() and Preset.of(mine) is mine
    for kind in ("word", "text"):
        assert Preset.of({"rows": [kind, "the red"]}).rows == (kind, "the red")
    with pytest.raises(ValueError, match=r"^preset: .*'lambda' \(did you mean 'lam'\?\); .* preset, name, layers"):
        Preset.of({"lambda": 1})
    with pytest.raises(ValueError, match="preset: expected one of 'paper', 'release'"):
        Preset.of("papers")
    with pytest.raises(TypeError, match="preset: expected a name"):
        Preset.of(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": ""}, ValueError, "name"),
        ({"layers": ()}, ValueError, "layers: expected at least one"),
        ({"layers": "each"}, ValueError, "layers: expected one of"),
        ({"layers": (1.5,)}, TypeError, "layers.0."),
        ({"rows": 0}, ValueError, "rows: expected an integer of at least 1"),
        ({"rows": "first"}, ValueError, "rows: expected one of"),
        ({"rows": ("word", "")}, ValueError, "rows.1."),
        ({"rows": ("word",)}, TypeError, "rows.1."),
        ({"rows": ("text", " ")}, ValueError, "rows.1."),
        ({"rows": ("text", "red", "cat")}, TypeError, "rows.1."),
        ({"rows": ("words", "red")}, TypeError, "rows: expected one choice"),
        ({"steps": "last"}, ValueError, "steps"),
        ({"step_weights": (1.0,)}, ValueError, "step_weights: expected None with t_end"),
        ({"steps": "t_full", "step_weights": (-1.0,)}, ValueError, "step_weights.0."),
        ({"layer_weights": (float("nan"),)}, ValueError, "layer_weights.0."),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"normalize": "l2"}, ValueError, "normalize"),
        ({"keep": 0.0}, ValueError, "keep"),
        ({"floor": 3}, ValueError, "top, floor"),
        ({"connectivity": 6}, ValueError, "connectivity"),
        ({"score": "area"}, ValueError, "score"),
        ({"fill": (0, 0)}, TypeError, "fill"),
        ({"resample": "cubic"}, ValueError, "resample"),
        ({"size": "full"}, ValueError, "size"),
        ({"size": (0, 3)}, ValueError, "size"),
        ({"limit": 0.1}, ValueError, "limit"),
        ({"general_prompt": " "}, ValueError, "general_prompt"),
        ({"suffix": None}, TypeError, "suffix"),
        ({"images": "both"}, ValueError, "images"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_pixels": 0}, ValueError, "max_pixels"),
    ],
)
def test_bad_presets_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Preset.paper(**changes)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_with_an_orientation_is_refused(orientation: int) -> None:
    """The maps may be of its stored or of its rotated pixels."""
    image, (task, general) = photograph(33, 33), maps((3, 5), layers=3)
    expected = carve(image, task, general, grid=(3, 5))
    image.getexif()[0x0112] = orientation
    if orientation == 1:
        assert carve(image, task, general, grid=(3, 5)).regions.box == expected.regions.box
        return
    with pytest.raises(ValueError, match=r"^image: .*exif_transpose"):
        carve(image, task, general, grid=(3, 5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": "photo.png"}, TypeError, "image: expected a PIL image"),
        ({"task": torch.rand(2, 15)}, ValueError, "task: expected shape"),
        ({"task": torch.full((3, 2, 15), float("nan"))}, ValueError, "task: expected finite values"),
        (
            {"task": numpy.ones((3, 2, 15))},
            TypeError,
            r"task: expected a tensor, got a NumPy array of float64 and shape",
        ),
        ({"general": torch.rand(3, 2, 14)}, ValueError, r"general: expected shape \[3, T, 15\], .* shape \[3, 2, 14\]"),
        ({"grid": (4, 4)}, ValueError, "got 4 x 4 = 16 tokens"),
        ({"grid": (0, 15)}, ValueError, r"^grid\[0\]: expected an integer of at least 1"),
        ({"grid": 15}, TypeError, r"^grid: expected a pair \(height, width\), got int 15$"),
        ({"grid": [(3, 4), (0, 3)]}, ValueError, r"^grid\[1\]\[0\]: expected an integer of at least 1"),
        ({"preset": "newspaper"}, ValueError, "preset"),
        ({"preset": {"layer_weights": [1, 2]}}, ValueError, "layer_weights: expected 3 weights"),
        ({"box": (0, 0, 40, 17)}, ValueError, "box: expected 0 <= x0 < x1 <= 33"),
        ({"box": (5, 5, 5, 9)}, ValueError, "box: expected"),
        ({"box": (0, 0, float("nan"), 9)}, ValueError, "box.2.: expected a finite number"),
        ({"box": "all"}, TypeError, "box: expected four numbers"),
        ({"grid": [(3, 4), (1, 3)], "box": (0, 0, 9, 9)}, ValueError, "box: expected 2 boxes"),
        ({"backend": "triton"}, BackendUnavailable, "triton"),
    ],
)
def test_bad_arguments_of_carve_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    task, general = maps((3, 5), layers=3)
    with pytest.raises(error, match=message):
        carve(**{"image": photograph(33, 17), "task": task, "general": general, "grid": (3, 5), **changes})


@pytest.mark.parametrize("normalize", ["none", "minmax"])
def test_a_contrast_that_differs_by_rounding_alone_is_constant(normalize: str) -> None:
    generator = torch.Generator().manual_seed(0)
    general = torch.rand(2, 1, 12, generator=generator) + 0.1
    noise = torch.randn(2, 1, 12, generator=generator)
    preset = Preset.paper(lam=0.0, normalize=normalize, layers=(0, 1))
    for size, reason in ((1e-7, "the saliency is constant"), (1e-3, None)):
        task = general * (1 + size * noise)
        outcome = carve(Image.new("RGB", (40, 30)), task, general, grid=(3, 4), box=(0, 0, 40, 30), preset=preset)
        assert outcome.reason == reason
