"""Options that run, batch and profile share, and the parsing of their values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from carve_kernels.presets import Preset

_SPAN = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def option(text: str, name: str, panel: str, **settings: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=False, **settings)


def path(text: str, *names: str) -> Any:
    """The option of a path, as the text that was typed: Path would change a URL, and turn an empty text into "."."""
    return typer.Option(*names, help=text, metavar="<path>")


MODEL = (
    "Checkpoint directory, small (the embedded model), or the id of a model in the local hub cache, such as Org/Name. "
    "Nothing is downloaded."
)
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL)]
PresetOption = Annotated[
    str | None,
    option(
        "paper, release, or a JSON file such as carve.json, which can set every parameter. "
        "Default: the model's carve.json, or paper.",
        "--preset",
        "Method",
    ),
]
LayersOption = Annotated[
    str | None, option("Captured layers: 20-25, or 3,5, or -1 (the last), or paper.", "--layers", "Method")
]
RowsOption = Annotated[
    str | None,
    option(
        "Captured query rows: last, 4 (the last four), question, word:red, text:the red cat, or -3 (the third last).",
        "--rows",
        "Method",
    ),
]
StepsOption = Annotated[
    str | None, option("Decode steps of the answer: t_start, t_end or t_full.", "--steps", "Method")
]
KeepOption = Annotated[float | None, option("Share of the pixels to keep, 0 to 1.", "--keep", "Method")]
TopOption = Annotated[int | None, option("Regions to keep at most.", "--top", "Method")]
LamOption = Annotated[
    str | None, option("Added to the general map: a number, or mean (of that map).", "--lam", "Method")
]
FitOption = Annotated[
    str | None,
    option(
        "pad puts an image on a canvas that the model sees in full, where its processor would crop the image. "
        "Default: as the processor does.",
        "--fit",
        "Method",
    ),
]
MaxNewTokensOption = Annotated[int | None, option("Longest answer, in tokens.", "--max-new-tokens", "Method")]
DtypeOption = Annotated[
    str,
    option(
        "auto, float32, bfloat16, float16, float64. auto is that of the checkpoint, or float32 for float16 on a CPU.",
        "--dtype",
        "Machine",
    ),
]
DeviceOption = Annotated[str, option("auto, cpu, cuda, cuda:1, mps, ...", "--device", "Machine")]
AttentionOption = Annotated[
    str | None, option("Attention of the model: sdpa, eager, flex_attention, ...", "--attn", "Machine")
]
BackendOption = Annotated[
    str, option("auto, reference, cpu, triton or cuda; doctor lists which of them work.", "--backend", "Machine")
]
AllowPickleOption = Annotated[
    bool, option("Load pickle weights, which can run arbitrary code.", "--allow-pickle", "Machine")
]
MaxImagePixelsOption = Annotated[
    int | None,
    option("Refuse images with more pixels than this. Default: 178956970.", "--max-image-pixels", "Machine"),
]


def build_preset(
    model: str,
    preset: str | None,
    layers: str | None = None,
    rows: str | None = None,
    steps: str | None = None,
    keep: float | None = None,
    top: int | None = None,
    lam: str | None = None,
    max_new_tokens: int | None = None,
) -> tuple[str, Preset]:
    """The name and the values of the preset that the options mean for this checkpoint."""
    options: dict[str, Any] = {
        "layers": None if layers is None else parse_layers(layers),
        "rows": None if rows is None else parse_rows(rows),
        "steps": steps,
        "keep": keep,
        "top": top,
        "lam": None if lam is None else parse_lam(lam),
        "max_new_tokens": max_new_tokens,
    }
    name, base = _base(preset, model)
    changes = {key: value for key, value in options.items() if value is not None}
    if top is not None:
        changes["floor"] = None
    return name, dataclasses.replace(base, **changes)


def parse_layers(text: str) -> str | tuple[int, ...]:
    """Layers from "20-25", "3,5", "-1" or the name of a choice of layers."""
    if text in ("paper", "release"):
        return text
    numbers: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"layers: expected 20-25, or 3,5, or -1, or paper, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"layers: expected an ascending range, got {part.strip()!r}")
        numbers += range(first, last + 1)
    return tuple(numbers)


def parse_rows(text: str) -> str | int | tuple[Any, ...]:
    """Rows from "last", "question", "4" (the last four), "word:red", "text:the red cat", or positions "-3,-2"."""
    kind, colon, value = text.partition(":")
    if colon and kind in ("word", "text"):
        return (kind, value)
    if text in ("last", "question"):
        return text
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"rows: expected last, 4, question, word:red or text:TEXT, got {text!r}") from None
    return numbers if len(numbers) > 1 or numbers[0] < 0 else numbers[0]


def parse_lam(text: str) -> str | float:
    if text == "mean":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"lam: expected a number or mean, got {text!r}") from None


def _base(preset: str | None, model: str) -> tuple[str, Preset]:
    """The name and the preset that the options start from."""
    from carve_kernels.hf.loading import preset_in, preset_of_checkpoint
    from carve_kernels.presets import Preset

    if preset is None:
        profile = preset_of_checkpoint(model)
        return ("paper", Preset.paper()) if profile is None else ("profile", profile)
    files = preset_files(preset)
    return (files[0].stem, preset_in("preset", files[0])) if files else (preset, Preset.of(preset))


def preset_files(preset: str | None) -> list[Path]:
    """The file that --preset names, if it names one."""
    from carve_kernels import checks

    return [checks.path("preset", preset)] if preset is not None and preset.endswith(".json") else []


def device_of(name: str) -> Any:
    """The device of a name; auto is the first GPU, or the CPU."""
    import torch

    from carve_kernels.devices import usable

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable("device", name)


def check_fit(fit: str | None) -> None:
    """Raise ValueError for an unknown --fit, before any model is loaded."""
    from carve_kernels import checks
    from carve_kernels.presets import FITS

    if fit is not None:
        # None means that the option is absent; it cannot be typed.
        checks.choice("fit", fit, [name for name in FITS if name is not None])


def pixel_limit(max_image_pixels: int | None) -> int:
    """The value of --max-image-pixels, or its default."""
    from carve_kernels import checks
    from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS

    return MAX_IMAGE_PIXELS if max_image_pixels is None else checks.integer("max_image_pixels", max_image_pixels, low=1)


def unseen_warning(share: float) -> str | None:
    """A warning of the share of an image that the model did not see; None where it is negligible."""
    from carve_kernels.cli.notes import percent

    if share <= 0.005:
        return None
    text = percent(share).replace("%", " %")
    return f"{text} of the image was outside the model's view (centre crop); --fit pad shows it whole"


def check_machine(dtype: str, backend: str) -> str:
    """The full name of a dtype, such as float16 for fp16; ValueError for an unknown dtype or backend."""
    from carve_kernels import checks
    from carve_kernels.backends import BACKENDS
    from carve_kernels.hf.loading import dtype_of

    checks.choice("backend", backend, ("auto", *BACKENDS))
    return str(dtype_of("dtype", dtype)).removeprefix("torch.")


def load_model(model: str, dtype: str, device: Any, attn: str | None, allow_pickle: bool) -> tuple[Any, Any]:
    import torch

    from carve_kernels.hf import names
    from carve_kernels.hf.loading import load

    loaded, processor = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    if dtype == "auto" and device.type == "cpu" and loaded.dtype == torch.float16:
        loaded.float()
    if attn is not None:
        try:
            names.set_implementation(loaded, attn)
        except (ValueError, ImportError) as error:
            raise type(error)(f"attn: {error}") from error
    return loaded, processor
