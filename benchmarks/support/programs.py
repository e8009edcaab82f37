"""The release's and ViCrop's own programs, imported from a folder that the user names; nothing of them is shipped.

They were written for older versions of transformers, so they get a processor and a model that take their calls: texts
before images, casts to bfloat16 whatever the model's dtype, and token types that do not grow with the prompt.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# What the programs import and do not need for what is measured.
_OPTIONAL = (
    "av", "datasets", "decord", "requests", "skimage", "skimage.measure", "torchvision", "torchvision.io",
    "torchvision.transforms", "torchvision.transforms.functional", "tqdm",
)  # fmt: skip
_RELEASE, _VICROP = "carve/pipeline.py", "run.py"
_MODULES = ("run", "llava_methods", "blip_methods", "utils", "info")


class BadProgram(ValueError):
    """A folder has no such program, or it cannot be imported."""


def release(folder: Path) -> ModuleType:
    """The package `carve` of a checkout of YuyaoGe/CARVE."""
    _check("--release", folder, _RELEASE)
    name = "benchmarks_release_program"
    for stale in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[stale]
    with _imports("--release", folder):
        try:
            importlib.import_module("qwen_vl_utils")
        except ModuleNotFoundError as error:
            raise BadProgram(
                f"--release: its program needs qwen_vl_utils ({error}): pip install --no-deps qwen-vl-utils"
            ) from error
        place = folder / "carve" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
        if spec is None or spec.loader is None:
            raise BadProgram(f"--release: {place} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module


def vicrop(folder: Path) -> ModuleType:
    """The module `run` of a checkout of zenjieli/mllms_know, with its `llava_methods` and `utils` as attributes."""
    _check("--vicrop", folder, _VICROP)
    displaced = {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        with _imports("--vicrop", folder):
            module = importlib.import_module("run")
            module.llava_methods = importlib.import_module("llava_methods")
    finally:
        sys.path.remove(str(folder))
        for name in _MODULES:
            sys.modules.pop(name, None)
        sys.modules |= displaced
    return module


class Processor:
    """A processor for the programs: texts before images, and `.to(device, dtype)` casts to the model's dtype."""

    def __init__(self, processor: Any, dtype: torch.dtype) -> None:
        self._processor, self._dtype = processor, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def image_processor(self, images: Any) -> Any:
        """As tensors, which the processors on torchvision return unasked."""
        return self._processor.image_processor(images, return_tensors="pt")

    def __call__(self, *args: Any, **options: Any) -> Any:
        for given in args:
            options["text" if _is_text(given) else "images"] = given
        inputs = self._processor(**options)
        plain = type(inputs).to
        dtype = self._dtype
        kind = type("Inputs", (type(inputs),), {"to": lambda self, device, *_: plain(self, device, dtype)})
        return kind(dict(inputs))


def adapt(model: Any) -> Any:
    """A model for the programs: token types grow with the prompt."""

    def grow(_module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        types, ids = given.get("mm_token_type_ids"), given.get("input_ids")
        if types is not None and ids is not None and types.shape[1] < ids.shape[1]:
            given["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        return args, given

    model.register_forward_pre_hook(grow, with_kwargs=True)
    return model


def _is_text(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, list) and all(isinstance(part, str) for part in given))


def _check(option: str, folder: Path, file: str) -> None:
    if not (folder / file).is_file():
        raise BadProgram(f"{option}: expected a folder with {file}, got {folder}")


@contextmanager
def _imports(option: str, folder: Path) -> Iterator[None]:
    """Modules that are not installed and not needed are replaced while the program is imported."""
    import transformers

    # Before the replacements, which must not be taken for installed packages.
    _ = [getattr(transformers, name) for name in ("AutoProcessor", "InstructBlipForConditionalGeneration")]
    _ = [getattr(transformers, name) for name in ("InstructBlipProcessor", "LlavaForConditionalGeneration")]
    added = [name for name in _OPTIONAL if sys.modules.get(name) is None and not _installed(name)]
    before = {name: sys.modules[name] for name in added if name in sys.modules}
    for name in added:
        sys.modules[name] = _Absent(name)
        parent, _, child = name.rpartition(".")
        if parent in added:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    except BadProgram:
        raise
    except (Exception, SystemExit) as error:
        raise BadProgram(f"{option}: {folder} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        for name in added:
            sys.modules.pop(name, None)
        sys.modules |= before


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


class _Absent(ModuleType):
    """A module that is not installed: its names can be imported, and fail where they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*_args: Any, **_options: Any) -> None:
            raise ModuleNotFoundError(f"{self.__name__} is not installed, and {name} was called")

        return fail
