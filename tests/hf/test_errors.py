"""A wrong argument of what reads a model is refused by the name that was typed, before the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import CarveEngine, Preset, Probe, capture_attention, layout_of, load, open_video, profile
from tests.support.families import IMAGES, family, inputs_of
from tests.support.tiny_models import make_image
from tests.support.wrong_arguments import at_least, either, is_integer, one_of, optional, refusals

QUESTION, PHOTO = "what digit is red", make_image(60, 40, 1)
SHORT = Preset.paper(max_new_tokens=1)
TEXT, COUNT = one_of("x"), at_least(1, is_integer)


def is_image(value: Any) -> bool:
    return isinstance(value, Image.Image)


def is_function(value: Any) -> bool:
    return value is None or callable(value)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_range(value: Any) -> bool:
    return isinstance(value, range) or type(value) is type(iter([]))


def is_path(value: Any) -> bool:
    return isinstance(value, (str, Path))


def is_list(value: Any) -> bool:
    """Whether several at once: what cannot be used of them is a failure in the result."""
    return isinstance(value, (list, tuple)) or is_range(value)


def engine() -> CarveEngine:
    return CarveEngine(*family("llava"), preset=SHORT, memory=False)


def test_capture_attention() -> None:
    model, processor = family("llava")
    right = {"model": model, "layers": [1], "rows": "last", "tokens": None, "processor": processor, "max_steps": 4}
    right |= {"on_layer": None, "backend": "auto", "fused": False, "grad": False, "heads": "mean"}
    layers = either(is_layer, one_of([1], (1, 2), (-3, -4), {1, 2}), is_range, is_scalar)
    accepts = {
        "layers": layers,
        "rows": either(COUNT, is_scalar, one_of([1], (1, 2), (-3, -4)), is_range),
        "max_steps": COUNT,
    }
    accepts |= {"tokens": either(one_of(None, [1], (1, 2)), is_range), "on_layer": is_function, "fused": is_flag}
    accepts |= {"grad": is_flag, "processor": one_of(None)}
    more: dict[str, list[Any]] = {
        "layers": [[99], "deep", [1.0], [1, 1]],
        "tokens": [[-2], torch.zeros(3)],
        "heads": ["all"],
    }
    assert not refusals(capture_attention, right, accepts, more=more)


def is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def is_layer(value: Any) -> bool:
    return is_integer(value) and -4 <= value < 4


def test_layout_of() -> None:
    model, processor = family("llava")
    right = {
        "model": model,
        "processor": processor,
        "inputs": inputs_of("llava", 1),
        "images": IMAGES[:1],
        "videos": None,
    }
    more: dict[str, list[Any]] = {"images": [[PHOTO, PHOTO], ["image.png"], [[PHOTO], [PHOTO]]], "inputs": [{}]}
    # A (height, width) is accepted too, and an image that is black is not compared with the inputs.
    accepts = {"videos": one_of(None), "images": either(one_of((1, 2)), is_image)}
    assert not refusals(layout_of, right, accepts, more=more)


def test_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = family("llava")
    right = {"model": model, "processor": processor, "preset": SHORT, "profile": None, "backend": "auto"}
    right |= {"max_image_pixels": 10**6, "memory": None, "plain": True, "fit": None}
    accepts = {"max_image_pixels": COUNT, "memory": one_of(None, "x"), "plain": is_flag, "preset": one_of(None, {})}
    accepts |= {"profile": either(is_path, one_of(None, {}, {"a": 1})), "fit": one_of(None)}
    more = {"processor": [processor.tokenizer, processor.image_processor, type(processor)], "fit": ["crop"]}
    assert not refusals(CarveEngine, right, accepts, more=more)


def test_a_question() -> None:
    right = {"image": PHOTO, "question": QUESTION, "prompt": None, "on_progress": None}
    more = {"image": ["missing.png"], "prompt": ["no image token"]}
    accepts = {
        "image": either(is_image, is_list),
        "question": either(TEXT, is_list),
        "prompt": either(one_of(None), is_list),
    }
    accepts["on_progress"] = is_function
    assert not refusals(engine(), right, accepts, more=more)


def test_a_question_about_several_images() -> None:
    right = {"images": [PHOTO], "question": QUESTION, "refine": None, "prompt": None, "on_progress": None}
    more: dict[str, list[Any]] = {"images": [["missing.png"], [PHOTO, 3]], "refine": [[1], ["0"]]}
    accepts = {"images": is_image, "question": TEXT, "prompt": one_of(None), "on_progress": is_function}
    accepts["refine"] = either(one_of(None, 0), lambda value: is_integer(value) and value == 0)
    assert not refusals(engine().ask, right, accepts, more=more)


def test_a_stream() -> None:
    def stream(**given: Any) -> Any:
        return engine().stream(**given)

    right = {"images": [PHOTO], "questions": [QUESTION], "prompts": None, "tokens": 1, "on_progress": None}
    several = either(is_image, is_path, is_list)
    accepts = {"images": several, "questions": several, "prompts": either(one_of(None), several)}
    accepts |= {"tokens": optional(COUNT), "on_progress": is_function}
    assert not refusals(stream, right, accepts)


def test_load(tmp_path: Path) -> None:
    right = {"model": "small", "dtype": "auto", "device": None, "allow_pickle": False}
    more: dict[str, list[Any]] = {"dtype": ["int8", torch.int8], "device": ["gpu", "cuda:9"], "model": [tmp_path]}
    assert not refusals(load, right, {"allow_pickle": is_flag, "device": one_of(None)}, more=more)


def test_open_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 32, 32
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        container.mux(stream.encode())
    right = {"path": path, "max_frames": 2, "fps": None, "max_image_pixels": 10**6, "progress": None}
    accepts = {"max_frames": COUNT, "max_image_pixels": COUNT, "progress": is_function}
    accepts["fps"] = optional(lambda value: at_least(0)(value) and value > 0)
    assert not refusals(open_video, right, accepts, more={"path": [tmp_path / "none.mp4"], "fps": [0]})


def test_profile() -> None:
    model, processor = family("llava")
    right = {"model": model, "processor": processor, "probes": [Probe(PHOTO, QUESTION)], "preset": SHORT, "rows": None}
    right |= {"steps": ["t_end"], "backend": "auto", "max_image_pixels": 10**6, "fit": None, "on_progress": None}
    accepts = {"preset": one_of(None, {}), "rows": optional(is_range), "max_image_pixels": COUNT}
    accepts |= {"on_progress": is_function, "rows": either(one_of(None, [1], (1, 2)), is_range)}
    accepts["fit"] = one_of(None)
    more: dict[str, list[Any]] = {"probes": [[PHOTO], [Probe(PHOTO, QUESTION), 3]], "steps": [["t_last"]], "fit": ["x"]}
    assert not refusals(profile, right, accepts, more=more)
