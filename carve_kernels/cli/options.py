"""Options that run, batch and profile share, and the parsing of their values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from carve_kernels.presets import Preset

_SPAN = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the last parameter of a command, a dataclass, by its fields: typer then reads each as an option."""
    signature = inspect.signature(command, eval_str=True)
    *own, settings = signature.parameters.values()
    shared = inspect.signature(settings.annotation, eval_str=True).parameters.values()

    @functools.wraps(command)
    def call(**values: Any) -> None:
        fields = {option.name: values.pop(option.name) for option in shared}
        command(**values, **{settings.name: settings.annotation(**fields)})

    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in (*own, *shared)]
    call.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return call


def option(text: str, *names: str, panel: str = "Method") -> Any:
    """An option without names has that of its parameter: --max-new-tokens for max_new_tokens."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


_machine = functools.partial(option, panel="Machine")


def path(text: str, *names: str) -> Any:
    """The option of a path, as the text that was typed: Path would change a URL, and turn an empty text into "."."""
    return typer.Option(*names, help=text, metavar="<path>")


MODEL = (
    "Checkpoint directory, small (the embedded model), or the id of a model in the local hub cache, such as Org/Name. "
    "Nothing is downloaded."
)
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL)]


@dataclass
class Settings:
    """The options of every command that loads a checkpoint, checked."""

    preset: Annotated[
        str | None,
        option(
            "paper, release, or a JSON file such as carve.json, which can set every parameter. "
            "Default: the model's carve.json, or paper."
        ),
    ] = None
    max_new_tokens: Annotated[int | None, option("Longest answer, in tokens.")] = None
    fit: Annotated[
        str | None,
        option(
            "pad puts an image on a canvas that the model sees in full, where its processor would crop the image. "
            "Default: as the processor does."
        ),
    ] = None
    dtype: Annotated[
        str,
        _machine(
            "auto, float32, bfloat16, float16, float64. "
            "auto is that of the checkpoint, or float32 for float16 on a CPU."
        ),
    ] = "auto"
    device: Annotated[str, _machine("auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    attn: Annotated[str | None, _machine("Attention of the model: sdpa, eager, flex_attention, ...")] = None
    backend: Annotated[str, _machine("auto, reference, cpu, triton or cuda; doctor lists which of them work.")] = "auto"
    allow_pickle: Annotated[bool, _machine("Load pickle weights, which can run arbitrary code.", "--allow-pickle")] = (
        False
    )
    max_image_pixels: Annotated[
        int | None, _machine("Refuse images with more pixels than this. Default: 178956970.")
    ] = None
    pixel_limit: int = field(init=False)

    def __post_init__(self) -> None:
        from carve_kernels import checks
        from carve_kernels.backends import BACKENDS
        from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS
        from carve_kernels.hf.loading import dtype_of
        from carve_kernels.presets import FITS

        checks.choice("backend", self.backend, ("auto", *BACKENDS))
        # The full name: float16 for fp16.
        self.dtype = str(dtype_of("dtype", self.dtype)).removeprefix("torch.")
        if self.fit is not None:
            # None means that the option is absent; it cannot be typed.
            checks.choice("fit", self.fit, [name for name in FITS if name is not None])
        limit = MAX_IMAGE_PIXELS if self.max_image_pixels is None else self.max_image_pixels
        self.pixel_limit = checks.integer("max_image_pixels", limit, low=1)

    @property
    def preset_files(self) -> list[Path]:
        """The file that --preset names, if it names one."""
        from carve_kernels import checks

        is_file = self.preset is not None and self.preset.endswith(".json")
        return [checks.path("preset", self.preset)] if is_file else []

    @property
    def engine(self) -> dict[str, Any]:
        """The arguments that CarveEngine and the profile share."""
        return {"backend": self.backend, "max_image_pixels": self.pixel_limit, "fit": self.fit}

    def preset_of(self, model: str) -> tuple[str, Preset]:
        """The name and the values of the preset that the options mean for this checkpoint."""
        changes = {name: value for name, value in vars(self).items() if name in _PARAMETERS and value is not None}
        for name, parse in _PARSERS.items():
            if name in changes:
                changes[name] = parse(changes[name])
        if "top" in changes:
            changes["floor"] = None
        name, base = self._base(model)
        return name, dataclasses.replace(base, **changes)

    def _base(self, model: str) -> tuple[str, Preset]:
        """The name and the preset that the options start from."""
        from carve_kernels.hf.loading import preset_in, preset_of_checkpoint
        from carve_kernels.presets import Preset

        if self.preset is None:
            profile = preset_of_checkpoint(model)
            return ("paper", Preset.paper()) if profile is None else ("profile", profile)
        for file in self.preset_files:
            return file.stem, preset_in("preset", file)
        return self.preset, Preset.of(self.preset)

    def load(self, model: str) -> tuple[Any, Any]:
        """The model, under the attention that was chosen, and its processor."""
        import torch

        from carve_kernels.hf import names
        from carve_kernels.hf.loading import load

        device = device_of(self.device)
        loaded, processor = load(model, dtype=self.dtype, device=device, allow_pickle=self.allow_pickle)
        if self.dtype == "auto" and device.type == "cpu" and loaded.dtype == torch.float16:
            loaded.float()
        if self.attn is not None:
            try:
                names.set_implementation(loaded, self.attn)
            except (ValueError, ImportError) as error:
                raise type(error)(f"attn: {error}") from error
        return loaded, processor


@dataclass
class MethodSettings(Settings):
    """The options of run and batch, which set every parameter of the method."""

    layers: Annotated[str | None, option("Captured layers: 20-25, or 3,5, or -1 (the last), or paper, or all.")] = None
    rows: Annotated[
        str | None,
        option(
            "Captured query rows: last, 4 (the last four), question, word:red, text:the red cat, "
            "or -3 (the third last)."
        ),
    ] = None
    steps: Annotated[str | None, option("Decode steps of the answer: t_start, t_end or t_full.")] = None
    keep: Annotated[float | None, option("Share of the pixels to keep, 0 to 1.")] = None
    top: Annotated[int | None, option("Regions to keep at most.")] = None
    lam: Annotated[str | None, option("Added to the general map: a number, or mean (of that map).")] = None


def parse_layers(text: str) -> str | tuple[int, ...]:
    """Layers from "20-25", "3,5", "-1" or the name of a choice of layers."""
    from carve_kernels.presets import LAYERS

    if text in LAYERS:
        return text
    numbers: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"layers: expected 20-25, or 3,5, or -1, or paper, or all, got {text!r}")
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


def parse_refine(text: str | None) -> str | list[int] | None:
    """Numbers of images from "1" or "0,2", or "all"."""
    if text is None or text == "all":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"refine: expected all, or numbers of images such as 1 or 0,2, got {text!r}") from None


_PARAMETERS = ("layers", "rows", "steps", "keep", "top", "lam", "max_new_tokens")
_PARSERS: dict[str, Callable[[str], Any]] = {"layers": parse_layers, "rows": parse_rows, "lam": parse_lam}


def device_of(name: str) -> Any:
    """The device of a name; auto is the first GPU, or the CPU."""
    import torch

    from carve_kernels.devices import usable

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable("device", name)
