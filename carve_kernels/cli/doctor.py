"""carve-kernels doctor: which versions are installed, what works, and how to fix what does not."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.text import Text

from carve_kernels.cli import options
from carve_kernels.cli.output import one_line, versions
from carve_kernels.cli.tables import screen, table
from carve_kernels.extras import FIT_TORCHVISION, INSTALL_TORCHVISION, is_interrupted, requirement

Line = tuple[str, bool, str]
"""What was tried, whether it works, and more: facts, or why not."""


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"Show this layout instead. {options.MODEL}")
    ] = None,
    image: Annotated[str | None, options.path("Image file of the layout.", "--image", "-i")] = None,
    output: Annotated[str, options.path("Folder for the figure of the layout.", "--output", "-o")] = "out/doctor",
) -> None:
    """Say which versions, backends, devices and processors work here, and how to fix what does not.

    With --model, show instead where in an image the checkpoint's image tokens lie, and compare it with what is measured
    through its processor and vision tower.
    """
    if model is not None:
        from carve_kernels.cli.layout import show_layout

        if not show_layout(model, image, output):
            raise typer.Exit(1)
        return
    if image is not None:
        raise ValueError(
            "image: expected --model with it, got none; the image is laid out as the model's processor does"
        )
    console = screen()
    system = f"{platform.system()} {platform.machine()}"
    installed = [(name, version or "missing") for name, version in versions().items()]
    console.print(table("Versions", ("package", "version"), [*installed, ("system", system)]))
    backends = dict(_backends())
    columns = ("stage", "backend", "works", "why not, and how to fix it")
    console.print(table("Backends", columns, _backend_rows(backends)))
    transformers = why_not("transformers", "AutoProcessor")
    trials = list(_trials()) if backends and transformers is None else []
    lines = [(what, _yes(works), more) for what, works, more in (*_machine(), *_models(transformers), *trials)]
    console.print(table("Machine and models", ("what", "works", "more"), lines))
    broken = [
        f"{stage} by the reference backend" for (stage, name), why in backends.items() if name == "reference" and why
    ]
    broken += ["transformers"] if transformers else []
    broken += [name for name, works, _ in trials if not works]
    broken += [] if backends else ["torch"]
    if broken:
        console.print(Text(f"To fix: {', '.join(broken)}.", style="bold red"))
        raise typer.Exit(1)
    console.print(Text("Ready.", style="bold green"))


def why_not(module: str, name: str | None = None) -> str | None:
    """Why a module, or a name in it, cannot be imported, or None."""
    try:
        loaded = importlib.import_module(module)
        if name is not None:
            getattr(loaded, name)
    # Incompatible libraries raise errors of any kind.
    except Exception as error:
        if is_interrupted(error):
            raise KeyboardInterrupt from error
        return one_line(error)
    return None


def _backends() -> Iterator[tuple[tuple[str, str], str | None]]:
    """Each stage and backend, and why it does not work, by running a small problem."""
    if why_not("torch"):
        return
    from carve_kernels.backends import BACKENDS, STAGES

    for stage in STAGES:
        for backend in BACKENDS:
            yield (stage, backend), _try(stage, backend)


def _try(stage: str, backend: str) -> str | None:
    import torch

    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    try:
        operator = getattr(importlib.import_module(f"carve_kernels.ops.{stage}"), stage)
        arguments, options = _problem(stage, device)
        operator(*arguments, **options, backend=backend)
    # Any error of a backend is an answer here.
    except Exception as error:
        return one_line(error).removeprefix(f"backend={backend!r}: {backend} cannot serve {stage}: ")
    return None


def _problem(stage: str, device: str) -> tuple[list[Any], dict[str, Any]]:
    import torch

    ramp = torch.arange(12.0, device=device)
    if stage == "capture":
        query, key = torch.ones(1, 2, 1, 32, device=device), torch.ones(1, 2, 12, 32, device=device)
        return [query, key, torch.arange(6, dtype=torch.int32, device=device)[None]], {"scale": 0.1}
    if stage == "column_sums":
        query, key = torch.ones(1, 2, 3, 32, device=device), torch.ones(1, 2, 12, 32, device=device)
        return [query, key], {"scale": 0.1}
    if stage == "attention":
        row, cache = (torch.ones(1, 2, count, 32, dtype=torch.bfloat16, device=device) for count in (1, 12))
        return [row, cache, cache, torch.arange(6, dtype=torch.int32, device=device)[None]], {"scale": 0.1}
    if stage == "contrast":
        return [ramp.view(1, 1, 12), ramp.view(1, 1, 12), (3, 4), (6, 8)], {"lam": 0.1}
    return [ramp.view(3, 4)], {"keep": 0.4, "top": 2}


def _backend_rows(backends: dict[tuple[str, str], str | None]) -> Iterator[tuple[str, str, Text, str]]:
    types: dict[str, str] = {}
    if backends:
        import torch

        from carve_kernels.backends import tried

        types = {"a CPU": "cpu"} | ({"a GPU": "cuda"} if torch.cuda.is_available() else {})
    working = {cell for cell, why in backends.items() if why is None}
    for (stage, backend), why in backends.items():
        devices = [
            device
            for device, name in types.items()
            if backend == next((other for other in tried(stage, name) if (stage, other) in working), None)
        ]
        yield stage, backend, _yes(why is None), why or (f"auto uses it on {' and '.join(devices)}" if devices else "")


def _machine() -> Iterator[Line]:
    why = why_not("torch")
    if why:
        yield "torch", False, why
        return
    import torch

    from carve_kernels.backends import cpu
    from carve_kernels.backends.cuda import driver
    from carve_kernels.backends.native import extension

    missing = cpu.unavailable()
    yield "extension", missing is None, missing or "kernels in use: {}, best here: {}".format(*cpu.isa())
    architectures = () if missing else extension.architectures()
    more = ", ".join(f"sm_{number}" for number in architectures) or "none; build with nvcc on the path or in CUDACXX"
    yield "CUDA kernels", bool(architectures), more
    if architectures:
        try:
            gpu_driver = driver.find()
        except RuntimeError:
            yield "GPU driver", False, "unknown: the extension is older than this package; build it again"
        else:
            yield "GPU driver", gpu_driver.fits, str(gpu_driver)
    yield "CPU", True, f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "GPU", bool(names), ", ".join(names) or "torch finds none; the CPU is used"


def _models(transformers: str | None) -> Iterator[Line]:
    """transformers, torchvision, and the processor of each supported family."""
    if find_spec("transformers") is None:
        yield "transformers", False, f"missing; pip install '{requirement('transformers')}'"
        return
    yield "transformers", transformers is None, transformers or ""
    torchvision = why_not("torchvision") if find_spec("torchvision") else "missing"
    more = (
        "" if torchvision is None else f"does not fit torch and breaks transformers ({torchvision}); {FIT_TORCHVISION}"
    )
    if torchvision == "missing":
        more = f"missing; videos need it, and some processors of images: {INSTALL_TORCHVISION}"
    yield "torchvision", torchvision is None, more
    av = why_not("av") if find_spec("av") else f"missing; videos need it: pip install '{requirement('av')}'"
    yield "av", av is None, av or ""
    if transformers is None and why_not("torch") is None:
        yield from _processors(torchvision)


def _trials() -> Iterator[Line]:
    """Typical uses of transformers, each tried once."""
    from carve_kernels.cli.ask import quiet

    with quiet():
        for name, trial in (("contract with transformers", _contract), ("session", _session), ("engine", _engine)):
            try:
                more, works = trial(), True
            # Any error of a trial is an answer here.
            except Exception as error:
                more, works = one_line(error), False
            yield name, works, more


def _contract() -> str:
    """Whether transformers is as this package expects it, and whether its version was tested."""
    from carve_kernels.hf import names
    from carve_kernels.hf.session import contract

    results = contract.results()
    failed = [f"{check}: {why}" for check, why in results.items() if why is not None]
    tested = "tested" if names.is_tested() else "not tested"
    text = f"{len(results) - len(failed)} of {len(results)} checks hold; {names.version()} is {tested}"
    text += f", {names.TESTED[0]} to {names.TESTED[1]} are"
    if failed:
        raise RuntimeError(f"{text}; {'; '.join(failed)}; install one of those: {names.install_command()}")
    return text


@cache
def _embedded() -> tuple[Any, Any, Any]:
    from carve_kernels.hf.loading import load
    from carve_kernels.models import scenes, small

    return *load(small(), dtype="float32"), scenes.draw_scene(seed=3, level=1, split="test")


def _session() -> str:
    from carve_kernels.hf.session.session import capture_attention

    model, processor, scene = _embedded()
    inputs = processor(images=scene.image, text=f"{processor.image_token} {scene.question}", return_tensors="pt")
    with capture_attention(model, layers=[1]) as session:
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    if session.maps.steps != (0, 1) or not bool((session.maps.mass > 0).all()):
        raise RuntimeError(f"expected maps of 2 steps with mass, got {session.maps.steps} with {session.maps.mass}")
    return "two new tokens of the embedded model, captured in one layer"


def _engine() -> str:
    from carve_kernels.hf.engine.engine import CarveEngine

    model, processor, scene = _embedded()
    result = CarveEngine(model, processor, memory=False)(scene.image, scene.question)
    if not result.answer or not bool(result.saliency.isfinite().all()):
        raise RuntimeError(f"expected an answer and a finite saliency, got {result.answer!r}")
    return "one question about one image to the embedded model"


def _processors(torchvision: str | None) -> Iterator[Line]:
    from carve_kernels.hf import names, processors
    from carve_kernels.hf.families import FAMILIES

    for family in (name for name, family in FAMILIES.items() if family.kind is not None):
        limit = ""
        try:
            name = processors.processor_class(family)
            why = why_not("transformers", name)
            kind = None if why else getattr(importlib.import_module("transformers"), name)
            if kind is not None and processors.lacks_num2words(kind):
                why = "needs num2words: pip install num2words"
            elif kind is not None and torchvision and processors.video_parts(kind):
                limit = f"images work without torchvision, videos need it: {INSTALL_TORCHVISION}"
        except names.UpstreamChanged:
            why = (
                f"transformers {names.version()} lists none for this family: its checkpoints work where their "
                "processor_config.json names one, others need a newer transformers"
            )
        except ImportError as error:
            # transformers has a stand-in for a class that needs a missing library.
            why = f"needs torchvision: {INSTALL_TORCHVISION}" if torchvision else one_line(error)
        yield f"{family} processor", why is None, why or limit


def _yes(works: bool) -> Text:
    return Text("yes", style="green") if works else Text("no", style="yellow")
