"""Attention maps of vision-language models beside fast attention, and CARVE on top of them.

Each public name is loaded on first use: `import carve_kernels` and its operators need only torch and numpy.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carve_kernels.backends import explain as explain
    from carve_kernels.checks import BackendUnavailable as BackendUnavailable
    from carve_kernels.hf.engine.cache import Held as Held
    from carve_kernels.hf.engine.cache import Memory as Memory
    from carve_kernels.hf.engine.engine import CarveEngine as CarveEngine
    from carve_kernels.hf.engine.result import CarvedImage as CarvedImage
    from carve_kernels.hf.engine.result import CarveFailure as CarveFailure
    from carve_kernels.hf.engine.result import CarveResult as CarveResult
    from carve_kernels.hf.engine.video import VideoResult as VideoResult
    from carve_kernels.hf.layouts import layout_of as layout_of
    from carve_kernels.hf.loading import load as load
    from carve_kernels.hf.profile.profile import Probe as Probe
    from carve_kernels.hf.profile.profile import Profile as Profile
    from carve_kernels.hf.profile.profile import profile as profile
    from carve_kernels.hf.session.session import CaptureSession as CaptureSession
    from carve_kernels.hf.session.session import capture_attention as capture_attention
    from carve_kernels.hf.videos import Video as Video
    from carve_kernels.hf.videos import open_video as open_video
    from carve_kernels.maps import AttentionMaps as AttentionMaps
    from carve_kernels.ops.attention import attention as attention
    from carve_kernels.ops.capture import capture as capture
    from carve_kernels.ops.capture import capture_layers as capture_layers
    from carve_kernels.ops.column_sums import column_sums as column_sums
    from carve_kernels.ops.contrast import contrast as contrast
    from carve_kernels.ops.regions import regions as regions
    from carve_kernels.ops.saliency import Saliency as Saliency
    from carve_kernels.ops.saliency import saliency as saliency
    from carve_kernels.ops.zoom import zoom as zoom
    from carve_kernels.pipeline import CarveOutcome as CarveOutcome
    from carve_kernels.pipeline import carve as carve
    from carve_kernels.presets import Preset as Preset
    from carve_kernels.types import Attended as Attended
    from carve_kernels.types import Capture as Capture
    from carve_kernels.types import Regions as Regions
    from carve_kernels.types import View as View
    from carve_kernels.types import VisualLayout as VisualLayout
    from carve_kernels.video import VideoSaliency as VideoSaliency
    from carve_kernels.video import contrast_frames as contrast_frames
    from carve_kernels.visualize import overlay as overlay

__version__ = "0.3.0"

# A submodule of the package must not have the name of a key: once loaded, it would replace that name.
_SOURCES = {
    "AttentionMaps": "maps",
    "Attended": "types",
    "BackendUnavailable": "checks",
    "Capture": "types",
    "CaptureSession": "hf.session.session",
    "CarveEngine": "hf.engine",
    "CarveFailure": "hf.engine.result",
    "CarveOutcome": "pipeline",
    "CarveResult": "hf.engine.result",
    "CarvedImage": "hf.engine.result",
    "Held": "hf.engine.cache",
    "Memory": "hf.engine.cache",
    "Preset": "presets",
    "Probe": "hf.profile",
    "Profile": "hf.profile",
    "Regions": "types",
    "Saliency": "ops.saliency",
    "Video": "hf.videos",
    "VideoResult": "hf.engine.video",
    "VideoSaliency": "video",
    "View": "types",
    "VisualLayout": "types",
    "attention": "ops.attention",
    "capture": "ops.capture",
    "capture_attention": "hf.session",
    "capture_layers": "ops.capture",
    "carve": "pipeline",
    "column_sums": "ops.column_sums",
    "contrast": "ops.contrast",
    "contrast_frames": "video",
    "explain": "backends",
    "layout_of": "hf.layouts",
    "load": "hf.loading",
    "open_video": "hf.videos",
    "overlay": "visualize",
    "profile": "hf.profile",
    "regions": "ops.regions",
    "saliency": "ops.saliency",
    "zoom": "ops.zoom",
}

__all__ = ["__version__", *_SOURCES]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'carve_kernels' has no attribute {name!r}")
    from carve_kernels.extras import needed_by

    with needed_by(name):
        value = getattr(importlib.import_module(f"carve_kernels.{_SOURCES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _MovedModules:
    """Finds modules by their old paths; asked last, for what no other finder knows."""

    @staticmethod
    def find_spec(name: str, _path: Any = None, _target: Any = None) -> Any:
        if not name.startswith("carve_kernels."):
            return None
        from carve_kernels.deprecation import moved_module

        return moved_module(name)


sys.meta_path.append(_MovedModules)
