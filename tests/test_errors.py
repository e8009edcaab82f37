"""A wrong argument of a public function that knows no model is refused by the name that was typed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import carve_kernels
from carve_kernels import Capture, Memory, Preset, Probe, View, VisualLayout
from carve_kernels.conformance import NotConforming, check, check_frontend
from carve_kernels.plugin import KernelsBackend, backend
from tests.support.wrong_arguments import (
    at_least,
    either,
    is_integer,
    is_limit,
    is_number,
    never,
    nothing,
    one_of,
    optional,
    refusals,
)

NAN = float("nan")


def flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def is_map(value: Any) -> bool:
    """Whether a float map [H, W] of finite numbers."""
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_floating_point()


def lam(value: Any) -> bool:
    return at_least(0)(value)


ANY = {
    "mask": nothing, "positions": nothing, "softcap": optional(lambda value: is_number(value) and value > 0),
    "window": nothing, "sink": nothing, "lse": nothing, "out": nothing, "output": nothing, "check": flag,
    "scale": is_number, "lam": lam, "layer_weights": nothing, "step_weights": nothing, "box": nothing, "ends": nothing,
    "seen": nothing, "connectivity": nothing, "floor": nothing, "regions": nothing,
}  # fmt: skip

QUERY, KEY, VALUE = torch.rand(2, 4, 3, 32), torch.rand(2, 2, 11, 32), torch.rand(2, 2, 11, 16)
TOKENS = torch.tensor([[1, 2, 3, 7, 9], [0, 5, 6, -1, -1]])
CAPTURED = {
    "query": QUERY, "key": KEY, "tokens": TOKENS, "scale": 0.3, "mask": None, "positions": None, "softcap": None,
    "window": None, "sink": None, "heads": "mean", "out": None, "check": None, "backend": "auto",
}  # fmt: skip
WRONG_CAPTURED: dict[str, list[Any]] = {
    "query": [QUERY.numpy(), QUERY.tolist(), QUERY.long(), QUERY[0], QUERY * NAN],
    "key": [KEY.double(), KEY[:1], KEY[..., :31], KEY[:, :0], KEY.to("meta"), torch.rand(2, 3, 11, 32)],
    "tokens": [TOKENS.float(), TOKENS.numpy(), TOKENS[:1], TOKENS + 9, TOKENS - 9],
    "mask": [torch.ones(2, 1, 3, 11), torch.ones(2, 1, 3, 10, dtype=torch.bool)],
    "positions": [torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)],
    "sink": [torch.zeros(5)],
    "heads": ["all"],
    "backend": ["gpu", "cuda"],
}

TASK, GENERAL = torch.rand(2, 3, 12) + 0.1, torch.rand(2, 3, 12) + 0.1
CONTRASTED = {"task": TASK, "general": GENERAL, "grid": (3, 4), "size": (7, 10)}
WRONG_CONTRASTED: dict[str, list[Any]] = {
    "task": [TASK.numpy(), TASK.half(), -TASK, TASK * NAN, TASK[0]],
    "general": [GENERAL.double(), -GENERAL, GENERAL * NAN, GENERAL[..., 1:], GENERAL[:1]],
    "grid": [(4, 4), (3.0, 4), (3, 4, 1), "34"],
    "size": [(0, 4), (7.5, 10), (7, 10, 3), [(7, 10)]],
    "layer_weights": [[1, 2, 3], [1, -1], [1, NAN], torch.ones(3)],
    "step_weights": [[1, 2], [1, 2, -1]],
}

SALIENCY = torch.rand(7, 9)
IMAGE = Image.new("RGB", (80, 60), "gray")
MASK = torch.ones(60, 80, dtype=torch.bool)
BOXES: list[Any] = [(0, 0, 90, 60), (5, 5, 5, 9), (NAN, 0, 1, 1), "0 0 1 1", (0, 0, 80)]
FRAMES = [View(torch.arange(12) + 12 * i, (3, 4), (0, 0, 80, 60), 0, (i, i + 1), "frame") for i in range(2)]


def test_capture() -> None:
    more = {**WRONG_CAPTURED, "lse": [torch.zeros(2, 4, 2)]}
    assert not refusals(carve_kernels.capture, {**CAPTURED, "lse": None}, ANY, more=more)


def test_attention() -> None:
    more = {**WRONG_CAPTURED, "value": [VALUE[:1], VALUE.double()], "output": [torch.zeros(2, 4, 3, 15)]}
    right = {**CAPTURED, "value": VALUE, "output": None}
    assert not refusals(carve_kernels.attention, right, ANY, more=more)


def test_column_sums() -> None:
    right = {"query": QUERY, "key": KEY, "scale": 0.3, "mask": None, "positions": None, "softcap": None, "lse": None}
    right |= {"window": None, "sink": None, "heads": "each", "backend": "auto", "check": None}
    more = {**WRONG_CAPTURED, "heads": ["mean"], "key": [KEY.double(), KEY[:1]], "backend": ["gpu"]}
    assert not refusals(carve_kernels.column_sums, right, ANY, more=more)


def test_capture_layers() -> None:
    out = Capture(torch.zeros(4, 2, 2, 3, 5), torch.zeros(4, 2, 2, 3), torch.zeros(4, 2, 2, 3))
    right = {name: value for name, value in CAPTURED.items() if name not in ("heads", "check")}
    right |= {"query": [QUERY] * 2, "key": [KEY] * 2, "sink": (), "out": out, "step": torch.tensor(0), "first": 0}
    more: dict[str, list[Any]] = {
        "query": [[QUERY, QUERY[0]], [QUERY]],
        "key": [[KEY, KEY.double()], [KEY]],
        "step": [torch.tensor(4), torch.tensor(-1), torch.tensor([0])],
        "first": [1, 2**80],
        "sink": [[torch.zeros(5)] * 2],
    }
    accepts = {**ANY, "sink": one_of([], ()), "first": lambda value: is_integer(value) and value == 0, "out": never}
    # The values of the tokens are not checked.
    more = {**WRONG_CAPTURED, **more, "tokens": WRONG_CAPTURED["tokens"][:3]}
    assert not refusals(carve_kernels.capture_layers, right, accepts, more=more)


def test_contrast() -> None:
    right = {**CONTRASTED, "lam": "mean", "layer_weights": None, "step_weights": None, "normalize": "none"}
    right |= {"check": None, "backend": "auto"}
    accepts = {**ANY, "step_weights": either(nothing, is_range, is_vector), "size": one_of((1, 2))}
    accepts["layer_weights"] = one_of(None, (1, 2))
    assert not refusals(carve_kernels.contrast, right, accepts, more=WRONG_CONTRASTED)
    # The overloads for a list of views.
    assert carve_kernels.contrast(TASK, GENERAL, [(1, 4), (2, 4)], [(2, 4), (4, 4)])[1].shape == (4, 4)


def is_range(value: Any) -> bool:
    return isinstance(value, range)


def is_vector(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == (3,)


def test_regions() -> None:
    right = {"saliency": SALIENCY, "keep": 0.4, "top": 2, "floor": None, "connectivity": None, "score": "sum"}
    more = {"saliency": [SALIENCY.numpy(), SALIENCY.long(), SALIENCY[0], SALIENCY * NAN], "keep": [1.1, "0.4"]}
    accepts = {**ANY, "saliency": is_map, "top": is_limit}
    assert not refusals(carve_kernels.regions, {**right, "check": None, "backend": "auto"}, accepts, more=more)


def test_saliency() -> None:
    right = {**CAPTURED, "query": QUERY[:1, :, :1], "key": KEY[:1], "tokens": TOKENS[:1], "general": torch.ones(1, 5)}
    right |= {"grid": (1, 5), "size": (7, 10), "lam": "mean", "layer_weights": None, "normalize": "none"}
    right |= {"regions": None}
    del right["heads"]
    more = {**WRONG_CAPTURED, "general": [torch.ones(2, 5), torch.ones(1, 5) * NAN, torch.ones(1, 2, 5)]}
    # One row of the batch is right here.
    more |= {"key": [KEY[:1].double(), KEY], "tokens": [TOKENS[:1].float(), TOKENS, TOKENS[:1] + 9]}
    more["regions"] = [{"keep": 2, "top": 1}, {"top": 1}, {"kep": 1}]
    accepts = {**ANY, "layer_weights": one_of(None, [1]), "sink": one_of(None, [], ()), "size": one_of((1, 2))}
    lines = refusals(carve_kernels.saliency, right, accepts, more=more)
    # Of options in a dict, the option is named.
    assert [line for line in lines if "'keep: expected a number from 0 to 1" not in line] == []


def test_zoom() -> None:
    right = {"image": IMAGE, "mask": MASK, "box": (5, 5, 20, 20), "fill": (0, 0, 0), "resample": "lanczos"}
    right |= {"size": "longer", "limit": 4.0}
    more: dict[str, list[Any]] = {"mask": [MASK.float(), MASK[:5], MASK.numpy()], "box": [*BOXES, (5.0, 5, 20, 20)]}
    more |= {"fill": [(0, 0), (0, 0, 256), "red"], "size": ["fit", (0, 4)], "limit": [0.5], "image": ["image.png"]}
    accepts = {"mask": nothing, "limit": at_least(1), "size": one_of((1, 2)), "fill": is_range}
    assert not refusals(carve_kernels.zoom, right, accepts, more=more)


def test_overlay() -> None:
    right = {"image": IMAGE, "saliency": SALIENCY, "alpha": 0.5, "box": None, "seen": None, "ends": None}
    more: dict[str, list[Any]] = {"seen": [MASK.float(), MASK[:5], MASK.numpy()], "box": [(5, 5, 5, 9), "0 0 1 1"]}
    more |= {"ends": [(1, 0), (NAN, 1), "01"], "saliency": [SALIENCY * NAN], "image": [numpy.zeros((60, 80, 3))]}
    accepts = {**ANY, "saliency": is_map, "alpha": lambda value: is_number(value) and 0 <= value <= 1}
    accepts |= {"image": lambda value: isinstance(value, Image.Image), "ends": one_of(None, (1, 2))}
    assert not refusals(carve_kernels.overlay, right, accepts, more=more)


def test_carve() -> None:
    right = {"image": IMAGE, "task": TASK, "general": GENERAL, "grid": (3, 4), "preset": "paper", "box": None}
    more = {**WRONG_CONTRASTED, "image": ["image.png", numpy.zeros((60, 80, 3))], "box": BOXES}
    more["preset"] = ["papers", {"kep": 1}]
    accepts = {**ANY, "preset": one_of({})}
    assert not refusals(carve_kernels.carve, {**right, "backend": "auto"}, accepts, more=more)


def test_contrast_frames() -> None:
    right = {"task": TASK.repeat(1, 1, 2), "general": GENERAL.repeat(1, 1, 2), "views": FRAMES, "size": (60, 80)}
    right |= {"preset": "paper", "backend": "auto"}
    more = {**WRONG_CONTRASTED, "views": [[FRAMES[0], 1], FRAMES[0]], "preset": ["papers"]}
    accepts = {"preset": one_of({}), "size": one_of((1, 2))}
    assert not refusals(carve_kernels.contrast_frames, right, accepts, more=more)


def test_preset() -> None:
    whole = either(at_least(1, is_integer), is_scalar)
    accepts = {
        **ANY,
        "name": one_of("x"),
        "layers": either(one_of([1], (1, 2), (-3, -4)), is_range),
        "rows": either(whole, one_of([1], (1, 2), (-3, -4)), is_range),
        "layer_weights": either(one_of(None, [], [1], (), (1, 2)), is_range, is_flat),
        "lam": either(at_least(0), is_scalar),
        "top": either(is_limit, is_scalar),
        "fill": is_range,
        "size": one_of((1, 2)),
        "limit": either(at_least(1), is_scalar),
        "general_prompt": one_of("x"),
        "suffix": one_of("x", ""),
        "max_new_tokens": whole,
        "max_pixels": optional(whole),
    }
    right = {field.name: getattr(Preset(), field.name) for field in dataclasses.fields(Preset)}
    assert not refusals(Preset, right, accepts, more={"fill": [(0, 0, 256)], "keep": [1.5], "size": ["fit"]})


def is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def is_flat(value: Any) -> bool:
    return isinstance(value, (numpy.ndarray, torch.Tensor)) and value.ndim == 1


def test_view_and_layout() -> None:
    view = {"tokens": torch.arange(12), "grid": (3, 4), "box": (0, 0, 80, 60), "image": 0, "frame": None}
    view |= {"kind": "base", "seconds": None}
    pair = one_of(None, (1, 2), (-3, -4))
    assert not refusals(View, view, {"image": at_least(0, is_integer), "frame": pair, "seconds": pair})
    layout = {"views": ((FRAMES[0],),), "sizes": (((60, 80),),), "measured": False}
    more: dict[str, list[Any]] = {
        "views": [(FRAMES[0],), ((FRAMES[0], 1),)],
        "sizes": [(60, 80), ((60, 80),), (((0, 80),),), ()],
    }
    assert not refusals(VisualLayout, layout, {"measured": one_of(True)}, more=more)


def test_probe() -> None:
    right = {"image": IMAGE, "question": "?", "paraphrases": (), "boxes": ()}
    several = one_of([], ())
    accepts = {"question": one_of("x"), "paraphrases": several, "boxes": several, "image": is_source}
    assert not refusals(Probe, right, accepts, more={"boxes": [(5, 5, 9, 9), ((5, 5, 5, 9),)], "question": [" "]})


def is_source(value: Any) -> bool:
    return isinstance(value, (str, Path, Image.Image))


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    right = {"folder": None, "maps_bytes": 1, "prefix_bytes": 1, "images": 1, "folder_bytes": 1}
    counts = {name: at_least(0, is_integer) for name in right}
    assert not refusals(Memory, right, counts | {"folder": one_of(None, "x")})


def test_maps_of_the_plug_in() -> None:
    right = {"query": QUERY.numpy(), "key": KEY.tolist(), "tokens": TOKENS, "scale": 0.3, "mask": None}
    more: dict[str, list[Any]] = {"query": [QUERY[0], QUERY[0].tolist(), [[[[1.0, 2.0], [3.0]]]]]}
    more |= {"tokens": [TOKENS + 0.5, TOKENS[:1], [[1], [2, 3]]], "key": [KEY[..., :31]]}
    assert not refusals(backend.maps, {**right, "positions": None}, ANY, more=more)


def test_contrast_and_regions_of_the_plug_in() -> None:
    right = {**CONTRASTED, "task": TASK.tolist(), "general": GENERAL.numpy(), "grid": [3, 4], "lam": "mean"}
    right |= {"layer_weights": None, "step_weights": None, "normalize": "none"}
    more: dict[str, list[Any]] = {"task": [TASK[0], [[[1.0, 2.0], [3.0]]], -TASK], "general": [GENERAL[..., 1:]]}
    accepts = {**ANY, "size": one_of((1, 2)), "lam": either(at_least(0), is_scalar)}
    accepts |= {"layer_weights": one_of(None, (1, 2)), "step_weights": either(nothing, is_range, is_flat)}
    assert not refusals(backend.contrast, right, accepts, more=more, leaves=["step_weights"])
    right = {"saliency": SALIENCY.tolist(), "keep": 0.4, "top": 2, "floor": None, "connectivity": None, "score": "sum"}
    more = {"saliency": [[[1.0, 2.0], [3.0]], SALIENCY[0]]}
    accepts = {**ANY, "saliency": either(is_map, is_matrix), "top": is_limit}
    assert not refusals(backend.regions, right, accepts, more=more)


def is_matrix(value: Any) -> bool:
    """Whether an array [H, W] of numbers without NaN."""
    return isinstance(value, numpy.ndarray) and value.ndim == 2 and value.dtype.kind == "f" and value[0, 0] == 0


def test_carve_and_load_of_the_plug_in() -> None:
    right = {"image": IMAGE, "task": TASK, "general": GENERAL, "grid": (3, 4), "preset": "paper", "box": None}
    pixels = [numpy.zeros((60, 80, 3)), numpy.zeros((3, 60, 80), numpy.uint8), [[1, 2], [3]]]
    accepts = {**ANY, "preset": one_of({})}
    assert not refusals(backend.carve, right, accepts, more={"image": pixels, "box": BOXES})
    assert not refusals(KernelsBackend, {"kernels": "auto"}, {})


@pytest.mark.parametrize("version", [0, 2])
def test_a_backend_of_another_version_is_one_error(version: int) -> None:
    class Other(KernelsBackend):
        pass

    Other.version = version
    reason = rf"^1 difference.*\nthe backend is for version {version} of the protocol, expected 1; install a newer"
    for call in (lambda: check(Other()), lambda: check_frontend(lambda engine: engine.name, Other())):
        with pytest.raises(NotConforming, match=reason):
            call()


def test_a_frontend_is_a_function() -> None:
    for value in (5, "frontend", None):
        with pytest.raises(TypeError, match=r"^frontend: expected a function of a backend, got "):
            check_frontend(value)  # type: ignore[arg-type]
