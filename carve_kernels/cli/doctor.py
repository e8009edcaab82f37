"""carve-kernels doctor: what is here, what works, and how to mend what does not."""

from __future__ import annotations

import importlib
import inspect
import platform
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from carve_kernels.cli.output import one_line, versions

Line = tuple[str, Text, str]


def doctor() -> None:
    """Say which versions, rooms, devices and processors work here, and how to mend what does not."""
    console = Console()
    console.print(_table("Versions", ("package", "version"), _versions()))
    rooms = {(stage, room): why for stage, room, why in _rooms()}
    console.print(_table("Rooms", ("stage", "room", "serves", "why not, and how to mend it"), _cells(rooms)))
    transformers = why_not("transformers", "AutoProcessor")
    console.print(_table("Machine and models", ("what", "works", "more"), [*_machine(), *_models(transformers)]))
    broken = [f"{stage} in the reference room" for (stage, room), why in rooms.items() if room == "reference" and why]
    broken += ["transformers"] if transformers else []
    broken += [] if rooms else ["torch"]
    if broken:
        console.print(Text(f"Needs mending: {', '.join(broken)}.", style="bold red"))
        raise typer.Exit(1)
    console.print(Text("Ready.", style="bold green"))


def why_not(module: str, name: str | None = None) -> str | None:
    """Why a module, or a name in it, cannot be imported, or None."""
    try:
        loaded = importlib.import_module(module)
        if name is not None:
            getattr(loaded, name)
    # A library that does not fit another fails in ways of its own.
    except Exception as error:
        return one_line(error)
    return None


def _versions() -> Iterator[tuple[str, str]]:
    for name, version in versions().items():
        yield name, version or "missing"
    yield "system", f"{platform.system()} {platform.machine()}"


def _rooms() -> Iterator[tuple[str, str, str | None]]:
    """Each stage and room, and why it does not serve, found out by giving it a small job."""
    if why_not("torch"):
        return
    from carve_kernels.backends import ROOMS, STAGES

    for stage in STAGES:
        for room in ROOMS:
            yield stage, room, _try(stage, room)


def _try(stage: str, room: str) -> str | None:
    import torch

    device = "cuda" if room in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    try:
        work = getattr(importlib.import_module(f"carve_kernels.ops.{stage}"), stage)
        arguments, options = _job(stage, device)
        work(*arguments, **options, backend=room)
    # Whatever goes wrong in a room is what a doctor is asked for.
    except Exception as error:
        return one_line(error).removeprefix(f"backend={room!r}: {room} cannot serve {stage}: ")
    return None


def _job(stage: str, device: str) -> tuple[list[Any], dict[str, Any]]:
    import torch

    ramp = torch.arange(12.0, device=device)
    if stage == "capture":
        query, key = torch.ones(1, 2, 1, 32, device=device), torch.ones(1, 2, 12, 32, device=device)
        return [query, key, torch.arange(6, dtype=torch.int32, device=device)[None]], {"scale": 0.1}
    if stage == "contrast":
        return [ramp.view(1, 1, 12), ramp.view(1, 1, 12), (3, 4), (6, 8)], {"lam": 0.1}
    return [ramp.view(3, 4)], {"keep": 0.4, "top": 2}


def _cells(rooms: dict[tuple[str, str], str | None]) -> Iterator[tuple[str, str, Text, str]]:
    orders: dict[str, tuple[str, ...]] = {}
    if rooms:
        import torch

        from carve_kernels.backends import PREFERRED

        orders = {"a CPU": PREFERRED["cpu"]} | ({"a GPU": PREFERRED["cuda"]} if torch.cuda.is_available() else {})
    serving = {cell for cell, why in rooms.items() if why is None}
    for (stage, room), why in rooms.items():
        takes = [
            where
            for where, order in orders.items()
            if room == next((other for other in (*order, "reference") if (stage, other) in serving), None)
        ]
        yield stage, room, _yes(why is None), why or (f"auto takes it on {' and '.join(takes)}" if takes else "")


def _machine() -> Iterator[Line]:
    why = why_not("torch")
    if why:
        yield "torch", _yes(False), why
        return
    import torch

    from carve_kernels import extension
    from carve_kernels.backends import cpu

    missing = cpu.unavailable()
    yield "extension", _yes(missing is None), missing or "kernels in use: {}, best here: {}".format(*cpu.isa())
    inside = () if missing else extension.architectures()
    more = ", ".join(f"sm_{number}" for number in inside) or "none; build with nvcc on the path or in CUDACXX"
    yield "CUDA kernels", _yes(bool(inside)), more
    yield "CPU", _yes(True), f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "GPU", _yes(bool(names)), ", ".join(names) or "none that torch sees; the CPU serves"


def _models(transformers: str | None) -> Iterator[Line]:
    """transformers, torchvision, and the processor of each supported family."""
    if find_spec("transformers") is None:
        yield "transformers", _yes(False), "missing; pip install 'transformers>=5.0'"
        return
    yield "transformers", _yes(transformers is None), transformers or ""
    torchvision = why_not("torchvision") if find_spec("torchvision") else "missing"
    if torchvision is None:
        yield "torchvision", _yes(True), ""
    elif torchvision == "missing":
        yield "torchvision", _yes(False), "missing; many processors do without it: pip install torchvision"
    else:
        mend = "pip install the torchvision of this torch, from the same index, or pip uninstall torchvision"
        yield "torchvision", _yes(False), f"does not fit torch and breaks transformers ({torchvision}); {mend}"
    if transformers is None and why_not("torch") is None:
        yield from _processors(torchvision)


def _processors(torchvision: str | None) -> Iterator[Line]:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    from carve_kernels.hf.layouts import FAMILIES

    for family in FAMILIES:
        name = PROCESSOR_MAPPING_NAMES[family]
        why = why_not("transformers", name)
        if why is None and torchvision:
            processor = getattr(importlib.import_module("transformers"), name)
            if "video_processor" in inspect.signature(processor.__init__).parameters:
                why = "its video part needs torchvision; pip install torchvision"
        yield f"{family} processor", _yes(why is None), why or ""


def _yes(works: bool) -> Text:
    return Text("yes", style="green") if works else Text("no", style="yellow")


def _table(title: str, columns: tuple[str, ...], lines: Iterable[tuple[str | Text, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in line))
    return table
