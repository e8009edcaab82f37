"""docs/contributing.md works: a toy backend, a toy stage and a toy model family are added by its steps, and removed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

import carve_kernels
from carve_kernels import backends, ops
from carve_kernels.backends import reference
from carve_kernels.hf.families import FAMILIES, Family
from carve_kernels.hf.inputs import build_prompt
from tests.support.families import family, inputs_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
TASK, GENERAL = torch.rand(2, 3, 12), torch.rand(2, 3, 12)
AddFile = Callable[[Any, str, str], None]


class ToyConfig(LlavaConfig):
    model_type = "toy_llava"


@pytest.fixture
def add_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddFile]:
    """Adds a file to a package of carve_kernels until the test is over: add_file(package, "name.py", text)."""
    before, attributes = set(sys.modules), {package: set(vars(package)) for package in (backends, ops, reference)}

    def add(package: Any, name: str, text: str) -> None:
        folder = tmp_path / package.__name__
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        if str(folder) not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        importlib.invalidate_caches()

    yield add
    for name in [name for name in set(sys.modules) - before if name.startswith("carve_kernels.") and "toy" in name]:
        del sys.modules[name]
    for package, names in attributes.items():
        for name in [name for name in set(vars(package)) - names if "toy" in name]:
            delattr(package, name)
    for cached in (backends._module, backends._package):
        cached.cache_clear()


def name_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a name to BACKENDS; modules that have imported it already get the longer tuple too."""
    old, new = backends.BACKENDS, (*backends.BACKENDS, name)
    for module in [module for path, module in sys.modules.items() if path.startswith("carve_kernels")]:
        if vars(module).get("BACKENDS") is old:
            monkeypatch.setattr(module, "BACKENDS", new)
    monkeypatch.setattr(backends, "_CHOICES", ("auto", *new))


@pytest.mark.parametrize("title", ["Add a backend", "Add a stage", "Add a model family"])
def test_a_recipe_has_six_steps_whose_files_exist(title: str) -> None:
    recipe = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    assert re.findall(r"^(\d)\. ", recipe, re.MULTILINE) == list("123456")
    for path in re.findall(r"`((?:carve_kernels|tests|docs)/[^`]*)`", recipe):
        assert re.search(r"NAME|STAGE", path) or (ROOT / path).exists(), path


def test_a_backend_is_added_in_six_steps(add_file: AddFile, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got str 'toy'"):
        carve_kernels.contrast(TASK, GENERAL, (3, 4), (6, 8), backend="toy")
    # 1, 2
    add_file(
        backends,
        "toy/__init__.py",
        """
        def unavailable():
            return None

        def devices():
            return ("cpu",)
        """,
    )
    add_file(
        backends,
        "toy/contrast.py",
        """
        from carve_kernels.backends.reference import contrast

        def supports(task, *_args, **_options):
            return "it has one layer" if len(task) > 2 else None

        def forward(*args, **options):
            return contrast.forward(*args, **options) + 1
        """,
    )
    add_file(backends, "toy/capture.py", "from carve_kernels.backends.reference.capture import forward, supports")
    # 3
    name_backend("toy", monkeypatch)
    # 4
    for stage, reason in {**dict.fromkeys(backends.STAGES, "not written"), "contrast": None, "capture": None}.items():
        monkeypatch.setitem(backends.SUPPORT[stage], "toy", reason)
    expected = carve_kernels.contrast(TASK, GENERAL, (3, 4), (6, 8), backend="reference")
    served = carve_kernels.contrast(TASK, GENERAL, (3, 4), (6, 8), backend="toy")
    assert torch.equal(served, expected + 1)
    with pytest.raises(carve_kernels.BackendUnavailable, match="toy cannot serve regions: not written"):
        carve_kernels.regions(expected, keep=0.4, top=1, backend="toy")
    with pytest.raises(carve_kernels.BackendUnavailable, match="toy cannot serve contrast: it has one layer"):
        carve_kernels.contrast(TASK.repeat(2, 1, 1), GENERAL.repeat(2, 1, 1), (3, 4), (6, 8), backend="toy")
    # 5
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("toy",))
    assert torch.equal(carve_kernels.contrast(TASK, GENERAL, (3, 4), (6, 8)), served)
    assert re.search(r"^contrast +toy +yes", carve_kernels.explain(), re.MULTILINE)
    # 6
    assert not torch.allclose(served, expected), "a comparison with the reference finds its fault"


def test_a_session_captures_with_an_added_backend(add_file: AddFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add_file(backends, "toy/__init__.py", "from carve_kernels.backends.reference import devices, unavailable")
    add_file(
        backends,
        "toy/capture.py",
        """
        from carve_kernels.backends.reference import capture
        from carve_kernels.backends.reference.capture import supports

        calls = 0

        def forward(*args, **options):
            global calls
            calls += 1
            return capture.forward(*args, **options)
        """,
    )
    name_backend("toy", monkeypatch)
    monkeypatch.setitem(backends.SUPPORT["capture"], "toy", None)
    model, maps = family("llava")[0], {}
    for name in ("reference", "toy"):
        with torch.no_grad(), carve_kernels.capture_attention(model, layers=[0, 2], backend=name) as session:
            model(**inputs_of("llava", 1))
        maps[name] = session.maps.values
    assert torch.equal(maps["reference"], maps["toy"])
    assert importlib.import_module("carve_kernels.backends.toy.capture").calls > 0


def test_a_stage_is_added_in_six_steps(add_file: AddFile, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1
    add_file(
        reference,
        "toy_flip.py",
        """
        def supports(*_args, **_options):
            return None

        def forward(saliency):
            return saliency.amax() - saliency
        """,
    )
    # 2, 3
    monkeypatch.setattr(backends, "STAGES", (*backends.STAGES, "toy_flip"))
    row = {name: None if name == "reference" else "not written" for name in backends.BACKENDS}
    monkeypatch.setitem(backends.SUPPORT, "toy_flip", row)
    # 4
    add_file(
        ops,
        "toy_flip.py",
        """
        import torch

        from carve_kernels import checks
        from carve_kernels.backends import resolve

        def toy_flip(saliency, *, backend="auto"):
            checks.tensor("saliency", saliency, shape=("H", "W"), dtypes=(torch.float32,))
            return resolve("toy_flip", backend, saliency.device, saliency).forward(saliency)
        """,
    )
    # 5
    monkeypatch.setitem(carve_kernels._SOURCES, "toy_flip", "ops.toy_flip")
    saliency = torch.rand(3, 4)
    try:
        toy_flip = carve_kernels.toy_flip
        assert torch.equal(toy_flip(saliency), saliency.amax() - saliency)
        assert torch.equal(toy_flip(saliency, backend="reference"), toy_flip(saliency))
        with pytest.raises(carve_kernels.BackendUnavailable, match="cpu cannot serve toy_flip: not written"):
            toy_flip(saliency, backend="cpu")
        with pytest.raises(ValueError, match=r"^saliency: expected"):
            toy_flip(saliency[0])
        assert re.search(r"^toy_flip +reference +yes", carve_kernels.explain(), re.MULTILINE)
    finally:
        # A public name is stored where it was first used.
        vars(carve_kernels).pop("toy_flip", None)


def test_a_model_family_is_added_in_six_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1
    llava, processor = family("llava")
    model = LlavaForConditionalGeneration(ToyConfig.from_dict({**llava.config.to_dict(), "model_type": "toy_llava"}))
    model.load_state_dict(llava.state_dict())
    model.generation_config = llava.generation_config
    model.eval()
    image = Image.effect_noise((120, 80), 90).convert("RGB")
    inputs = processor(images=image, text=build_prompt(processor, "what digit is red"), return_tensors="pt")
    measured = carve_kernels.layout_of(model, processor, inputs, [image])
    assert measured.measured
    # 2 and 4; 3 and 5 are for families that differ more.
    monkeypatch.setitem(FAMILIES, "toy_llava", Family("centre_crop"))
    # 6
    layout = carve_kernels.layout_of(model, processor, inputs, [image])
    assert [view.grid for view in layout.views[0]] == [(6, 6)] and not layout.measured
    assert torch.equal(layout.tokens(), measured.tokens())
    maps, results = [], []
    for each in (llava, model):
        with torch.no_grad(), carve_kernels.capture_attention(each, layers=[1], tokens=layout) as session:
            each(**inputs)
        maps.append(session.maps.values)
        preset = carve_kernels.Preset.paper(layers=(1,), max_new_tokens=2)
        results.append(carve_kernels.CarveEngine(each, processor, preset=preset)(image, "what digit is red"))
    assert torch.equal(*maps) and maps[0].any()
    assert results[0].answer == results[1].answer and torch.equal(results[0].saliency, results[1].saliency)
